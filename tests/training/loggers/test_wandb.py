"""Weights & Biases: local files without a key, online only if the server answers."""

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

from megagpt.config.schema import WandbConfig
from megagpt.training.loggers.wandb import WandbLogger, wandb_mode


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


def test_without_a_key_all_metrics_and_the_config_are_written_to_local_files(offline_home: Path) -> None:
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    run_config = {"model": {"n_layer": 4}, "layout": {"tensor": 2, "pipeline": 2, "data": 2}}
    logger = WandbLogger(WandbConfig(project="proof", name="first", dir=str(offline_home)), run_config)
    logger.step(train_record(10, loss=1.5))
    logger.step(train_record(30, loss=math.nan))
    logger.step(EVALUATION)
    logger.rewind(10)
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
