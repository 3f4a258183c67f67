"""At no moment of a save is there less than one complete copy of a checkpoint that the next start finds."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.format import Manifest, checkpoint_folders, latest_name, rank_file, step_folder, temporary_folder
from megagpt.checkpoint.load import CheckpointReader
from megagpt.checkpoint.verify import local_problems, recover_interrupted, remove_unfinished
from megagpt.checkpoint.write import BoxRecord, TensorSource, build_manifest, commit, write_boxes, write_checkpoint

OLD, NEW = 1.0, 2.0
FULL = Box.full((4,))
RENAMES = 5
"""Renames of a save that replaces a checkpoint: manifest, its checksum, old folder, new folder, latest."""


def write_old(directory: Path) -> None:
    """Write checkpoints of steps 2 and 4 with the old values."""
    for step in (2, 4):
        write_checkpoint(directory, step, [TensorSource("w", (4,), {"master": torch.full((4,), OLD)})], {}, {})


def replace_step_4(directory: Path) -> None:
    """Save step 4 once more, with the new values, as a run does that was set back."""
    final = step_folder(directory, 4)
    temporary = temporary_folder(final, "0a1b2c3d")
    temporary.mkdir()
    boxes = [BoxRecord("w", (4,), ("master",), FULL)]
    contents = write_boxes(temporary / rank_file(0), boxes, [torch.full((4,), NEW)])
    commit(temporary, final, build_manifest(Manifest(step=4, config={}, state={}, tensors={}, files=[]), [contents]))


def at_rename(number: int, after: bool, action: Callable[[], Any]) -> None:
    """Call `action` before or after each rename of this process from `number` on."""
    count = 0

    def wrapped(original: Callable[[Path, Any], Path]) -> Callable[[Path, Any], Path]:
        def rename(path: Path, target: Any) -> Path:
            nonlocal count
            count += 1
            if count >= number and not after:
                action()
            result = original(path, target)
            if count >= number and after:
                action()
            return result

        return rename

    Path.rename, Path.replace = wrapped(Path.rename), wrapped(Path.replace)  # type: ignore[assignment, method-assign]


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process and return its exit code; 0 if it returns, 1 if it raises."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def values_after_recovery(directory: Path) -> float:
    """Recover as a start does; return the value that the checkpoint of step 4 holds."""
    recover_interrupted(directory, print)
    remove_unfinished(directory, print)
    assert [folder.name for folder in sorted(checkpoint_folders(directory))] == ["step_00000002", "step_00000004"]
    assert list(directory.glob("step_*.*")) == []
    assert latest_name(directory) == "step_00000004"
    assert local_problems(directory / "step_00000004") == []
    values = CheckpointReader(directory / "step_00000004").read("master", "w", FULL)
    assert len(values.unique()) == 1
    return values[0].item()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, RENAMES + 1))
def test_a_kill_at_any_rename_of_a_save_leaves_a_complete_checkpoint(number: int, after: bool, tmp_path: Path) -> None:
    """From the rename of the old folder on, the new copy is complete and is the one that is recovered."""
    write_old(tmp_path)

    def work() -> None:
        at_rename(number, after, lambda: os._exit(9))
        replace_step_4(tmp_path)

    assert in_child(work) == 9
    old_folder_renamed = number > 3 or (number == 3 and after)
    assert values_after_recovery(tmp_path) == (NEW if old_folder_renamed else OLD)


@pytest.mark.parametrize("number", range(1, RENAMES + 1))
def test_a_disk_that_fails_from_any_rename_on_leaves_a_complete_checkpoint(number: int, tmp_path: Path) -> None:
    write_old(tmp_path)

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def work() -> None:
        at_rename(number, False, fail)
        replace_step_4(tmp_path)

    assert in_child(work) == 1
    assert values_after_recovery(tmp_path) == (NEW if number > 3 else OLD)


def test_a_save_without_faults_needs_exactly_the_renames_that_are_tested(tmp_path: Path) -> None:
    write_old(tmp_path)
    for number, code in ((RENAMES, 9), (RENAMES + 1, 0)):

        def work(number: int = number) -> None:
            at_rename(number, False, lambda: os._exit(9))
            replace_step_4(tmp_path)

        assert in_child(work) == code
        recover_interrupted(tmp_path, print)
        remove_unfinished(tmp_path, print)


def test_if_the_new_copy_is_damaged_the_old_one_is_recovered(tmp_path: Path) -> None:
    write_old(tmp_path)

    def work() -> None:
        at_rename(3, True, lambda: os._exit(9))
        replace_step_4(tmp_path)

    in_child(work)
    with (tmp_path / "step_00000004.writing-0a1b2c3d" / "rank_00000.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert values_after_recovery(tmp_path) == OLD


def test_what_a_link_points_to_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step_00000001.deleting").symlink_to(tmp_path / "precious")
    (tmp_path / "run" / "step_00000002.writing-0").touch()
    remove_unfinished(tmp_path / "run", print)
    assert list((tmp_path / "run").iterdir()) == [] and (tmp_path / "precious" / "file").exists()
