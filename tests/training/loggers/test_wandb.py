"""Weights & Biases: local files without a key, online only if the server answers, one run per training run."""

import json
import math
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.records import EVALUATION, train_record
from support.runs import Tree

from megagpt.config.schema import WandbConfig
from megagpt.errors import ConfigError
from megagpt.training.loggers.wandb import WandbLogger, wandb_mode
from megagpt.training.loggers.wandb_run_id import read_run_id, write_run_id

RUN_CONFIG = {"model": {"n_layer": 4}, "layout": {"tensor": 2, "pipeline": 2, "data": 2}}


@pytest.fixture
def offline_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without keys, and no variables of wandb or proxies, so that the machine has no effect."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind.lower()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wandb_records(path: Path) -> list[bytes]:
    """Return the payloads of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    data, payloads, payload, position = path.read_bytes(), [], b"", 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last fragment of one
            payloads.append(payload)
            payload = b""
    return payloads


class Recorded:
    """What the offline files of a start contain."""

    def __init__(self, path: Path) -> None:
        pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
        self.rows: list[Tree] = []
        self.config: Tree = {}
        self.x_axes: dict[str, str] = {}
        for payload in wandb_records(path):
            record = pb.Record.FromString(payload)
            if record.HasField("history"):
                values = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
                self.rows.append(values)
            elif record.HasField("run"):
                self.id, self.project, self.name = record.run.run_id, record.run.project, record.run.display_name
                self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("metric"):
                self.x_axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            elif record.HasField("exit"):
                self.exit_code = record.exit.exit_code


def recorded(folder: Path) -> list[Recorded]:
    """Return what each start in a folder has written, in order."""
    return [
        Recorded(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    ]


def start(folder: Path, start_step: int = 0, checkpoints: Path | None = None, **config: str) -> WandbLogger:
    return WandbLogger(WandbConfig(project="proof", dir=str(folder), **config), RUN_CONFIG, checkpoints, start_step)


def test_without_a_key_all_metrics_and_the_config_are_written_to_local_files(offline_home: Path) -> None:
    logger = start(offline_home, name="first")
    logger.step({**train_record(10, loss=1.5), "time": "2026-11-27T02:28:05.245+00:00"})
    logger.step(train_record(30, loss=math.nan))
    logger.step(EVALUATION)
    logger.close()
    (run,) = recorded(offline_home)
    assert (run.project, run.name, run.exit_code) == ("proof", "first", 0)
    assert {key: run.config[key] for key in RUN_CONFIG} == RUN_CONFIG
    first, second, evaluation = run.rows
    assert first.items() >= {**train_record(10, loss=1.5), "time": "2026-11-27T02:28:05.245+00:00"}.items()
    assert second["step"] == 30 and (second["loss"] in ("NaN", None) or math.isnan(second["loss"]))
    assert evaluation.items() >= EVALUATION.items()


def test_steps_that_run_again_are_logged_again_over_an_x_axis_of_steps(offline_home: Path) -> None:
    """W&B drops a row whose own step is not above the last one, so its own steps must grow."""
    logger = start(offline_home)
    for step in (1, 2, 3):
        logger.step(train_record(step))
    logger.rewind(1)
    logger.step(train_record(2, loss=1.0))
    logger.close()
    (run,) = recorded(offline_home)
    assert [row["step"] for row in run.rows] == [1, 2, 3, 2]
    own_steps = [row["_step"] for row in run.rows]
    assert own_steps == sorted(set(own_steps))
    assert run.x_axes["*"] == "step"


def test_a_run_that_resumes_from_its_checkpoints_is_the_same_run(offline_home: Path) -> None:
    checkpoints = offline_home / "checkpoints"
    for start_step in (0, 10, 20, 0):
        logger = start(offline_home, start_step, checkpoints)
        logger.step(train_record(start_step + 10))
        logger.close()
    ids = [run.id for run in recorded(offline_home)]
    assert ids[0] == ids[1] == ids[2]
    assert ids[3] != ids[0], "a run from scratch is another run"
    assert (checkpoints / "wandb_run_id").read_text().strip() == ids[3]


def test_without_a_folder_of_checkpoints_each_start_is_a_new_run(offline_home: Path) -> None:
    for start_step in (0, 10):
        start(offline_home, start_step).close()
    assert len({run.id for run in recorded(offline_home)}) == 2


def test_the_users_own_id_has_priority(offline_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (offline_home / "wandb_run_id").write_text("kept\n")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    start(offline_home, 10, offline_home).close()
    assert [run.id for run in recorded(offline_home)] == ["mine"]


@pytest.mark.parametrize("content", ["", "two words", "x" * 1000, "../../etc"])
def test_a_damaged_id_is_a_warning_and_a_new_run(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wandb_run_id").write_text(content)
    assert read_run_id(tmp_path) is None
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path / 'wandb_run_id'}: ")


def test_an_id_that_cannot_be_kept_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    write_run_id(tmp_path / "file", "ab12")
    assert "the next start will be another run in Weights & Biases" in capsys.readouterr().err
    write_run_id(tmp_path, "ab12")
    assert read_run_id(tmp_path) == "ab12"


def test_a_run_that_ends_by_an_error_is_complete_and_counts_as_failed(offline_home: Path) -> None:
    logger = start(offline_home)
    logger.step(train_record(1, loss=math.nan))
    try:
        raise ValueError("the loss is nan")
    except ValueError:
        logger.close()
    (run,) = recorded(offline_home)
    assert run.exit_code == 1 and [row["step"] for row in run.rows] == [1]


def test_a_run_that_wandb_refuses_is_an_error_of_the_key(offline_home: Path) -> None:
    (offline_home / "wandb_run_id").write_text("kept\n")
    with pytest.raises(
        ConfigError, match=r"logging.wandb.project: a/b: Weights & Biases refuses the run: .*remove .*wandb_run_id"
    ):
        WandbLogger(WandbConfig.model_construct(project="a/b", name=None, dir=None), {}, offline_home, 10)


@dataclass
class Settings:
    """The settings of wandb that decide about the mode."""

    base_url: str
    api_key: str | None = None


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A socket on this machine that accepts connections until it is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def address(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_wandb_is_online_only_with_a_key_and_a_server_that_answers(offline_home: Path, server: socket.socket) -> None:
    with_key = Settings(f"http://{address(server)}", api_key="0" * 40)
    without_key = Settings(f"http://{address(server)}")
    assert wandb_mode(with_key) == "online"
    assert wandb_mode(without_key) == "offline"
    server.close()
    assert wandb_mode(with_key) == "offline"


def test_a_key_in_the_netrc_file_counts(offline_home: Path, server: socket.socket) -> None:
    (offline_home / "home").mkdir()
    netrc = offline_home / "home" / ".netrc"
    netrc.write_text(f"machine {address(server)} login user password 0\n")
    netrc.chmod(0o600)
    assert wandb_mode(Settings(f"http://{address(server)}")) == "online"
    assert wandb_mode(Settings("http://wandb.invalid")) == "offline"


def test_behind_a_proxy_the_proxy_must_answer(
    offline_home: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://{address(server)}")
    assert wandb_mode(Settings("https://wandb.invalid", api_key="0" * 40)) == "online"
    server.close()
    assert wandb_mode(Settings("https://wandb.invalid", api_key="0" * 40)) == "offline"


def test_the_users_own_mode_has_priority(offline_home: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(Settings(f"http://{address(server)}", api_key="0" * 40)) is None
