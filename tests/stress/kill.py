"""Kill a run of pretrain_gpt.py at random moments, restart it until it is complete, and check what it saved.

    python tests/stress/kill.py --kills 60 --ranks 4 --seed 0

The run is first executed undisturbed. Then ranks get SIGKILL at moments that are spread evenly over the start-up, the
steps and the saves of a start, sometimes one rank and sometimes all at once. Exit code 0 means that all of this held:

- after each kill all checkpoints were complete, and none that the run had reported as saved was lost;
- the other ranks ended by themselves within seconds after one was killed;
- each start resumed from the newest complete checkpoint;
- the last checkpoint equals that of the undisturbed run, bit for bit: weights, moments and the state of the run.

A kill removes a process, but not what the system has cached of its files: a power failure is another test.
"""

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from support.job import Job
from support.runs import corpus, tiny_config

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.format import checkpoint_folders, latest_name, step_folder, step_of, unfinished_folders
from megagpt.checkpoint.load import CheckpointReader
from megagpt.checkpoint.verify import local_problems
from megagpt.config import to_json
from megagpt.errors import listed

VOCAB_SIZE = 4000
END_TIMEOUT = 10.0
"""Seconds that the other ranks have to end by themselves after one is killed; they need tenths of a second."""
UNCONNECTED_TIMEOUT = 3.0
"""The same if they may not be connected to the killed rank yet and wait for it; a launcher would end them."""
START_TIMEOUT = 60.0
"""Seconds that ranks have to start, and to end after all of them got SIGKILL."""


class Kill(NamedTuple):
    """One kill, the situation in which it happened, and its result."""

    rank: int | None
    """Killed rank; None if all ranks were killed at once."""
    seconds: float
    """Seconds since the start of the ranks."""
    loaded: int | None
    """Step that this start resumed from; None if it started from scratch or was killed before."""
    reached: int
    """Last step that was printed; 0 before the first one."""
    in_save: bool
    """Whether a checkpoint was being written, named or deleted."""
    settled: bool
    """Whether the other ranks completed such a save, or removed what they had written."""
    unconnected: bool
    """Whether the other ranks were not connected yet and had to be ended, like a launcher does."""
    newest: int | None
    """Step of the newest complete checkpoint afterwards."""

    def line(self) -> str:
        """Return one line for people."""
        facts = [
            f"{'all ranks' if self.rank is None else f'rank {self.rank}'} after {self.seconds:.2f} s",
            f"resumed from step {self.loaded}" if self.loaded is not None else "",
            f"at step {self.reached}" if self.reached else "before the first step",
            "during a save" if self.in_save else "",
            "which the other ranks settled" if self.settled else "",
            "before the ranks were connected" if self.unconnected else "",
            f"newest checkpoint: {'none' if self.newest is None else f'step {self.newest}'}",
        ]
        return ", ".join(fact for fact in facts if fact)


@dataclass(frozen=True)
class Outcome:
    """Result of `stress`."""

    kills: list[Kill]
    problems: list[str]
    """One sentence for each condition that did not hold."""
    resumed: int
    """Number of starts that resumed; each from the newest complete checkpoint, unless `problems` says otherwise."""
    steps: int
    seconds: float

    def summary(self) -> str:
        """Return a few lines for people."""
        single = sum(kill.rank is not None for kill in self.kills)
        settled = sum(kill.settled for kill in self.kills)
        return "\n".join(
            [
                f"kills: {len(self.kills)}: {single} of one rank, {len(self.kills) - single} of all ranks at once",
                f"during a save: {sum(kill.in_save for kill in self.kills)}, {settled} of them settled by the other ranks",
                f"before the first step of a start: {sum(kill.reached == 0 for kill in self.kills)}, "
                f"{sum(kill.unconnected for kill in self.kills)} of them before the ranks were connected",
                f"before the first checkpoint: {sum(kill.newest is None for kill in self.kills)}",
                f"starts that resumed: {self.resumed}",
                f"steps of the run: {self.steps}",
                f"problems: {len(self.problems)}",
                *(f"  {problem}" for problem in self.problems),
                f"total: {self.seconds:.0f} s",
            ]
        )


class Run(NamedTuple):
    """A run that can be restarted."""

    ranks: int
    steps: int
    folder: Path
    config: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints."""
        return self.folder / "checkpoints"

    def start(self, number: int) -> Job:
        """Start the ranks; return once all run, so that the start of the server that forks them is not counted."""
        job = Job(self.ranks, ["--config", str(self.config)], self.folder / f"start_{number:03d}")
        end = time.monotonic() + START_TIMEOUT
        while not all(log.exists() for log in job.logs) and time.monotonic() < end:
            time.sleep(0.01)
        return job


class Pace(NamedTuple):
    """Times of the undisturbed run."""

    start_up: float
    """Seconds until the end of the first step."""
    step: float
    """Seconds per step, with its save."""


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="number of kills (default 60)")
    parser.add_argument("--ranks", type=int, default=4, help="processes of the run (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the moments and the ranks to kill (default 0)")
    parser.add_argument("--tensor", type=int, default=2, help="tensor parallel size (default 2)")
    parser.add_argument(
        "--pipeline",
        type=int,
        default=1,
        help="pipeline parallel size (default 1); the remaining factor of --ranks is data parallel",
    )
    parser.add_argument("--zero", type=int, default=1, choices=[0, 1, 2, 3], help="ZeRO stage (default 1)")
    parser.add_argument("--steps-per-start", type=int, default=12, help="maximum number of steps before a kill (default 12)")
    parser.add_argument("--max-minutes", type=float, default=30.0, help="time limit (default 30)")
    parser.add_argument(
        "--folder", type=Path, help="folder for runs and logs, which is kept (default: a temporary folder, deleted on success)"
    )
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kill-"))
    if (folder / "alone").exists():
        parser.error(f"--folder: {folder} already contains runs")
    outcome = stress(
        args.kills,
        args.ranks,
        args.seed,
        folder,
        tensor=args.tensor,
        pipeline=args.pipeline,
        zero=args.zero,
        steps_per_start=args.steps_per_start,
        minutes=args.max_minutes,
    )
    print(outcome.summary(), flush=True)
    if outcome.problems:
        print(f"output and checkpoints of the ranks are in {folder}")
    elif args.folder is None:
        shutil.rmtree(folder)
    return 1 if outcome.problems else 0


def stress(
    kills: int,
    ranks: int,
    seed: int,
    folder: Path,
    *,
    tensor: int = 2,
    pipeline: int = 1,
    zero: int = 1,
    steps_per_start: int = 12,
    minutes: float = 30.0,
) -> Outcome:
    """Execute a run in `folder`/alone undisturbed, and in `folder`/killed with `kills` kills, and compare. Prints each kill."""
    start = time.monotonic()
    deadline = start + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    data = corpus(folder, 300, VOCAB_SIZE)
    steps = 4 + kills * steps_per_start // 2  # on average a start is killed after half of its maximum number of steps
    alone, killed = (_create_run(folder / name, data, ranks, tensor, pipeline, zero, steps) for name in ("alone", "killed"))
    pace, problems = _run_undisturbed(alone, deadline)
    if pace is None:
        return Outcome([], problems, 0, steps, time.monotonic() - start)
    print(f"undisturbed: {steps} steps, {pace.start_up:.1f} s until the first, then {pace.step:.2f} s each", flush=True)
    killer = Killer(killed, pace, kills, steps_per_start, random.Random(seed), deadline)
    if killer.kill_all() and killer.complete():
        killer.problems += _differences(step_folder(alone.checkpoints, steps), step_folder(killed.checkpoints, steps))
    return Outcome(killer.done, killer.problems, killer.resumed, steps, time.monotonic() - start)


class Killer:
    """Starts and kills a run repeatedly, and records what it observes."""

    def __init__(
        self, run: Run, pace: Pace, kills: int, steps_per_start: int, generator: random.Random, deadline: float
    ) -> None:
        self._run = run
        self._pace = pace
        self._generator = generator
        self._deadline = deadline
        self._kills = kills
        self._steps_per_start = steps_per_start
        self._newest: int | None = None
        """Step of the newest complete checkpoint, from which the next start must resume."""
        self.done: list[Kill] = []
        self.problems: list[str] = []
        self.resumed = 0
        self._reported: set[Path] = set()
        """Folders of incomplete checkpoints that are in `problems` already."""

    def kill_all(self) -> bool:
        """Start and kill. Returns whether all kills were done before the deadline and before the run ended by itself."""
        for number in range(self._kills):
            if time.monotonic() > self._deadline:
                self.problems.append(f"the time limit was reached after {number} of {self._kills} kills")
                return False
            before = _unfinished_names(self._run.checkpoints)
            job = self._run.start(number)
            try:
                moment = self._moment(number)
                if not _runs_for(job, moment):
                    codes = job.finish(START_TIMEOUT)
                    self._problem(job, f"ended by itself, exit codes {codes}:\n{job.output()[-800:]}")
                    return False
                kill = self._kill(job, moment, before)
            finally:
                job.send(signal.SIGKILL)
            self.done.append(kill)
            print(f"kill {number + 1} of {self._kills}: {kill.line()}", flush=True)
        return True

    def complete(self) -> bool:
        """Start once more and let the run complete; return whether it does."""
        job = self._run.start(len(self.done))
        try:
            codes = job.finish(max(1.0, self._deadline - time.monotonic()))
        except TimeoutError:
            self._problem(job, f"did not end in time:\n{job.output()[-800:]}")
            return False
        finally:
            job.send(signal.SIGKILL)
        if any(codes) or "NOT SAVED" in job.output():
            self._problem(job, f"ended with exit codes {codes}:\n{job.output()[-800:]}")
        self._check_loaded(job)
        self.problems += [f"{path}: is left over" for path in unfinished_folders(self._run.checkpoints)]
        return not any(codes)

    def _moment(self, number: int) -> float:
        """Return the seconds from a start to its kill: uniform, and such that the run lasts for the remaining kills."""
        remaining = self._run.steps - (self._newest or 0)
        max_steps = max(0.0, min(self._steps_per_start, 1.5 * remaining / (self._kills - number), remaining - 2))
        return self._generator.uniform(0.0, self._pace.start_up + max_steps * self._pace.step)

    def _kill(self, job: Job, moment: float, before: set[str]) -> Kill:
        """Kill one rank or all, and check the result; `before`: unfinished saves at the start."""
        rank = self._generator.randrange(self._run.ranks) if self._generator.random() < 0.5 else None
        job.send(signal.SIGKILL, None if rank is None else [rank])
        unfinished = _unfinished_names(self._run.checkpoints) - before
        connected = _are_connected(job)
        codes, had_to_be_ended = _wait_for_end(job, END_TIMEOUT if connected else UNCONNECTED_TIMEOUT)
        still_unfinished = _unfinished_names(self._run.checkpoints) - before
        if had_to_be_ended and connected:
            self._problem(job, f"{END_TIMEOUT:g} s after rank {rank} was killed other ranks still ran:\n{job.output()[-800:]}")
        if 0 in codes:
            self._problem(job, f"exit codes {codes}, but the run was not complete")
        loaded = self._check_loaded(job)
        newest = self._check_checkpoints(job)
        steps = re.findall(r"^[\d:]{8} step +(\d+)/", job.output(), re.MULTILINE)
        return Kill(
            rank=rank,
            seconds=moment,
            loaded=loaded,
            reached=int(steps[-1]) if steps else 0,
            in_save=bool(unfinished | still_unfinished),
            settled=bool(unfinished) and not still_unfinished,
            unconnected=had_to_be_ended,
            newest=newest,
        )

    def _check_loaded(self, job: Job) -> int | None:
        """Return the step that a start resumed from, which must be the newest; None if it did not resume."""
        match = re.search(r"^loaded (.+): step (\d+), sample", job.output(), re.MULTILINE)
        expected = str(step_folder(self._run.checkpoints, self._newest)) if self._newest is not None else "nothing"
        if match is None:
            if self._newest is not None and _are_connected(job):
                self._problem(job, f"started from scratch; the newest complete checkpoint was {expected}")
            return None
        self.resumed += 1
        if (match[1], int(match[2])) != (expected, self._newest):
            self._problem(job, f"resumed from {match[1]}, step {match[2]}; the newest complete checkpoint was {expected}")
        return int(match[2])

    def _check_checkpoints(self, job: Job) -> int | None:
        """Return the step of the newest complete checkpoint; incomplete and lost checkpoints are problems."""
        complete = []
        for folder in checkpoint_folders(self._run.checkpoints):
            problems = local_problems(folder)
            if not problems:
                complete.append(step_of(folder))
            elif folder not in self._reported:  # it remains until the run reaches its step again
                self._reported.add(folder)
                self._problem(job, "; ".join(problems))
        saved = [int(step) for step in re.findall(r"^saved .*step_(\d+) in", job.output(), re.MULTILINE)]
        newest = complete[0] if complete else None
        expected = max([*saved, self._newest or 0])
        if expected > (newest or 0):
            self._problem(job, f"the newest complete checkpoint is of step {newest}, but step {expected} was saved")
        self._newest = newest
        return newest

    def _problem(self, job: Job, text: str) -> None:
        self.problems.append(f"{job.logs[0].parent.name}: {text}")


def _create_run(folder: Path, data: str, ranks: int, tensor: int, pipeline: int, zero: int, steps: int) -> Run:
    """Write the config of a run. Each step saves 16 MB, about as long as the step; dropout makes random state matter."""
    folder.mkdir()
    run = Run(ranks, steps, folder, folder / "run.json")
    dropout = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    shape = {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 32, "vocab_size": VOCAB_SIZE, "init_std": 0.02}
    config = tiny_config(
        model={**shape, **dropout},
        training={"steps": steps, "micro_batch_size": 1, "global_batch_size": 4},
        data={"train": data},
        optimizer={"learning_rate": 1e-3, "eps": 1e-8},
        parallel={"tensor": tensor, "pipeline": pipeline},
        zero={"stage": zero},
        checkpoint={"dir": str(run.checkpoints), "interval": 1, "keep": 3},
        logging={"interval": 1},
    )
    run.config.write_text(to_json(config))
    return run


def _run_undisturbed(run: Run, deadline: float) -> tuple[Pace | None, list[str]]:
    """Execute the run from start to end; return its times, or problems if it does not complete."""
    job = run.start(0)
    start = time.monotonic()
    try:
        job.wait_for("step ", START_TIMEOUT)
        first = time.monotonic()
        codes = job.finish(max(1.0, deadline - first))
    except (TimeoutError, AssertionError):
        return None, [f"the undisturbed run did not end in time:\n{job.output()[-800:]}"]
    finally:
        job.send(signal.SIGKILL)
    if any(codes) or "NOT SAVED" in job.output():
        return None, [f"the undisturbed run ended with exit codes {codes}:\n{job.output()[-800:]}"]
    return Pace(first - start, (time.monotonic() - first) / max(1, run.steps - 1)), []


def _runs_for(job: Job, seconds: float) -> bool:
    """Wait for `seconds`; return whether all ranks still run."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(process.exitcode is not None for process in job.ranks):
            return False
        time.sleep(min(0.02, max(0.0, end - time.monotonic())))
    return True


def _wait_for_end(job: Job, timeout: float) -> tuple[list[int | None], bool]:
    """Wait until all ranks have ended; return their exit codes, and whether some had to be killed after the timeout."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in job.ranks) and time.monotonic() < end:
        time.sleep(0.01)
    had_to_be_ended = any(process.is_alive() for process in job.ranks)
    job.send(signal.SIGKILL)
    return job.finish(START_TIMEOUT), had_to_be_ended


def _are_connected(job: Job) -> bool:
    """Return whether the ranks are certainly connected: rank 0 prints nothing before."""
    return re.search(r"^(loaded|step) ", job.output(), re.MULTILINE) is not None


def _unfinished_names(directory: Path) -> set[str]:
    """Return what an interrupted save leaves: unfinished folders, and a newest checkpoint that `latest` does not name."""
    names = {path.name for path in unfinished_folders(directory)}
    newest = max(checkpoint_folders(directory), key=lambda folder: step_of(folder) or 0, default=None)
    if newest is not None and newest.name != latest_name(directory):
        names.add(newest.name)
    return names


def _differences(expected: Path, actual: Path) -> list[str]:
    """Return in which bits two checkpoints differ, in one sentence."""
    reader, other = CheckpointReader(expected), CheckpointReader(actual)
    if reader.manifest.tensors.keys() != other.manifest.tensors.keys():
        return [f"{actual}: has other parameters than {expected}"]
    differences = [] if reader.manifest.state == other.manifest.state else ["state of the run"]
    for name, record in reader.manifest.tensors.items():
        other_record = other.manifest.tensors[name]
        if (record.shape, record.kinds) != (other_record.shape, other_record.kinds):
            differences.append(f"shape or state names of {name}")
            continue
        box = Box.full(tuple(record.shape))
        for state in record.kinds:
            bits = reader.read(state, name, box).view(torch.int32)
            if not torch.equal(bits, other.read(state, name, box).view(torch.int32)):
                differences.append(f"{state} of {name}")
    return [f"{actual}: differs from {expected} in: {listed(differences, 6)}"] if differences else []


if __name__ == "__main__":
    sys.exit(main())
