"""What commands on many ranks share: the checked config, and exit codes and messages that name the rank."""

import argparse
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from support.commands import LAUNCHER_VARIABLES, config_file, records
from support.job import Job
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


def open_mpi(rank: int) -> None:
    """Replace a rank's variables by those of Open MPI."""
    _set_variables(
        {
            "OMPI_COMM_WORLD_RANK": rank,
            "OMPI_COMM_WORLD_SIZE": 2,
            "OMPI_COMM_WORLD_LOCAL_RANK": rank,
            "OMPI_COMM_WORLD_LOCAL_SIZE": 2,
        }
    )


def mpich(rank: int) -> None:
    """Replace a rank's variables by those of MPICH and Intel MPI."""
    _set_variables({"PMI_RANK": rank, "PMI_SIZE": 2, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": 2})


def torchrun_in_mpirun(rank: int) -> None:
    """Add the variables of an mpirun that has started one process, which has started the ranks."""
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PMIX_RANK")
    os.environ |= dict.fromkeys(names, "0") | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}


def _set_variables(variables: dict[str, int]) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    os.environ |= {name: str(value) for name, value in variables.items()}


@pytest.mark.parametrize("environment", [open_mpi, mpich, torchrun_in_mpirun])
def test_processes_of_mpirun_train_one_run_together(environment: Any, tmp_path: Path) -> None:
    run = Job(2, ["--config", str(config_file(tmp_path))], tmp_path / "logs", environment)
    assert run.finish(60) == [0, 0]
    assert "data 2 x pipeline 1 x context 1 x tensor 1 = 2 ranks" in run.output()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("environment", [None, open_mpi])
def test_a_config_that_rank_0_refuses_ends_all_ranks_with_one_message(environment: Any, tmp_path: Path) -> None:
    arguments = ["--config", str(config_file(tmp_path)), "--set", "training.stepz=3"]
    run = Job(2, arguments, tmp_path / "logs", environment)
    assert run.finish(60) == [2, 2]
    assert run.output().strip().endswith("training.stepz: no such key; did you mean steps?")
    assert run.output().count("error:") == 1


def test_an_error_that_all_ranks_find_is_reported_once(tmp_path: Path) -> None:
    """The folder of the checkpoints is looked at on every rank, when they are connected."""
    latest = tmp_path / "checkpoints" / "latest"
    latest.parent.mkdir()
    latest.write_text("step_00000009\n")
    config = config_file(tmp_path, checkpoint={"dir": str(latest.parent)})
    run = Job(2, ["--config", str(config)], tmp_path / "logs")
    assert run.finish(60) == [2, 2]
    assert run.output().count("error:") == 1


def test_a_slow_part_of_the_start_is_named_by_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with job.noted_if_slow(Launcher(), "checking the data"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(job, "SILENT_SECONDS", 0.0)
    for launcher, text in ((Launcher(rank=1, world_size=2), ""), (Launcher(), "checking the data\n")):
        with job.noted_if_slow(launcher, "checking the data"):
            (timer,) = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)] or [None]
            if timer is not None:
                timer.join()
        assert capsys.readouterr().err == text


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
