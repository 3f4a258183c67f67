"""A hang ends the job within parallel.timeout_seconds, with the rank to blame and its place, not the ranks that wait."""

import signal
import time
import traceback
from pathlib import Path

import pytest
from commands.test_pretrain import config_file
from support.job import Job

from megagpt.resilience.watchdog import HUNG, Report, innermost, verdict

TIMEOUT = 6.0


def start(folder: Path, before=None, **parallel: object) -> Job:  # type: ignore[no-untyped-def]
    sections = {"parallel": {"timeout_seconds": TIMEOUT, **parallel}, "training": {"steps": 1_000_000}}
    return Job(2, ["--config", str(config_file(folder, **sections))], folder / "logs", before)


def ends_in_time(job: Job, begun: float) -> str:
    """The job's error line. Its own end is in time; a stopped process then has to be killed, as launchers do."""
    while not any(process.exitcode for process in job.ranks):
        assert time.monotonic() - begun < 3 * TIMEOUT, job.output()
        job.ranks[0].join(0.1)
    seconds = time.monotonic() - begun
    codes = job.finish(20, grace=0.5)
    assert HUNG in codes, job.output()
    assert seconds < TIMEOUT + 4, seconds
    (line,) = [line for line in job.output().splitlines() if "no progress for 6 s (parallel.timeout_seconds)" in line]
    return line


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    job = start(tmp_path)
    job.wait_for("step       2/")
    begun = time.monotonic()
    job.send(signal.SIGSTOP, [1])
    line = ends_in_time(job, begun)
    assert line.startswith("[rank 0] error: no progress for 6 s")
    assert "rank 1 on" in line and "gives no sign of life (stopped or cut off), last heard of at" in line
    assert "waiting for it: rank 0 at step" in line


def test_the_rank_where_all_meet_is_named_when_it_is_stopped(tmp_path: Path) -> None:
    job = start(tmp_path)
    job.wait_for("step       2/")
    begun = time.monotonic()
    job.send(signal.SIGSTOP, [0])
    line = ends_in_time(job, begun)
    assert "[rank 1] error:" in line and "rank 0, where all ranks meet, does not answer; this rank is at step" in line


def never_comes(rank: int) -> None:
    """Rank 1 does something else for ever in its third step, in the second micro-batch of the second stage."""
    from megagpt.parallel.embedding import VocabParallelLoss

    calls = []
    forward = VocabParallelLoss.forward

    def stuck(self: VocabParallelLoss, *args: object) -> object:
        calls.append(1)
        if rank == 1 and len(calls) == 10:  # 4 micro-batches a step
            look_elsewhere()
        return forward(self, *args)  # type: ignore[arg-type]

    VocabParallelLoss.forward = stuck  # type: ignore[method-assign,assignment]


def look_elsewhere() -> None:
    time.sleep(600)


def test_a_collective_that_never_comes_names_who_does_not_and_where_it_is(tmp_path: Path) -> None:
    job = start(tmp_path, never_comes, pipeline=2)
    begun = time.monotonic()
    job.wait_for("step       2/")
    begun = time.monotonic()
    line = ends_in_time(job, begun)
    assert "rank 1 on" in line and "is in no collective, at step 3: forward of stage 1, micro-batch 1, in forward (" in line
    assert "> look_elsewhere (" in line
    assert "waiting for it: rank 0 at step 3:" in line


def a_report(beat: int, place: str, communicates: bool) -> Report:
    return Report(beat, place, 9.0, "f (a.py:1)", communicates, "node")


def test_of_ranks_that_all_wait_all_are_told() -> None:
    before = {rank: a_report(1, f"step 3: place {rank}", True) for rank in range(3)}
    now = {rank: a_report(2, f"step 3: place {rank}", True) for rank in range(3)}
    assert all(f"rank {rank} on node waits at step 3: place {rank}" in verdict(before, now) for rank in range(3))


def test_who_gives_no_sign_is_to_blame_whatever_others_do() -> None:
    before = {0: a_report(1, "a", True), 1: a_report(5, "b", False), 2: a_report(1, "c", False)}
    now = {0: a_report(2, "a", True), 1: a_report(5, "b", False), 2: a_report(2, "c", False)}
    assert verdict(before, now).startswith("rank 1 on node gives no sign of life")


@pytest.mark.parametrize(
    ("files", "said", "communicates"),
    [
        (["/x/megagpt/training/engine.py", "/y/torch/distributed/distributed_c10d.py"], "f0 (training/engine.py:7)", True),
        (["/x/megagpt/pipeline/executor.py", "/x/megagpt/pipeline/transfers.py"], "f1 (pipeline/transfers.py:7)", True),
        (["/x/megagpt/training/trainer.py", "/y/linear.py"], "f0 (training/trainer.py:7) > f1 (/y/linear.py:7)", False),
        (["/x/megagpt/model/gpt.py"], "f0 (model/gpt.py:7)", False),
    ],
)
def test_where_a_stack_is(files: list[str], said: str, communicates: bool) -> None:
    stack = [traceback.FrameSummary(file, 7, f"f{number}") for number, file in enumerate(files)]
    assert innermost(stack) == (said, communicates)


def test_a_run_without_a_hang_is_left_alone(tmp_path: Path) -> None:
    """Longer than the timeout, with steps that are shorter."""
    config = config_file(tmp_path, parallel={"timeout_seconds": 3.0}, training={"steps": 150})
    assert Job(2, ["--config", str(config)], tmp_path / "logs").finish(60) == [0, 0]
