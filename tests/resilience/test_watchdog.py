"""A hang ends the job within parallel.timeout_seconds; the error names the rank to blame and its phase."""

import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.commands import config_file
from support.job import Job

import megagpt
from megagpt.resilience.watchdog import HUNG, Report, diagnose, innermost_call

TIMEOUT = 6.0
PACKAGE = Path(megagpt.__file__).parent


def start(folder: Path, before: Callable[[int], None] | None = None, **parallel: object) -> Job:
    sections = {"parallel": {"timeout_seconds": TIMEOUT, **parallel}, "training": {"steps": 1_000_000}}
    return Job(2, ["--config", str(config_file(folder, **sections))], folder / "logs", before)


def error_line(job: Job, begin: float) -> str:
    """Return the error of a job that must end by itself in time. A stopped rank must be killed, like a launcher does."""
    while not any(process.exitcode for process in job.ranks):
        assert time.monotonic() - begin < 3 * TIMEOUT, job.output()
        job.ranks[0].join(0.1)
    seconds = time.monotonic() - begin
    codes = job.finish(20, grace=0.5)
    assert HUNG in codes, job.output()
    assert seconds < TIMEOUT + 4, seconds
    (line,) = [line for line in job.output().splitlines() if "no progress for 6 s (parallel.timeout_seconds)" in line]
    return line


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    job = start(tmp_path)
    job.wait_for("step       2/")
    job.ranks[0].join(1.5)  # ranks report every half second
    begin = time.monotonic()
    job.send(signal.SIGSTOP, [1])
    line = error_line(job, begin)
    assert line.startswith("[rank 0] error: no progress for 6 s")
    assert "rank 1 (" in line and ") stopped responding; last seen in step " in line
    assert "waiting for it: rank 0 in step" in line


def test_the_rank_that_hosts_the_store_is_named_when_it_is_stopped(tmp_path: Path) -> None:
    job = start(tmp_path)
    job.wait_for("step       2/")
    begin = time.monotonic()
    job.send(signal.SIGSTOP, [0])
    line = error_line(job, begin)
    assert "[rank 1] error:" in line
    assert "rank 0, which hosts the store, does not answer; this rank is in step" in line


def sleep_in_third_step(rank: int) -> None:
    """Make rank 1 sleep in its third step, in the second of two micro-batches of the second stage."""
    from megagpt.parallel.vocab_loss import VocabParallelLoss

    calls: list[int] = []

    def count(module: torch.nn.Module, args: object) -> None:
        if rank == 1 and isinstance(module, VocabParallelLoss):
            calls.append(1)
            if len(calls) == 6:
                sleep_long()

    torch.nn.modules.module.register_module_forward_pre_hook(count)


def sleep_long() -> None:
    time.sleep(600)


def test_a_rank_that_does_not_join_a_collective_is_named_with_its_phase(tmp_path: Path) -> None:
    job = start(tmp_path, sleep_in_third_step, pipeline=2)
    job.wait_for("step       2/")
    begin = time.monotonic()
    line = error_line(job, begin)
    assert "rank 1 (" in line
    assert ") is in no collective, in step 3: forward of stage 1, micro-batch 1, in __call__ (model/objectives.py:" in line
    assert "> sleep_long (" in line
    assert "waiting for it: rank 0 in step 3:" in line


def report(beat: int, phase: str, communicates: bool) -> Report:
    return Report(beat, phase, 9.0, "f (a.py:1)", communicates, "node")


def test_if_all_ranks_wait_all_are_named() -> None:
    before = {rank: report(1, f"step 3: phase {rank}", True) for rank in range(3)}
    now = {rank: report(2, f"step 3: phase {rank}", True) for rank in range(3)}
    assert all(f"rank {rank} (node) waits in step 3: phase {rank}" in diagnose(before, now) for rank in range(3))


def test_a_rank_that_stopped_responding_is_to_blame_whatever_others_do() -> None:
    before = {0: report(1, "a", True), 1: report(5, "b", False), 2: report(1, "c", False)}
    now = {0: report(2, "a", True), 1: report(5, "b", False), 2: report(2, "c", False)}
    assert diagnose(before, now).startswith("rank 1 (node) stopped responding")


def test_a_rank_that_changes_its_phase_is_not_to_blame() -> None:
    before = {0: report(1, "a", True), 1: report(1, "b", False), 2: report(1, "c", False)}
    now = {0: report(2, "a", True), 1: report(2, "b", False), 2: report(2, "d", False)}
    assert diagnose(before, now).startswith("rank 1 (node) is in no collective, in b")
    assert "rank 2 (node)" not in diagnose(before, now)


def test_a_diagnosis_names_at_most_eight_ranks() -> None:
    before = {rank: report(1, "a", False) for rank in range(20)}
    now = {rank: report(1, "a", False) for rank in range(20)}
    assert diagnose(before, now).endswith(" and 12 more")
    assert diagnose(before, now).count("stopped responding") == 8


@pytest.mark.parametrize(
    ("files", "call", "communicates"),
    [
        ([PACKAGE / "engine/engine.py", "/y/torch/distributed/c10d.py"], "f0 (engine/engine.py:7)", True),
        ([PACKAGE / "pipeline/executor.py", PACKAGE / "pipeline/transfers.py"], "f1 (pipeline/transfers.py:7)", True),
        ([PACKAGE / "training/trainer.py", "/y/linear.py"], "f0 (training/trainer.py:7) > f1 (/y/linear.py:7)", False),
        ([PACKAGE / "model/gpt.py"], "f0 (model/gpt.py:7)", False),
        (
            [PACKAGE / "engine/engine.py", "/home/me/megagpt/.venv/torch/distributed/c10d.py"],
            "f0 (engine/engine.py:7)",
            True,
        ),
    ],
)
def test_the_innermost_function_of_megagpt_is_found(files: list[str | Path], call: str, communicates: bool) -> None:
    stack = [traceback.FrameSummary(str(file), 7, f"f{number}") for number, file in enumerate(files)]
    assert innermost_call(stack) == (call, communicates)


def test_a_thread_that_has_ended_has_no_call() -> None:
    assert innermost_call([]) == ("nothing", False)


def test_a_run_without_a_hang_is_not_stopped(tmp_path: Path) -> None:
    """It lasts longer than the timeout, but its steps are shorter."""
    config = config_file(tmp_path, parallel={"timeout_seconds": 3.0}, training={"steps": 150})
    assert Job(2, ["--config", str(config)], tmp_path / "logs").finish(60) == [0, 0]
