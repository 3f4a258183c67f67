"""Which checkpoint a run starts from, and how a run reports its saves."""

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from support.runs import (
    Tree,
    corpus,
    create_engine,
    full_model,
    open_trainer,
    parameters_by_name,
    run_trainer,
    tiny_config,
)
from support.saved import flip_bit

from megagpt.checkpoint.files import write_safetensors
from megagpt.checkpoint.format import read_manifest, resolve_checkpoint
from megagpt.checkpoint.write import TensorSource, WriteFile, write_checkpoint
from megagpt.config import Config
from megagpt.config.schema import CheckpointConfig
from megagpt.engine.engine import Engine
from megagpt.errors import CheckpointError, MegagptError
from megagpt.parallel.parameter import shard_of
from megagpt.training.checkpointing import Checkpointer, find_checkpoint, format_bytes, load_checkpoint, open_checkpoint_folder
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
            lock = open_checkpoint_folder(CheckpointConfig(**checkpoint))
            folder, error = find_checkpoint(CheckpointConfig(**checkpoint)), ""
            if lock is not None:
                lock.release()
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


def test_a_job_that_resumed_from_a_path_and_is_started_again_continues_with_its_own_checkpoints(
    run: Path, ranks: Pool, tmp_path: Path
) -> None:
    """A requeued job repeats its command: it must not go back to the path and replace what it has saved since."""
    source, own = run / "step_00000001", tmp_path / "own"
    config = tiny_config(
        model={"n_layer": 1},
        data={"train": corpus(tmp_path)},
        training={"steps": 3, "micro_batch_size": 2, "global_batch_size": 4},
        checkpoint={"dir": str(own), "interval": 1, "resume": str(source)},
    )
    ranks.run(2, run_trainer, config)
    again = ranks.run(2, partial(find, dir=str(own), resume=str(source)))
    assert again[0][:2] == (own / "step_00000003", "")
    flip_bit(own / "step_00000003" / "rank_00000.safetensors")
    folder, _, stderr = ranks.run(2, partial(find, dir=str(own), resume=str(source)))[0]
    assert folder == own / "step_00000002" and "SHA-256 differs" in stderr


def test_a_path_outside_of_a_folder_with_other_checkpoints_is_refused(run: Path, ranks: Pool, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for folder, error, _ in ranks.run(2, partial(find, dir=str(other), resume=str(run / "step_00000001"))):
        assert folder is None and "has the checkpoints of another run (the newest is step_00000002)" in error


def test_a_run_can_be_set_back_in_its_own_folder_and_says_what_it_will_replace(run: Path, ranks: Pool) -> None:
    folder, _, stderr = ranks.run(2, partial(find, dir=str(run), resume=str(run / "step_00000001")))[0]
    assert folder == run / "step_00000001"
    assert "set back to step_00000001: this run will replace step_00000002" in stderr


def initial_config(folder: Path, seed: int, **sections: Tree) -> Config:
    training: Tree = {"steps": 3, "micro_batch_size": 2, "global_batch_size": 8, "seed": seed}
    logging: Tree = {"interval": 1, "metrics_file": str(folder / f"metrics_{len(sections)}.jsonl")}
    data: Tree = {"train": corpus(folder)}
    return tiny_config(data=data, training=training, logging=logging, **sections)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_that_is_initialized_from_weights_is_like_a_new_run_with_these_weights(
    stage: int, ranks: Pool, tmp_path: Path
) -> None:
    """The initial weights of seed 7 as a checkpoint of step 5: a run of seed 8 that starts from them equals one of seed 7.

    Moments, updates or samples that are carried over change the losses. Exact, because the layout is the same.
    """
    expected = initial_config(tmp_path, 7, zero={"stage": stage})
    weights = []
    for name, parameter in parameters_by_name(full_model(expected)).items():
        shape = shard_of(parameter).shape
        weight = parameter.detach()[: shape[0]]  # without the vocabulary's padding
        weights.append(TensorSource(name, shape, {"master": weight, "exp_avg": torch.ones_like(weight)}))
    other = {"consumed_samples": 40, "optimizer": "adamw", "optimizer_step": 5, "loss_scaler": {}}
    write_checkpoint(tmp_path / "weights", 5, weights, expected.model_dump(mode="json"), other)
    checkpoint: Tree = {"initialize_from": str(tmp_path / "weights"), "dir": str(tmp_path / "run")}
    initialized = initial_config(tmp_path, 8, zero={"stage": stage}, checkpoint=checkpoint)
    result, reference = ranks.run(2, run_trainer, initialized), ranks.run(2, run_trainer, expected)
    assert result[0]["losses"] == reference[0]["losses"] and len(result[0]["losses"]) == 3
    again = ranks.run(2, run_trainer, initialized)[0]
    assert again["step"] == 3 and len(again["losses"]) == 3  # resumed from its own checkpoint, which is complete


def test_a_run_without_a_tokenizer_keeps_the_one_of_its_initial_weights(ranks: Pool, tmp_path: Path) -> None:
    data: Tree = {"train": corpus(tmp_path)}
    training: Tree = {"steps": 1, "micro_batch_size": 2, "global_batch_size": 8}
    first = tiny_config(
        model={"vocab_size": 257},
        data={**data, "tokenizer": "byte"},
        training=training,
        checkpoint={"dir": str(tmp_path / "first")},
    )
    second = tiny_config(
        model={"vocab_size": 257},
        data=data,
        training=training,
        checkpoint={"dir": str(tmp_path / "second"), "initialize_from": str(tmp_path / "first")},
    )
    ranks.run(1, run_trainer, first)
    ranks.run(1, run_trainer, second)
    for folder in ("first", "second"):
        carried = read_manifest(resolve_checkpoint(tmp_path / folder)).tokenizer
        assert carried is not None and carried.name == "byte"


def test_a_resumed_run_takes_no_initial_weights(run: Path, ranks: Pool) -> None:
    assert ranks.run(2, partial(find, dir=str(run), initialize_from="/nowhere"))[0][0] == run / "step_00000002"


def start(config: Config) -> str:
    """Start a run; return what this rank printed, or the error."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            open_trainer(config).close()
        except MegagptError as error:
            return str(error)
    return output.getvalue()


def test_resuming_with_other_data_or_settings_says_so(run: Path, ranks: Pool, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other, copy = corpus(tmp_path / "other", documents=50), tmp_path / "copy"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{tmp_path}/corpus{suffix}", f"{copy}{suffix}")

    def output(**sections: Tree) -> str:
        training: Tree = {"steps": 9, "micro_batch_size": 2, "global_batch_size": 4, **sections.pop("training", {})}
        tree: Tree = {"model": {"n_layer": 1}, "checkpoint": {"dir": str(run)}, **sections}
        return ranks.run(1, start, tiny_config(training=training, **tree))[0]

    same = output(data={"train": str(copy)})
    assert "loaded" in same and "the training data differs" not in same
    changed = output(data={"train": other})
    assert f"data.train was {tmp_path}/corpus (60 sequences" in changed and "continues at sample 8 of this data" in changed
    assert "data.seed was 1234 and is 5" in output(data={"train": str(copy), "seed": 5})
    assert "training.seed 7 -> 8" in output(data={"train": str(copy)}, training={"seed": 8})


def start_on_own_disk(config: Config, folders: list[str]) -> str:
    original = Path.cwd()
    os.chdir(folders[dist.get_rank()])
    try:
        return start(config)
    finally:
        os.chdir(original)


def test_ranks_with_other_tokens_under_the_same_name_and_size_are_an_error(ranks: Pool, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        corpus(folder)
    content = bytearray((folders[1] / "corpus.bin").read_bytes())
    (folders[1] / "corpus.bin").write_bytes(bytes(content[2:]) + bytes(content[:2]))  # the same size, moved by one token
    training: Tree = {"steps": 1, "micro_batch_size": 2, "global_batch_size": 4}
    config = tiny_config(model={"n_layer": 1}, data={"train": "corpus"}, training=training, parallel={"tensor": 2})
    for error in ranks.run(2, start_on_own_disk, config, list(map(str, folders))):
        assert error.startswith("data.train differs: rank 0 on ") and "has another than rank 1 on" in error


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
