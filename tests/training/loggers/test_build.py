"""The loggers of a config."""

import sys
from pathlib import Path

import pytest
from support.records import steps_in, train_record

from megagpt.config.schema import LoggingConfig, WandbConfig
from megagpt.errors import ConfigError
from megagpt.training.loggers.build import build_loggers


def test_the_loggers_of_the_config_are_built_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    logger = build_loggers(LoggingConfig(metrics_file=str(path)), 9, {}, start_step=1)
    logger.step(train_record(2))
    logger.close()
    assert steps_in(path) == [1, 2]
    assert capsys.readouterr().out.startswith("step 2/9 | loss 2.5000")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


def test_without_any_key_a_run_only_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    build_loggers(LoggingConfig(), 9, {}).step(train_record(2))
    assert capsys.readouterr().out.startswith("step 2/9 | loss 2.5000")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wandb_package_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging.wandb.project: needs the wandb package; install it \(pip install wandb\)"):
        build_loggers(LoggingConfig(wandb=WandbConfig(project="x")), 1, {})
