"""Kills a run of pretrain_gpt.py at random moments, starts it again until it is complete, and looks at what was saved.

    python tests/stress/kill.py --kills 60 --ranks 4 --seed 0

The same run is made first with nobody disturbing it. Then ranks get SIGKILL at moments that are spread evenly over the
start-up, the steps and the saves of a start, now one rank and now all at once. Exit code 0 says that all of this held:

- after a kill all checkpoints were whole, and none that the run had called saved was lost;
- the ranks beside a killed one ended by themselves within seconds;
- each start went on from the newest whole checkpoint;
- the last checkpoint is that of the undisturbed run, bit for bit: weights, moments, and where the run stands.

A kill takes a process away, not what the system has of its files: a machine that loses its power is another test.
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
from megagpt.checkpoint.check import problems_of
from megagpt.checkpoint.format import folders_of, pointed_at, step_folder, step_of, unfinished
from megagpt.checkpoint.load import Reader
from megagpt.config import to_json

VOCAB_SIZE = 4000
OTHERS_END = 10.0
"""Seconds that the ranks beside a killed one have to end by themselves; they take tenths of one."""
LAUNCHER = 3.0
"""The same where they may not have met it yet, and wait for it; a launcher would end them."""
STARTS = 60.0
"""Seconds that ranks have to start in, and to end when all have got SIGKILL."""


class Kill(NamedTuple):
    """One kill, what it met, and what it left."""

    rank: int | None
    """None: all at once."""
    seconds: float
    """From the start of the ranks."""
    loaded: int | None
    """Step that the start said it went on from; None where it began anew or had not come so far."""
    reached: int
    """Last step that was printed; 0 before the first."""
    in_save: bool
    """A checkpoint was being written, named or deleted."""
    settled: bool
    """It was, and the ranks that lived completed it or took away what they had written."""
    cut_off: bool
    """The others had not met the killed rank yet, and were ended as a launcher does."""
    newest: int | None
    """Step of the newest whole checkpoint afterwards."""

    def line(self) -> str:
        """For people."""
        parts = [
            f"{'all ranks' if self.rank is None else f'rank {self.rank}'} after {self.seconds:.2f} s",
            f"gone on from step {self.loaded}" if self.loaded is not None else "",
            f"at step {self.reached}" if self.reached else "before a step",
            "inside a save" if self.in_save else "",
            "which the others settled" if self.settled else "",
            "before the ranks had met" if self.cut_off else "",
            f"newest checkpoint: {'none' if self.newest is None else f'step {self.newest}'}",
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Outcome:
    """What `stress` found."""

    kills: list[Kill]
    problems: list[str]
    """One sentence for each thing that did not hold."""
    resumed: int
    """Starts that said which checkpoint they went on from; it was the newest whole one, or is among the problems."""
    steps: int
    seconds: float

    def summary(self) -> str:
        """A few lines for people."""
        of_one = sum(kill.rank is not None for kill in self.kills)
        settled = sum(kill.settled for kill in self.kills)
        return "\n".join(
            [
                f"kills: {len(self.kills)}: {of_one} of one rank, {len(self.kills) - of_one} of all ranks at once",
                f"inside a save: {sum(kill.in_save for kill in self.kills)}, {settled} of them settled by the ranks that lived",
                f"before the first step of a start: {sum(kill.reached == 0 for kill in self.kills)}, "
                f"{sum(kill.cut_off for kill in self.kills)} of them before the ranks had met",
                f"before the first checkpoint: {sum(kill.newest is None for kill in self.kills)}",
                f"checkpoints resumed: {self.resumed}",
                f"steps of the run: {self.steps}",
                f"problems: {len(self.problems)}",
                *(f"  {problem}" for problem in self.problems),
                f"total: {self.seconds:.0f} s",
            ]
        )


class Run(NamedTuple):
    """A run that can be started again."""

    ranks: int
    steps: int
    folder: Path
    config: Path

    @property
    def checkpoints(self) -> Path:
        """Where it saves."""
        return self.folder / "checkpoints"

    def start(self, number: int) -> Job:
        """Its ranks, begun: the time until the server that forks them is there is not theirs."""
        job = Job(self.ranks, ["--config", str(self.config)], self.folder / f"start_{number:03d}")
        end = time.monotonic() + STARTS
        while not all(log.exists() for log in job.logs) and time.monotonic() < end:
            time.sleep(0.01)
        return job


class Pace(NamedTuple):
    """How long things take in the undisturbed run."""

    start_up: float
    """Seconds until the first step was made."""
    step: float
    """Seconds for a step and its save."""


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="how many (default 60)")
    parser.add_argument("--ranks", type=int, default=4, help="processes of the run (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and of ranks to kill (default 0)")
    parser.add_argument("--tensor", type=int, default=2, help="ranks that share each matrix (default 2)")
    parser.add_argument("--pipeline", type=int, default=1, help="stages (default 1); the data-parallel size is what is left")
    parser.add_argument("--zero", type=int, default=1, choices=[0, 1, 2, 3], help="ZeRO's stage (default 1)")
    parser.add_argument("--steps-per-start", type=int, default=12, help="most that one makes before its kill (default 12)")
    parser.add_argument("--max-minutes", type=float, default=30.0, help="give up after so long (default 30)")
    parser.add_argument("--folder", type=Path, help="for runs and logs; it stays (default: one that goes if all is well)")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kill-"))
    if (folder / "alone").exists():
        parser.error(f"--folder: {folder} has runs already")
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
        print(f"what the ranks printed and saved is in {folder}")
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
    """Make a run in `folder`/alone undisturbed, then in `folder`/killed with so many kills, and compare; prints each kill."""
    begun = time.monotonic()
    deadline = begun + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    data = corpus(folder, 300, VOCAB_SIZE)
    steps = 4 + kills * steps_per_start // 2  # a start makes half of its most steps if its moment is in the middle
    alone, killed = (_run(folder / name, data, ranks, tensor, pipeline, zero, steps) for name in ("alone", "killed"))
    pace, problems = _undisturbed(alone, deadline)
    if pace is None:
        return Outcome([], problems, 0, steps, time.monotonic() - begun)
    print(f"undisturbed: {steps} steps, {pace.start_up:.1f} s to the first, then {pace.step:.2f} s each", flush=True)
    killer = Killer(killed, pace, kills, steps_per_start, random.Random(seed), deadline)
    if killer.kill_all() and killer.complete():
        killer.problems += _differences(step_folder(alone.checkpoints, steps), step_folder(killed.checkpoints, steps))
    return Outcome(killer.done, killer.problems, killer.resumed, steps, time.monotonic() - begun)


class Killer:
    """Starts a run and kills it, again and again, and keeps what it saw."""

    def __init__(
        self, run: Run, pace: Pace, kills: int, steps_per_start: int, generator: random.Random, deadline: float
    ) -> None:
        self._run, self._pace, self._generator, self._deadline = run, pace, generator, deadline
        self._kills, self._steps_per_start = kills, steps_per_start
        self._newest: int | None = None
        """Step of the newest whole checkpoint, from which the next start is to go on."""
        self.done: list[Kill] = []
        self.problems: list[str] = []
        self.resumed = 0
        self._known: set[Path] = set()
        """Folders of checkpoints that are not whole."""

    def kill_all(self) -> bool:
        """Start and kill; whether all kills are done, before the time is up and the run has ended by itself."""
        for number in range(self._kills):
            if time.monotonic() > self._deadline:
                self.problems.append(f"no time is left after {number} of {self._kills} kills")
                return False
            before = _marks(self._run.checkpoints)
            job = self._run.start(number)
            try:
                moment = self._moment(number)
                if not _runs_for(job, moment):
                    codes = job.finish(STARTS)
                    self._problem(job, f"ended by itself, exit codes {codes}:\n{job.output()[-800:]}")
                    return False
                kill = self._kill(job, moment, before)
            finally:
                job.send(signal.SIGKILL)
            self.done.append(kill)
            print(f"kill {number + 1} of {self._kills}: {kill.line()}", flush=True)
        return True

    def complete(self) -> bool:
        """Start once more and let the run come to its end; whether it does."""
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
        self._loaded(job)
        self.problems += [f"{path}: is left over" for path in unfinished(self._run.checkpoints)]
        return not any(codes)

    def _moment(self, number: int) -> float:
        """Seconds from a start to its kill: drawn evenly, and so that the run lasts for the kills that are left."""
        left = self._run.steps - (self._newest or 0)
        most = max(0.0, min(self._steps_per_start, 1.5 * left / (self._kills - number), left - 2))
        return self._generator.uniform(0.0, self._pace.start_up + most * self._pace.step)

    def _kill(self, job: Job, moment: float, before: set[str]) -> Kill:
        """Kill a rank, or all, and look at what is left; `before`: marks of saves that were there at the start."""
        rank = self._generator.randrange(self._run.ranks) if self._generator.random() < 0.5 else None
        job.send(signal.SIGKILL, None if rank is None else [rank])
        at_once = _marks(self._run.checkpoints) - before
        had_met = _have_met(job)
        codes, cut_off = _ends(job, OTHERS_END if had_met else LAUNCHER)
        after = _marks(self._run.checkpoints) - before
        if cut_off and had_met:
            self._problem(job, f"{OTHERS_END:g} s after rank {rank} was killed others still ran:\n{job.output()[-800:]}")
        if 0 in codes:
            self._problem(job, f"exit codes {codes}, though the run was not complete")
        loaded, newest = self._loaded(job), self._look(job)
        steps = re.findall(r"^step +(\d+)/", job.output(), re.MULTILINE)
        return Kill(
            rank=rank,
            seconds=moment,
            loaded=loaded,
            reached=int(steps[-1]) if steps else 0,
            in_save=bool(at_once | after),
            settled=bool(at_once) and not after,
            cut_off=cut_off,
            newest=newest,
        )

    def _loaded(self, job: Job) -> int | None:
        """The step that a start said it went on from, which must be the newest; None where it said nothing."""
        found = re.search(r"^loaded (.+): step (\d+), sample", job.output(), re.MULTILINE)
        expected = str(step_folder(self._run.checkpoints, self._newest)) if self._newest is not None else "nothing"
        if found is None:
            if self._newest is not None and _have_met(job):
                self._problem(job, f"began anew; the newest whole checkpoint was {expected}")
            return None
        self.resumed += 1
        if (found[1], int(found[2])) != (expected, self._newest):
            self._problem(job, f"went on from {found[1]}, step {found[2]}; the newest whole checkpoint was {expected}")
        return int(found[2])

    def _look(self, job: Job) -> int | None:
        """The step of the newest whole checkpoint; what is not whole or is gone is a problem."""
        whole = []
        for folder in folders_of(self._run.checkpoints):
            wrong = problems_of(folder)
            if not wrong:
                whole.append(step_of(folder))
            elif folder not in self._known:  # it stays until the run comes to its step again
                self._known.add(folder)
                self._problem(job, "; ".join(wrong))
        told = [int(step) for step in re.findall(r"^saved .*step_(\d+) in", job.output(), re.MULTILINE)]
        newest, expected = whole[0] if whole else None, max([*told, self._newest or 0])
        if expected > (newest or 0):
            self._problem(job, f"the newest whole checkpoint is of step {newest}, though step {expected} was saved")
        self._newest = newest
        return newest

    def _problem(self, job: Job, text: str) -> None:
        self.problems.append(f"{job.logs[0].parent.name}: {text}")


def _run(folder: Path, data: str, ranks: int, tensor: int, pipeline: int, zero: int, steps: int) -> Run:
    """16 MB of state, saved at every step, which takes about as long as the step; dropout, so that random state matters."""
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


def _undisturbed(run: Run, deadline: float) -> tuple[Pace | None, list[str]]:
    """Make the run from its start to its end; problems where it does not come there."""
    job = run.start(0)
    begun = time.monotonic()
    try:
        job.wait_for("step ", STARTS)
        first = time.monotonic()
        codes = job.finish(max(1.0, deadline - first))
    except (TimeoutError, AssertionError):
        return None, [f"the undisturbed run did not end in time:\n{job.output()[-800:]}"]
    finally:
        job.send(signal.SIGKILL)
    if any(codes) or "NOT SAVED" in job.output():
        return None, [f"the undisturbed run ended with exit codes {codes}:\n{job.output()[-800:]}"]
    return Pace(first - begun, (time.monotonic() - first) / max(1, run.steps - 1)), []


def _runs_for(job: Job, seconds: float) -> bool:
    """Wait for so long; whether all ranks still run then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(process.exitcode is not None for process in job.ranks):
            return False
        time.sleep(min(0.02, max(0.0, end - time.monotonic())))
    return True


def _ends(job: Job, patience: float) -> tuple[list[int | None], bool]:
    """Wait until all ranks have ended: their exit codes, and whether some had to be killed since they did not."""
    end = time.monotonic() + patience
    while any(process.is_alive() for process in job.ranks) and time.monotonic() < end:
        time.sleep(0.01)
    stay = any(process.is_alive() for process in job.ranks)
    job.send(signal.SIGKILL)
    return job.finish(STARTS), stay


def _have_met(job: Job) -> bool:
    """Whether the ranks had met for certain: rank 0 prints nothing before it."""
    return re.search(r"^(loaded|step) ", job.output(), re.MULTILINE) is not None


def _marks(directory: Path) -> set[str]:
    """What a save leaves that is cut short: folders not whole or not gone, and a newest one that `latest` does not name."""
    newest = max(folders_of(directory), key=lambda folder: step_of(folder) or 0, default=None)
    unnamed = {newest.name} if newest is not None and newest.name != pointed_at(directory) else set()
    return {path.name for path in unfinished(directory)} | unnamed


def _differences(expected: Path, found: Path) -> list[str]:
    """In what two checkpoints are not the same bits."""
    one, other = Reader(expected), Reader(found)
    if one.manifest.tensors.keys() != other.manifest.tensors.keys():
        return [f"{found}: has other parameters than {expected}"]
    wrong = [] if one.manifest.state == other.manifest.state else ["where the run stands"]
    for name, record in one.manifest.tensors.items():
        same = other.manifest.tensors[name]
        if (record.shape, record.kinds) != (same.shape, same.kinds):
            wrong.append(f"shape or kinds of {name}")
            continue
        box = Box((0,) * len(record.shape), tuple(record.shape))
        for kind in record.kinds:
            bits = [reader.read(kind, name, box).view(torch.int32) for reader in (one, other)]
            if not torch.equal(*bits):
                wrong.append(f"{kind} of {name}")
    shown = ", ".join(wrong[:6]) + (f" and {len(wrong) - 6} more" if len(wrong) > 6 else "")
    return [f"{found}: not the bits of {expected}: {shown}"] if wrong else []


if __name__ == "__main__":
    sys.exit(main())
