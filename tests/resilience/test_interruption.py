"""Signals and the time limit: the run saves after the current step, exits with 75, and resumes as if undisturbed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.commands import config_file, records
from support.job import Job

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.load import CheckpointReader
from megagpt.config import load_config
from megagpt.errors import ConfigError
from megagpt.resilience.interruption import LAUNCHER_ENDED, REQUEUE, Interruption, exit_code

ENDLESS = 1_000_000
"""Steps that no test waits for."""


def slow_forwards(rank: int) -> None:
    """Make each step at least 0.1 s long (two micro-batches per rank), so that there is time to interrupt a short run."""
    from megagpt.model.gpt import GPTChunk

    def wait(module: torch.nn.Module, args: object) -> None:
        if isinstance(module, GPTChunk):
            time.sleep(0.05)

    torch.nn.modules.module.register_module_forward_pre_hook(wait)


def start(folder: Path, steps: int, logs: str = "logs", **sections: dict[str, object]) -> Job:
    """Start a run of two data-parallel ranks with ZeRO-1."""
    folder.mkdir(exist_ok=True)
    checkpoint = {"dir": str(folder / "checkpoints"), **sections.pop("checkpoint", {})}
    config = config_file(folder, training={"steps": steps, **sections.pop("training", {})}, checkpoint=checkpoint, **sections)
    return Job(2, ["--config", str(config)], folder / logs, slow_forwards)


def saved_tensors(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Return every tensor of the newest checkpoint."""
    reader = CheckpointReader(folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip())
    return {
        (state, name): reader.read(state, name, Box.full(tuple(record.shape)))
        for name, record in reader.manifest.tensors.items()
        for state in record.kinds
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 12 steps without an interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder, 12).finish(60) == [0, 0]
    return folder


@pytest.mark.parametrize(("number", "receivers"), [(signal.SIGTERM, [0, 1]), (signal.SIGUSR1, [1])])
def test_a_run_that_a_signal_stopped_resumes_bit_for_bit(
    number: signal.Signals, receivers: list[int], undisturbed: Path, tmp_path: Path
) -> None:
    job = start(tmp_path, 12)
    job.wait_for("step  4/12")
    job.send(number, receivers)
    assert job.finish(60) == [REQUEUE, REQUEUE]
    assert "with exit code 75; start again to resume from this step" in job.output()
    step = int((tmp_path / "checkpoints" / "latest").read_text().strip()[5:])
    assert 4 <= step < 12
    again = start(tmp_path, 12, "again")
    assert again.finish(60) == [0, 0]
    assert f"step_{step:08d}: step {step}, sample {step * 8};" in again.output()
    expected, resumed = saved_tensors(undisturbed), saved_tensors(tmp_path)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 13))
    assert [record["loss"] for record in records(tmp_path)] == [record["loss"] for record in records(undisturbed)]


def test_the_time_limit_stops_a_run_like_a_signal(tmp_path: Path) -> None:
    begin = time.monotonic()
    job = start(tmp_path, ENDLESS, training={"max_hours": 4 / 3600})
    assert job.finish(60) == [REQUEUE, REQUEUE]
    assert time.monotonic() - begin > 4
    assert "stopping early (training.max_hours 0.00111111) with exit code 75" in job.output()
    assert (tmp_path / "checkpoints" / "latest").exists()


def test_a_second_signal_ends_a_rank_immediately_even_in_a_collective_that_never_returns(tmp_path: Path) -> None:
    job = start(tmp_path, ENDLESS)
    job.wait_for("step       2/")
    job.send(signal.SIGSTOP, [1])
    job.ranks[0].join(1)  # by now it waits for rank 1
    job.send(signal.SIGTERM, [0])
    job.ranks[0].join(1)
    assert job.ranks[0].is_alive()
    job.send(signal.SIGTERM, [0])
    job.ranks[0].join(5)
    assert job.ranks[0].exitcode == 128 + signal.SIGTERM
    assert "SIGTERM again: exiting immediately" in job.output()
    job.send(signal.SIGKILL, [1])
    job.finish(10)


def test_without_a_checkpoint_folder_nothing_is_saved_and_the_exit_code_is_that_of_the_signal(tmp_path: Path) -> None:
    job = start(tmp_path, ENDLESS, checkpoint={"dir": None})
    job.wait_for("step       2/")
    job.send(signal.SIGTERM)
    assert job.finish(60) == [128 + signal.SIGTERM] * 2
    assert "nothing is saved, because checkpoint.dir is not set" in job.output()


def test_a_time_limit_without_a_checkpoint_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training.max_hours: saves when the time is over, but checkpoint.dir is not set"):
        load_config(config_file(tmp_path), ["training.max_hours=1"])


def test_the_time_limit_counts_from_the_start_time() -> None:
    with Interruption(max_hours=1.0, start_time=time.monotonic()) as interruption:
        assert interruption.reason is None
    with Interruption(max_hours=1.0, start_time=time.monotonic() - 3601) as interruption:
        assert interruption.reason == "training.max_hours 1"


def test_signals_in_quick_succession_count_as_one_request(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(None, 0.0) as interruption:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + 5
        while interruption.reason is None and time.monotonic() < end:
            time.sleep(0.01)
        assert interruption.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("reasons", "saved", "code"),
    [
        ([None, "SIGTERM"], True, REQUEUE),
        (["SIGHUP", "SIGHUP"], True, REQUEUE),
        (["training.max_hours 1", None], True, REQUEUE),
        ([LAUNCHER_ENDED, LAUNCHER_ENDED], True, REQUEUE),
        (["SIGINT", None], True, 130),
        (["SIGTERM", "SIGINT"], True, 130),
        (["SIGINT", "SIGINT"], False, 130),
        ([None, "SIGTERM"], False, 143),
        (["SIGUSR1", None], False, 128 + signal.SIGUSR1),
        ([LAUNCHER_ENDED], False, 1),
    ],
)
def test_the_exit_code_asks_for_a_new_start_only_if_the_state_is_saved_and_nobody_pressed_ctrl_c(
    reasons: list[str | None], saved: bool, code: int
) -> None:
    assert exit_code(reasons, saved) == code


def test_signals_after_the_state_is_saved_do_not_change_the_exit_code() -> None:
    program = (
        "import os, signal, sys, time\n"
        "from megagpt.resilience.interruption import REQUEUE, Interruption\n"
        "with Interruption(None, 0.0) as interruption:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    while interruption.reason is None: time.sleep(0.01)\n"
        "    interruption.leave()\n"
        "    time.sleep(0.6)\n"  # longer than the time in which signals count as one
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.1)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.1)\n"
        "sys.exit(REQUEUE)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=30).returncode == REQUEUE
