"""The loggers of a config."""

from pathlib import Path

import pytest
import torch
from support.records import steps_in, train_record
from support.runs import Tree, tiny_config

from megagpt.errors import ConfigError
from megagpt.parallel.topology import Layout
from megagpt.training.loggers.base import Logger
from megagpt.training.loggers.build import build_loggers

CPU = torch.device("cpu")


def build(logging: Tree, start_step: int = 0) -> Logger:
    return build_loggers(tiny_config(logging=logging), Layout(), CPU, start_step, total_steps=9)


def test_the_loggers_of_the_config_are_built_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    logger = build({"metrics_file": str(path)}, start_step=1)
    logger.step(train_record(2))
    logger.close()
    assert steps_in(path) == [1, 2]
    assert " step 2/9 | loss 2.5000" in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


def test_tensorboard_is_built_with_the_step_of_the_start(tmp_path: Path) -> None:
    for start_step in (0, 2):
        logger = build({"tensorboard": {"dir": str(tmp_path / "events")}}, start_step)
        logger.step(train_record(start_step + 1))
        logger.close()
    assert len(list(tmp_path.glob("events/events.out.tfevents.*"))) == 2


def test_without_any_key_a_run_only_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    build({}).step(train_record(2))
    assert " step 2/9 | loss 2.5000" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_loggers_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"logging.metrics_file: .*latest is a name that checkpoints use"):
        config = tiny_config(logging={"metrics_file": str(tmp_path / "latest")}, checkpoint={"dir": str(tmp_path)})
        build_loggers(config, Layout(), CPU, start_step=0, total_steps=9)
