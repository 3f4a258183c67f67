"""The metrics file has each step once, whatever happened to the runs that wrote it."""

import json
import math
from pathlib import Path

import pytest
from support.records import EVALUATION, steps_in, train_record

from megagpt.errors import ConfigError
from megagpt.training.loggers.jsonl import JsonlLogger


def test_a_record_is_in_the_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.step(train_record(1))
    logger.step(EVALUATION)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [train_record(1), EVALUATION]


def test_nan_and_infinity_are_read_back_unchanged(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "m.jsonl")
    logger.step(train_record(1, loss=math.nan, grad_norm=math.inf))
    record = json.loads((tmp_path / "m.jsonl").read_text())
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first = JsonlLogger(path)
    for step in (10, 20, 30):
        first.step(train_record(step))
    first.step(EVALUATION)
    first.close()
    resumed = JsonlLogger(path)
    resumed.truncate_after(20)
    resumed.step(train_record(30))
    assert steps_in(path) == [10, 20, 30]


def test_a_rollback_drops_the_records_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    logger = JsonlLogger(path)
    for step in (1, 2, 3):
        logger.step(train_record(step))
    logger.rewind(2)
    logger.step(train_record(3, loss=1.0))
    assert steps_in(path) == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 1.0


@pytest.mark.parametrize("torn", ['{"step": 30, "lo', '{"step": 30}', '{"step": 30, "loss": Na\n', "\x00\x00\x00"])
def test_an_incomplete_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n' + torn)
    resumed = JsonlLogger(path)
    resumed.truncate_after(40)
    resumed.step({"step": 50})
    assert steps_in(path) == [10, 20, 50]


def test_a_run_from_scratch_saves_the_records_of_an_earlier_run_in_another_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 20}\n')
    logger = JsonlLogger(path)
    logger.truncate_after(0)
    logger.step(train_record(1))
    assert steps_in(path) == [1]
    assert steps_in(tmp_path / "m.jsonl.previous") == [0, 20]


def test_a_file_with_other_content_is_refused_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("Call me Ishmael.\nSome years ago\n")
    logger = JsonlLogger(path)
    with pytest.raises(ConfigError, match=r"logging.metrics_file: .*novel.txt: line 1 is not a JSON record.*another file"):
        logger.truncate_after(10)
    assert path.read_text() == "Call me Ishmael.\nSome years ago\n"


def test_a_metrics_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"logging.metrics_file: .*m.jsonl: cannot be written: "):
        JsonlLogger(tmp_path / "file" / "m.jsonl")
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        JsonlLogger(tmp_path)
