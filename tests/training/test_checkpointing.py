"""Which checkpoint a run starts from, and how a run reports its saves."""

import contextlib
import errno
import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.pool import Pool
from support.runs import Tree, corpus, create_engine, run_trainer, tiny_config
from support.saved import flip_bit

from megagpt.checkpoint.files import write_safetensors
from megagpt.checkpoint.write import WriteFile
from megagpt.config import Config
from megagpt.config.schema import CheckpointConfig
from megagpt.engine.engine import Engine
from megagpt.errors import CheckpointError
from megagpt.training.checkpointing import Checkpointer, find_checkpoint, format_bytes, load_checkpoint
from megagpt.training.train_state import RunProgress

PROGRESS = RunProgress(consumed_samples=24)


def checkpoint_config(folder: Path | None, **checkpoint: Any) -> Config:
    directory = str(folder / "checkpoints") if folder is not None else None
    return tiny_config(model={"n_layer": 1}, checkpoint={"dir": directory, **checkpoint})


@pytest.fixture
def run(ranks: Pool, tmp_path: Path) -> Path:
    """The checkpoint folder of a run of two ranks, with steps 1 and 2."""
    tree: Tree = {
        "data": {"train": corpus(tmp_path)},
        "training": {"steps": 2, "micro_batch_size": 2, "global_batch_size": 4},
        "model": {"n_layer": 1},
        "checkpoint": {"dir": str(tmp_path / "checkpoints"), "interval": 1},
    }
    ranks.run(2, run_trainer, tiny_config(**tree))
    return tmp_path / "checkpoints"


def find(**checkpoint: Any) -> tuple[Path | None, str, str]:
    """Return the checkpoint to start from, or the error, and the warnings of this rank."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            folder, error = find_checkpoint(CheckpointConfig(**checkpoint)), ""
        except CheckpointError as problem:
            folder, error = None, str(problem)
    return folder, error, stderr.getvalue()


def test_without_a_folder_a_run_starts_from_scratch(ranks: Pool) -> None:
    assert ranks.run(2, find) == [(None, "", "")] * 2


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_with_an_empty_or_missing_folder_starts_from_scratch(resume: str, ranks: Pool, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        assert ranks.run(2, partial(find, dir=str(tmp_path / name), resume=resume)) == [(None, "", "")] * 2


def test_auto_finds_the_newest_complete_checkpoint(run: Path, ranks: Pool) -> None:
    newest, older = run / "step_00000002", run / "step_00000001"
    assert ranks.run(2, partial(find, dir=str(run))) == [(newest, "", "")] * 2
    flip_bit(newest / "rank_00000.safetensors")
    (folder, error, stderr), other = ranks.run(2, partial(find, dir=str(run)))
    assert (folder, error) == (older, "") and other == (older, "", "")
    assert "step_00000002" in stderr and "SHA-256 differs" in stderr


def test_never_refuses_to_overwrite_the_checkpoints_of_another_run(run: Path, ranks: Pool) -> None:
    for folder, error, _ in ranks.run(2, partial(find, dir=str(run), resume="never")):
        assert folder is None
        assert error.startswith('checkpoint.resume: "never", but checkpoint.dir ')
        assert "has checkpoints (the newest is step_00000002), which this run would overwrite" in error


def test_a_path_selects_that_checkpoint_or_the_newest_of_that_run(run: Path, ranks: Pool, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    assert ranks.run(2, partial(find, dir=other, resume=str(run / "step_00000001"))) == [(run / "step_00000001", "", "")] * 2
    assert ranks.run(2, partial(find, dir=other, resume=str(run))) == [(run / "step_00000002", "", "")] * 2


def test_a_damaged_or_missing_checkpoint_of_a_path_is_an_error_on_all_ranks(run: Path, ranks: Pool, tmp_path: Path) -> None:
    flip_bit(run / "step_00000002" / "rank_00001.safetensors")
    for folder, error, _ in ranks.run(2, partial(find, resume=str(run / "step_00000002"))):
        assert folder is None and "rank_00001.safetensors: its SHA-256 differs" in error
    for folder, error, _ in ranks.run(2, partial(find, resume=str(tmp_path / "nowhere"))):
        assert folder is None and "no checkpoint here" in error


def test_folders_of_interrupted_saves_are_removed(run: Path, ranks: Pool) -> None:
    (run / "step_00000003.writing-abc").mkdir()
    assert ranks.run(2, partial(find, dir=str(run)))[0][0] == run / "step_00000002"
    assert not (run / "step_00000003.writing-abc").exists()


def load(config: Config, folder: Path) -> tuple[int, int, str]:
    """Load a checkpoint; return its step, its samples and the output of this rank."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        engine = create_engine(config)
        restored = load_checkpoint(engine, folder)
    engine.close()
    return restored.step, restored.state.consumed_samples, stdout.getvalue()


def test_a_loaded_checkpoint_is_reported_once_with_its_size(run: Path, ranks: Pool) -> None:
    folder = run / "step_00000002"
    results = ranks.run(2, load, checkpoint_config(None), folder)
    assert [(step, samples) for step, samples, _ in results] == [(2, 8)] * 2
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert results[0][2].startswith(f"loaded {folder}: step 2, sample 8; {format_bytes(size)} verified, ")
    assert " read per rank\n" in results[0][2]
    assert results[1][2] == ""
    [(_, _, alone)] = ranks.run(1, load, checkpoint_config(None), folder)
    assert " read\n" in alone and "per rank" not in alone


def fail_to_write(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_on_first_call() -> WriteFile:
    """Return a writer whose first call fails."""
    calls: list[int] = []

    def write(*args: Any) -> Any:
        calls.append(1)
        return fail_to_write() if len(calls) == 1 else write_safetensors(*args)

    return write


def with_engine(config: Config, action: Callable[[Engine], Any]) -> tuple[Any, str, str]:
    """Run an action with a new engine; return its result and the output of this rank."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        engine = create_engine(config)
        result = action(engine)
    engine.close()
    return result, stdout.getvalue(), stderr.getvalue()


def save_twice(engine: Engine) -> list[Any]:
    checkpointer = Checkpointer(engine, None, 0)
    facts: list[Any] = [checkpointer.enabled, checkpointer.last_step, checkpointer.newest]
    for step in (3, 4):
        checkpointer.save(step, PROGRESS)
        facts.append(checkpointer.last_step)
    checkpointer.finish(required=True)
    facts.append(checkpointer.newest)
    checkpointer.poll()
    checkpointer.close()
    return facts


def test_saves_are_reported_on_rank_0_and_the_newest_is_known(ranks: Pool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    results = ranks.run(2, with_engine, checkpoint_config(tmp_path), save_twice)
    assert [facts for facts, *_ in results] == [[True, None, None, 3, 4, folder / "step_00000004"]] * 2
    _, stdout, stderr = results[0]
    lines = stdout.splitlines()
    assert [line.split(" in ")[0].split(":")[0] for line in lines] == [
        "saving step 3",
        f"saved {folder / 'step_00000003'}",
        "saving step 4",
        f"saved {folder / 'step_00000004'}",
    ]
    assert stderr == "" and results[1][1:] == ("", "")


def save_with_a_failure(loaded: Path, engine: Engine) -> list[Any]:
    checkpointer = Checkpointer(engine, loaded, 2, write_file=fail_on_first_call())
    facts: list[Any] = [checkpointer.last_step, checkpointer.newest]
    checkpointer.save(3, PROGRESS)
    checkpointer.finish()
    facts += [checkpointer.last_step, checkpointer.newest]
    checkpointer.save(3, PROGRESS)
    checkpointer.finish(required=True)
    facts += [checkpointer.last_step, checkpointer.newest]
    checkpointer.close()
    return facts


def test_a_failed_save_is_reported_and_can_be_repeated(run: Path, ranks: Pool, tmp_path: Path) -> None:
    loaded = run / "step_00000002"
    action = partial(save_with_a_failure, loaded)
    ((facts, _, stderr),) = ranks.run(1, with_engine, checkpoint_config(tmp_path / "own"), action)
    saved = tmp_path / "own" / "checkpoints" / "step_00000003"
    assert facts == [2, loaded, None, loaded, 3, saved]
    assert "NOT SAVED: the checkpoint of step 3: rank 0: [Errno 28] No space left on device; training continues" in stderr


def require_a_failed_save(engine: Engine) -> str:
    checkpointer = Checkpointer(engine, None, 0, write_file=fail_to_write)
    checkpointer.save(3, PROGRESS)
    with pytest.raises(CheckpointError) as error:
        checkpointer.finish(required=True)
    checkpointer.close()
    return str(error.value)


def test_a_required_save_that_fails_is_an_error(ranks: Pool, tmp_path: Path) -> None:
    ((error, _, _),) = ranks.run(1, with_engine, checkpoint_config(tmp_path), require_a_failed_save)
    assert error.startswith("the checkpoint of step 3 could not be saved: rank 0: [Errno 28]")


def use_without_folder(engine: Engine) -> list[Any]:
    checkpointer = Checkpointer(engine, None, 0)
    checkpointer.save(3, PROGRESS)
    checkpointer.poll()
    checkpointer.finish(required=True)
    checkpointer.close()
    return [checkpointer.enabled, checkpointer.last_step, checkpointer.newest]


def test_without_a_folder_nothing_is_saved_or_printed(ranks: Pool) -> None:
    assert ranks.run(1, with_engine, checkpoint_config(None), use_without_folder) == [([False, None, None], "", "")]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (188_340, "188 kB"),
        (999_600, "1 MB"),
        (4.27e9, "4.27 GB"),
        (12.345e12, "12.35 TB"),
    ],
)
def test_bytes_are_formatted_in_decimal_units(n_bytes: float, text: str) -> None:
    assert format_bytes(n_bytes) == text
