"""What commands on many ranks share: the checked config, and exit codes and messages that name the rank."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
from support.commands import LAUNCHER_VARIABLES, config_file
from support.runs import tiny_config

from megagpt.commands import job
from megagpt.config import build_config, load_config
from megagpt.distributed.launcher import Launcher
from megagpt.errors import ConfigError, TrainingError


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of launchers."""
    for name in [name for name in os.environ if name in LAUNCHER_VARIABLES or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def fail(error: BaseException) -> Any:
    raise error


def test_the_exit_code_is_that_of_the_work() -> None:
    assert job.run(lambda launcher: None, debug=False) == 0
    assert job.run(lambda launcher: 75, debug=False) == 75


def test_the_work_gets_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert job.run(lambda launcher: 10 + launcher.rank, debug=False) == 10
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    seen: list[Launcher] = []
    job.run(lambda launcher: seen.append(launcher), debug=False)
    assert (seen[0].rank, seen[0].world_size, seen[0].local_rank) == (3, 4, 1)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (TrainingError("step 3: the loss is nan"), 2, "error: step 3: the loss is nan"),
        (ValueError("a bug\nwith details"), 1, "error: ValueError: a bug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:1234"),
            1,
            "rank {rank} stops: another rank has ended (RuntimeError: [gloo] Connection closed by peer [10.0.0.2]:1234)",
        ),
    ],
)
def test_an_error_is_one_line_that_names_the_rank_of_a_job(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.run(lambda launcher: fail(error), debug=False) == code
    assert capsys.readouterr().err == message.format(rank=0) + "\n"
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert job.run(lambda launcher: fail(error), debug=False) == code
    assert capsys.readouterr().err == "[rank 3] " + message.format(rank=3) + "\n"


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    job.run(lambda launcher: fail(ValueError("a bug")), debug=True)
    text = capsys.readouterr().err
    assert text.startswith("Traceback") and text.endswith("error: ValueError: a bug\n")


def test_all_commands_accept_the_rank_that_launchers_append() -> None:
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    args = parser.parse_args(["--config", "c.json", "--set", "a=1", "--set", "b=2", "--local_rank=3"])
    assert (args.config, args.set) == ("c.json", ["a=1", "b=2"])


def test_a_checked_config_is_ready_to_run(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    config = job.checked_config(str(path), ["training.steps=5"], world_size=2)
    assert config.training.steps == 5
    assert config == load_config(path, ["training.steps=5"])


def test_the_vocabulary_size_comes_from_the_tokenizer(tmp_path: Path) -> None:
    config = tiny_config(model={"vocab_size": None}, data={"tokenizer": "byte"})
    assert job.with_tokenizer(config, "c.json").model.vocab_size == 257
    larger = tiny_config(model={"vocab_size": 300}, data={"tokenizer": "byte"})
    assert job.with_tokenizer(larger, "c.json") is larger
    with pytest.raises(ConfigError, match="c.json: model.vocab_size: 61 is below the 257 tokens of data.tokenizer byte"):
        job.with_tokenizer(tiny_config(data={"tokenizer": "byte"}), "c.json")
    path = config_file(tmp_path, model={"vocab_size": None})
    with pytest.raises(ConfigError, match="model.vocab_size: set it, or set data.tokenizer to take it from the tokenizer"):
        job.checked_config(str(path), [], 1)


def test_an_automatic_schedule_is_resolved_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(parallel={"pipeline": 2, "schedule": "auto"})
    resolved = job.with_schedule(config, dp_size=2)
    assert resolved.parallel.schedule != "auto"
    assert capsys.readouterr().err.startswith("parallel.schedule: ")
    fixed = build_config(resolved.model_dump(mode="json"))
    assert job.with_schedule(fixed, dp_size=2) == fixed
    assert capsys.readouterr().err == ""
