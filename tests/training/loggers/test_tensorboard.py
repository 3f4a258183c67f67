"""TensorBoard's own reader finds each metric once per step."""

import math
from pathlib import Path

import pytest
from support.records import EVALUATION, train_record

from megagpt.errors import ConfigError
from megagpt.training.loggers.tensorboard import TensorBoardLogger, tag

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of all scalars that TensorBoard would show."""
    reader = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_all_numbers_of_a_record_are_in_the_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    logger.step({**train_record(10, loss=1.5, mfu=0.25), "time": "2026-11-27T12:31:07.250+00:00"})
    logger.step({**EVALUATION, "test_loss": 3.0, "peak_memory_gib": None})
    found = scalars(tmp_path)
    assert found["train/loss"] == [(10, 1.5)]
    assert found["train/mfu"] == [(10, 0.25)]
    assert found["eval/loss"] == [(30, 2.25)]
    assert found["test/loss"] == [(30, 3.0)]
    expected = {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "tokens_per_second_per_device"}
    training = {f"train/{name}" for name in expected | {"step_seconds", "mfu"}}
    assert found.keys() == training | {"eval/loss", "eval/perplexity", "test/loss"}


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    first = TensorBoardLogger(str(tmp_path))
    for step in (10, 20, 30):
        first.step(train_record(step, loss=1.0))
    first.close()
    second = TensorBoardLogger(str(tmp_path), start_step=10)
    for step in (20, 30, 40):
        second.step(train_record(step, loss=2.0))
    second.close()
    assert scalars(tmp_path)["train/loss"] == [(10, 1.0), (20, 2.0), (30, 2.0), (40, 2.0)]


def test_a_rollback_has_each_step_once(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    for step in (1, 2, 3):
        logger.step(train_record(step, loss=1.0))
    logger.rewind(1)
    logger.step(train_record(2, loss=2.0))
    logger.close()
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0)]


def test_a_nan_stays_a_nan(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    logger.step(train_record(1, loss=math.nan, grad_norm=math.inf))
    logger.close()
    found = scalars(tmp_path)
    assert math.isnan(found["train/loss"][0][1]) and found["train/grad_norm"] == [(1, math.inf)]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"logging.tensorboard.dir: .*file/events: cannot be written: "):
        TensorBoardLogger(str(tmp_path / "file" / "events"))


def test_only_the_splits_are_groups_of_their_own() -> None:
    names = ("loss", "eval_loss", "test_perplexity", "tokens_per_second", "evaluation_x")
    assert [tag(name) for name in names] == [
        "train/loss",
        "eval/loss",
        "test/perplexity",
        "train/tokens_per_second",
        "train/evaluation_x",
    ]
