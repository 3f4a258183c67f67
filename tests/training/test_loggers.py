import io
import json
import math
import os
import struct
import sys
from pathlib import Path

import pytest

from megagpt.config.schema import LoggingConfig, WandbConfig
from megagpt.errors import ConfigError
from megagpt.training import loggers
from megagpt.training.loggers import Console, FanOut, MetricsFile, WandbLogger, build_loggers


def train_record(step: int, **changes: float) -> dict[str, float]:
    return {
        "step": step,
        "loss": 2.5,
        "learning_rate": 3e-4,
        "grad_norm": 0.75,
        "tokens": 1024 * step,
        "tokens_per_second": 20480.0,
        "step_seconds": 0.05,
        **changes,
    }


EVALUATION = {"step": 30, "eval_loss": 2.25, "eval_perplexity": math.exp(2.25)}


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_record_is_on_disk_as_soon_as_it_is_reported(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.step(train_record(1))
    metrics.step(EVALUATION)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [train_record(1), EVALUATION]


def test_nan_and_infinity_are_read_back_as_such(tmp_path: Path):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    metrics.step(train_record(1, loss=math.nan, grad_norm=math.inf))
    record = json.loads((tmp_path / "m.jsonl").read_text())
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf


def test_a_resumed_run_has_each_step_once(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    first = MetricsFile(path)
    for step in (10, 20, 30):
        first.step(train_record(step))
    first.step(EVALUATION)
    first.close()
    resumed = MetricsFile(path)
    resumed.truncate_after(20)
    resumed.step(train_record(30))
    assert steps_in(path) == [10, 20, 30]


@pytest.mark.parametrize("torn", ['{"step": 30, "lo', '{"step": 30}', '{"step": 30, "loss": Na\n', "\x00\x00\x00"])
def test_a_torn_last_line_is_repaired(tmp_path: Path, torn: str):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n' + torn)
    resumed = MetricsFile(path)
    resumed.truncate_after(40)
    resumed.step({"step": 50})
    assert steps_in(path) == [10, 20, 50]


def test_a_new_run_over_an_old_file_starts_anew_and_keeps_the_old_records_aside(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 20}\n')
    metrics = MetricsFile(path)
    metrics.truncate_after(0)
    metrics.step(train_record(1))
    assert steps_in(path) == [1]
    assert steps_in(tmp_path / "m.jsonl.previous") == [0, 20]


def test_a_file_with_other_things_in_it_is_refused_and_left_as_it_is(tmp_path: Path):
    path = tmp_path / "novel.txt"
    path.write_text("Call me Ishmael.\nSome years ago\n")
    metrics = MetricsFile(path)
    with pytest.raises(ConfigError, match=r"logging.metrics_file: .*novel.txt: line 1 is not a JSON record.*another file"):
        metrics.truncate_after(10)
    assert path.read_text() == "Call me Ishmael.\nSome years ago\n"


def test_a_metrics_file_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"logging.metrics_file: .*m.jsonl: cannot be written: "):
        MetricsFile(tmp_path / "file" / "m.jsonl")
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        MetricsFile(tmp_path)


def console_line(record: dict[str, float], total: int = 5000) -> str:
    stream = io.StringIO()
    Console(total, stream).step(record)
    return stream.getvalue()


def test_the_console_line_says_how_far_how_well_how_fast_and_how_much_longer():
    line = console_line(train_record(200, step_seconds=0.9))
    assert line == (
        "step  200/5000 | loss 2.5000 | lr 3.000e-04 | grad norm 0.750 | 20,480 tokens/s | 0.900 s/step | 1:12:00 left\n"
    )


def test_the_console_line_of_an_evaluation_has_loss_and_perplexity():
    assert console_line(EVALUATION) == "step   30/5000 | eval loss 2.2500 | perplexity 9.49\n"


def test_the_console_line_of_the_test_split_says_so():
    line = console_line({"step": 30, "test_loss": 2.25, "test_perplexity": math.exp(2.25)})
    assert line == "step   30/5000 | test loss 2.2500 | perplexity 9.49\n"


def test_a_nan_loss_is_printed_as_nan():
    assert "| loss nan |" in console_line(train_record(1, loss=math.nan, grad_norm=math.nan))
    assert "eval loss nan | perplexity nan" in console_line({"step": 1, "eval_loss": math.nan, "eval_perplexity": math.nan})


def test_an_unknown_speed_leaves_the_time_left_open():
    assert console_line(train_record(1, step_seconds=math.inf)).endswith("| ? left\n")


def test_all_that_is_asked_for_is_built_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    logger = build_loggers(LoggingConfig(metrics_file=str(path)), 9, {}, start_step=1)
    logger.step(train_record(2))
    logger.close()
    assert steps_in(path) == [1, 2]
    assert capsys.readouterr().out.startswith("step 2/9 | loss 2.5000")


def test_no_logger_at_all_is_silent(capsys: pytest.CaptureFixture[str]):
    FanOut().step(train_record(1))
    FanOut().close()
    assert capsys.readouterr().out == ""


@pytest.fixture
def offline_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without keys and without wandb's own variables, so that neither the machine nor `make test` decides."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind.lower()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wandb_records(path: Path) -> list[bytes]:
    """The payloads of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    data, records, part, position = path.read_bytes(), [], b"", 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            records.append(part)
            part = b""
    return records


def test_wandb_without_a_key_writes_all_metrics_and_the_config_to_local_files(offline_home: Path):
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    run_config = {"model": {"n_layer": 4}, "layout": {"tensor": 2, "pipeline": 2, "data": 2}}
    logger = WandbLogger(WandbConfig(project="proof", name="first", dir=str(offline_home)), run_config)
    logger.step(train_record(10, loss=1.5))
    logger.step(train_record(30, loss=math.nan))
    logger.step(EVALUATION)
    logger.close()
    (path,) = offline_home.glob("wandb/offline-run-*/*.wandb")
    rows, config, project = [], {}, None
    for payload in wandb_records(path):
        record = pb.Record.FromString(payload)
        if record.HasField("history"):
            rows.append({(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item})
        elif record.HasField("run"):
            project = (record.run.project, record.run.display_name)
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert project == ("proof", "first")
    assert {key: config[key] for key in run_config} == run_config
    by_step = {row["_step"]: row for row in rows}
    assert by_step[10].items() >= {"loss": 1.5, "learning_rate": 3e-4, "tokens_per_second": 20480.0, "tokens": 10240}.items()
    assert by_step[30]["loss"] in ("NaN", None) or math.isnan(by_step[30]["loss"])
    assert by_step[30]["eval_loss"] == 2.25


class FakeSettings:
    base_url, api_key = "https://wandb.invalid", None


def test_wandb_goes_online_only_with_a_key_and_a_reachable_server(offline_home: Path, monkeypatch: pytest.MonkeyPatch):
    with_key = FakeSettings()
    with_key.api_key = "0" * 40
    monkeypatch.setattr(loggers, "_reachable", lambda url: True)
    assert loggers._wandb_mode(with_key) == "online"
    assert loggers._wandb_mode(FakeSettings()) == "offline"
    (offline_home / "home").mkdir(exist_ok=True)
    netrc = offline_home / "home" / ".netrc"
    netrc.write_text("machine wandb.invalid login user password 0\n")
    netrc.chmod(0o600)
    assert loggers._wandb_mode(FakeSettings()) == "online"
    monkeypatch.setattr(loggers, "_reachable", lambda url: False)
    assert loggers._wandb_mode(with_key) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert loggers._wandb_mode(with_key) is None


def test_a_server_that_does_not_answer_is_not_reachable():
    assert not loggers._reachable("http://127.0.0.1:9")


def test_wandb_that_is_not_installed_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging.wandb.project: needs the wandb package; pip install wandb"):
        build_loggers(LoggingConfig(wandb=WandbConfig(project="x")), 1, {})
