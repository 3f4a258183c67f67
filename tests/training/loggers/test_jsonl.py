"""The metrics file has each step once, loses no record, and a full disk under it does not end the run."""

import json
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.records import EVALUATION, steps_in, train_record

from megagpt.errors import ConfigError
from megagpt.training.loggers.jsonl import MAX_UNWRITTEN, JsonlLogger, to_json_line


def strict_json(line: str) -> Any:
    """Parse a line as parsers do that know no NaN."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


@contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond `n_bytes`. The kernel writes as much as fits, then refuses, like a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_record_is_in_the_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.step(train_record(1))
    logger.step(EVALUATION)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [train_record(1), EVALUATION]


def test_nan_and_infinity_are_null_and_a_text_so_that_each_line_is_strict_json(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "m.jsonl")
    logger.step(train_record(1, loss=math.nan, grad_norm=math.inf, noise_scale=-math.inf))
    record = strict_json((tmp_path / "m.jsonl").read_text())
    assert (record["loss"], record["loss_text"]) == (None, "nan")
    assert (record["grad_norm"], record["grad_norm_text"]) == (None, "inf")
    assert (record["noise_scale"], record["noise_scale_text"]) == (None, "-inf")
    assert record["learning_rate"] == 3e-4 and "learning_rate_text" not in record


def test_a_resumed_run_has_each_step_once_and_reports_what_it_removes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.jsonl"
    first = JsonlLogger(path)
    for step in (10, 20, 30):
        first.step(train_record(step))
    first.step(EVALUATION)
    first.close()
    resumed = JsonlLogger(path, start_step=20)
    assert capsys.readouterr().out == (
        f"logging.metrics_file: {path}: 2 records after step 20 removed; these steps run again\n"
    )
    resumed.step(train_record(30))
    assert steps_in(path) == [10, 20, 30]


def test_a_run_that_resumes_after_its_last_record_reports_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.jsonl"
    JsonlLogger(path).step(train_record(10))
    JsonlLogger(path, start_step=12).step(train_record(20))
    assert steps_in(path) == [10, 20]
    assert capsys.readouterr().out == ""


def test_a_rollback_removes_the_records_after_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.jsonl"
    logger = JsonlLogger(path)
    for step in (1, 2, 3):
        logger.step(train_record(step))
    logger.rewind(2)
    assert "1 records after step 2 removed" in capsys.readouterr().out
    logger.step(train_record(3, loss=1.0))
    assert steps_in(path) == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 1.0


@pytest.mark.parametrize("torn", ['{"step": 30, "lo', '{"st', "{", '{"step": 30}', '{"step": 30, "loss": Na\n', "\x00\x00\x00"])
def test_an_incomplete_last_record_is_removed(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n' + torn)
    resumed = JsonlLogger(path, start_step=40)
    resumed.step({"step": 50})
    assert steps_in(path) == [10, 20, 50]


def test_a_run_from_scratch_keeps_the_records_of_all_earlier_runs_in_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.jsonl"
    (tmp_path / "m.jsonl.2").write_text("somebody's file\n")
    for run in range(3):
        logger = JsonlLogger(path)
        for step in range(1, 3 + run):
            logger.step(train_record(step))
    assert [steps_in(tmp_path / name) for name in ("m.jsonl.1", "m.jsonl.3", "m.jsonl")] == [[1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert (tmp_path / "m.jsonl.2").read_text() == "somebody's file\n"
    assert capsys.readouterr().out == "".join(
        f"logging.metrics_file: {path}: the {n} records of an earlier run are now in {path}.{number}\n"
        for n, number in ((2, 1), (3, 3))
    )


def test_even_an_incomplete_record_is_kept_by_a_run_from_scratch(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 5, "note": "one line without a line end"}')
    JsonlLogger(path).step(train_record(1))
    assert steps_in(path) == [1]
    assert (tmp_path / "m.jsonl.1").read_text() == '{"step": 5, "note": "one line without a line end"}'


def test_records_of_several_runs_in_one_file_are_kept_when_a_run_resumes(tmp_path: Path) -> None:
    """A cut at the resume step would drop records of the second run."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 10}\n{"step": 90}\n{"step": 10}\n')
    JsonlLogger(path, start_step=20).step(train_record(30))
    assert steps_in(path) == [30]
    assert steps_in(tmp_path / "m.jsonl.1") == [10, 90, 10]


@pytest.mark.parametrize("start_step", [0, 1])
def test_a_symbolic_link_stays_and_its_target_gets_the_records(tmp_path: Path, start_step: int) -> None:
    target, link = tmp_path / "disk" / "m.jsonl", tmp_path / "m.jsonl"
    target.parent.mkdir()
    target.write_text('{"step": 1}\n{"step": 2}\n')
    link.symlink_to(target)
    JsonlLogger(link, start_step).step({"step": 2, "loss": 1.0})
    assert link.is_symlink() and not target.is_symlink()
    assert steps_in(target) == [2] if start_step == 0 else [1, 2]
    assert (tmp_path / "disk" / "m.jsonl.1").exists() == (start_step == 0)


def test_a_symbolic_link_to_a_file_that_does_not_exist_creates_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").symlink_to(tmp_path / "disk" / "m.jsonl")
    JsonlLogger(tmp_path / "m.jsonl").step(train_record(1))
    assert steps_in(tmp_path / "disk" / "m.jsonl") == [1]
    assert (tmp_path / "m.jsonl").is_symlink()


def test_resuming_keeps_the_permissions_and_other_names_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    path.chmod(0o640)
    os.link(path, tmp_path / "other.jsonl")
    JsonlLogger(path, start_step=1).step({"step": 2})
    assert path.stat().st_mode & 0o777 == 0o640
    assert steps_in(tmp_path / "other.jsonl") == [1, 2]


OTHER_CONTENTS = {
    "novel": "Call me Ishmael.\nSome years ago\n",
    "note without a line end": "my only notes",
    "config in one line": '{"model": {"n_layer": 2}}',
    "config in many lines": '{\n  "model": {"n_layer": 2}\n}\n',
    "records, then something else": '{"step": 1}\nthe end',
    "records of something else": '{"iteration": 1}\n{"iteration": 2}\n',
    "a step that is no number": '{"step": true}\n',
    "a nested list": "[" * 100_000 + "\n",
    "zeros": "\0" * 100,
}


@pytest.mark.parametrize("start_step", [0, 10])
@pytest.mark.parametrize("content", OTHER_CONTENTS.values(), ids=OTHER_CONTENTS.keys())
def test_a_file_with_other_content_is_refused_and_not_changed(tmp_path: Path, content: str, start_step: int) -> None:
    path = tmp_path / "other.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"logging.metrics_file: .*other.txt: line \d is not a JSON record.*another file"):
        JsonlLogger(path, start_step)
    assert path.read_text() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["other.txt"]


def test_a_large_file_without_line_ends_is_refused_without_reading_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b'{"step": 1}\n{"step": 2')
        file.truncate(2**40)
    with pytest.raises(ConfigError, match="sparse: line 2 is not a JSON record"):
        JsonlLogger(path, start_step=1)
    assert path.stat().st_size == 2**40


def test_a_metrics_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in (("file/m.jsonl", "Not a directory"), ("loop", "Too many levels of symbolic links")):
        with pytest.raises(ConfigError, match=rf"logging.metrics_file: .*{name}: cannot be written: {message}"):
            JsonlLogger(tmp_path / name)


def test_a_full_disk_is_one_warning_and_the_records_are_written_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.jsonl"
    logger = JsonlLogger(path)
    logger.step(train_record(1))
    with full_disk(path.stat().st_size + 20):
        for step in (2, 3, 4):
            logger.step(train_record(step))
        assert steps_in(path) == [1], "an incomplete line is in the file"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: logging.metrics_file: {path}: cannot be written: File too large; training cont")
    logger.step(train_record(5))
    assert [strict_json(line) for line in path.read_text().splitlines()] == [train_record(step) for step in range(1, 6)]
    assert f"logging.metrics_file: {path}: written again, 4 records at once" in capsys.readouterr().out
    with full_disk(path.stat().st_size):
        logger.step(train_record(6))
    assert len(capsys.readouterr().err.splitlines()) == 1, "a second full disk is reported, too"
    logger.close()
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]


def test_a_rollback_on_a_full_disk_leaves_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    logger = JsonlLogger(path)
    for step in (1, 2, 3):
        logger.step(train_record(step))
    with full_disk(path.stat().st_size):
        for step in (4, 5):
            logger.step(train_record(step))
        logger.rewind(2)
        logger.step(train_record(3, loss=1.0))
    logger.step(train_record(4, loss=1.0))
    assert steps_in(path) == [1, 2, 3, 4]
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [2.5, 2.5, 1.0, 1.0]


def test_records_that_never_fit_are_counted_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = JsonlLogger(tmp_path / "m.jsonl")
    with full_disk(0):
        for step in range(1, MAX_UNWRITTEN + 8):
            logger.step({"step": step})
        logger.close()
        assert f"m.jsonl: {MAX_UNWRITTEN + 7} records could not be written" in capsys.readouterr().err
    logger.close()
    assert "7 of the oldest are lost" in capsys.readouterr().out
    assert steps_in(tmp_path / "m.jsonl") == list(range(8, MAX_UNWRITTEN + 8))


def test_a_folder_that_is_gone_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs" / "m.jsonl"
    logger = JsonlLogger(path)
    logger.step(train_record(1))
    path.unlink()
    path.parent.rmdir()
    logger.step(train_record(2))
    logger.rewind(1)
    logger.step(train_record(2))
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
    path.parent.mkdir()
    logger.step(train_record(3))
    assert steps_in(path) == [2, 3]


def test_a_record_is_one_line() -> None:
    assert to_json_line({"step": 3, "loss": 2.5, "time": "2026-11-27T02:28:05.245+00:00"}) == (
        b'{"step": 3, "loss": 2.5, "time": "2026-11-27T02:28:05.245+00:00"}\n'
    )
