"""Signals and the time limit: the run saves after the current step, exits with 75, and resumes as if undisturbed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.commands import config_file, records
from support.job import Job
from support.runs import corpus

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


def start(
    folder: Path,
    steps: int,
    logs: str = "logs",
    before: Callable[[int], None] = slow_forwards,
    **sections: dict[str, object],
) -> Job:
    """Start a run of two data-parallel ranks with ZeRO-1."""
    folder.mkdir(exist_ok=True)
    checkpoint = {"dir": str(folder / "checkpoints"), **sections.pop("checkpoint", {})}
    config = config_file(folder, training={"steps": steps, **sections.pop("training", {})}, checkpoint=checkpoint, **sections)
    return Job(2, ["--config", str(config)], folder / logs, before)


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, REQUEUE)])
def test_ctrl_c_and_the_end_of_the_terminal_save_the_run(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """A terminal sends them to all ranks; only the ranks' own exit code says whether to start again."""
    job = start(tmp_path, ENDLESS)
    job.wait_for("step       2/")
    job.send(number)
    assert job.finish(60) == [code, code]
    assert job.output().count(f"{number.name}: stopping after the current step") == 1
    assert (tmp_path / "checkpoints" / "latest").exists()


def slow_evaluation(rank: int) -> None:
    """Make each batch of an evaluation at least 0.4 s long (two micro-batches per rank)."""
    from megagpt.model.gpt import GPTChunk

    def wait(module: torch.nn.Module, args: object) -> None:
        if isinstance(module, GPTChunk) and not module.training:
            time.sleep(0.2)

    torch.nn.modules.module.register_module_forward_pre_hook(wait)


def test_a_signal_in_an_evaluation_abandons_it_and_saves(tmp_path: Path) -> None:
    """The corpus has 119 samples: 15 batches, at least 6 s."""
    job = start(
        tmp_path, ENDLESS, before=slow_evaluation, data={"valid": corpus(tmp_path / "valid")}, evaluation={"interval": 1}
    )
    job.wait_for("step       1/")
    job.send(signal.SIGTERM, [1])
    assert job.finish(60) == [REQUEUE, REQUEUE]
    assert "eval loss" not in job.output()
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000001"


def never_start(rank: int) -> None:
    """Let rank 1 wait for ever before it connects."""
    if rank == 1:
        time.sleep(1e6)


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGTERM, 143, "SIGTERM: the run ends before"), (signal.SIGINT, 130, "interrupted: the run ends before")],
)
def test_a_signal_during_the_start_ends_a_rank_at_once(number: signal.Signals, code: int, message: str, tmp_path: Path) -> None:
    job = start(tmp_path, ENDLESS, before=never_start)
    job.wait_for("starting 2 ranks")
    job.send(number, [0])
    job.ranks[0].join(20)
    assert job.ranks[0].exitcode == code
    assert job.output().count(message) == 1
    job.send(signal.SIGKILL, [1])
    job.finish(10)


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


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_a_rank_notices_that_its_launcher_was_killed(name: str, tmp_path: Path) -> None:
    """The script that plays the launcher has the launcher's name, and starts a rank as these do."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import sys, time\n"
        "from megagpt.resilience.interruption import Interruption\n"
        "with Interruption(None, 0.0) as interruption:\n"
        "    print('ready', flush=True)\n"
        "    while interruption.reason is None: time.sleep(0.05)\n"
        "    print(interruption.reason, flush=True)\n"
    )
    launcher = tmp_path / name
    launcher.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, {str(rank)!r}])\n")
    with subprocess.Popen([sys.executable, str(launcher)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.readline() == f"{LAUNCHER_ENDED}\n"


def test_a_signal_that_was_ignored_before_stays_ignored() -> None:
    """nohup ignores SIGHUP, and a shell ignores SIGINT for a job in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption(None, 0.0) as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)  # read after SIGHUP
            end = time.monotonic() + 5
            while interruption.reason is None and time.monotonic() < end:
                time.sleep(0.01)
            assert interruption.reason == "SIGUSR1"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
