"""Which checkpoints are kept and which are deleted."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.checkpoint.retention import remove_old, steps_to_remove


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 10), st.none() | st.integers(1, 50))
def test_the_last_n_and_every_mth_checkpoint_are_kept_and_no_other(saved: set[int], keep: int, every: int | None) -> None:
    steps = sorted(saved)
    kept = set(steps) - set(steps_to_remove(steps, keep, every))
    expected = set(steps[-keep:]) | {step for step in steps if every is not None and step % every == 0}
    assert kept == expected
    assert steps[-1] in kept


def make(directory: Path, *steps: int, manifest: bool = True) -> None:
    for step in steps:
        folder = directory / f"step_{step:08d}"
        folder.mkdir()
        if manifest:
            (folder / "manifest.json").write_text("{}")


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in directory.glob("step_*"))


@pytest.mark.parametrize(
    ("keep", "every", "loaded", "kept"),
    [
        (0, None, None, [10, 20, 30, 40, 50]),
        (2, None, None, [40, 50]),
        (1, 20, None, [20, 40, 50]),
        (1, None, 20, [20, 50]),
        (2, None, 50, [40, 50]),
    ],
)
def test_only_checkpoints_that_are_not_kept_are_deleted_from_disk(
    keep: int, every: int | None, loaded: int | None, kept: list[int], tmp_path: Path
) -> None:
    make(tmp_path, 10, 20, 30, 40, 50)
    remove_old(tmp_path / "step_00000050", keep, every, tmp_path / f"step_{loaded:08d}" if loaded else None)
    assert steps_in(tmp_path) == kept


def test_the_loaded_checkpoint_is_kept_whatever_path_it_was_loaded_from(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    (tmp_path / "link").symlink_to(tmp_path / "step_00000010")
    remove_old(tmp_path / "step_00000030", 1, None, tmp_path / "link")
    assert steps_in(tmp_path) == [10, 30]


def test_later_steps_and_folders_without_a_manifest_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    """After a run is set back to step 20, the later checkpoints must not cause the deletion of its new ones."""
    make(tmp_path, 10, 20, 80, 90)
    make(tmp_path, 15, manifest=False)
    remove_old(tmp_path / "step_00000020", 1, None, None)
    assert steps_in(tmp_path) == [15, 20, 80, 90]
