"""The end of a hang: a thread beside each rank's work that names the rank which others wait for, and where it is.

Every watchdog tells the store where the ranks met how far its own rank is. One whose rank stands still for most of the
timeout looks at what the others tell, waits whether they still tell it, and ends its process at the timeout; the launcher
then ends the others. The rank to blame tells nothing any more (it was stopped), or is the one that is not within a
collective while others are.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from megagpt.errors import listed
from megagpt.parallel.whereabouts import Whereabouts, node_name

T = TypeVar("T")
HUNG = 3
"""Exit code."""
TICKS = 12
"""Reports of each rank in a timeout, at least."""
LONGEST_TICK = 5.0
"""Seconds between reports, at most."""


@dataclass(frozen=True)
class Report:
    """What a rank tells of itself."""

    beat: int
    """Of its watchdog: it goes on while the process runs, whatever the rank waits for."""
    place: str
    seconds: float
    """In this place."""
    call: str
    """The innermost function of its work."""
    communicates: bool
    """Whether that is a collective or a message."""
    node: str


class Watchdog:
    """Used as a context manager around the work. `store` is None on one process."""

    def __init__(self, store: dist.Store | None, rank: int, world: int, where: Whereabouts, timeout_seconds: float) -> None:
        self._rank, self._world, self._where, self._timeout = rank, world, where, timeout_seconds
        self._tick = min(timeout_seconds / TICKS, LONGEST_TICK)
        self._beat = 0
        self._worker = threading.get_ident()
        self._stop = threading.Event()
        self._tells = self._reads = None
        if store is not None:  # connections of its own: a blocked reader must not block the work's use of the store
            self._tells, self._reads = store.clone(), store.clone()  # type: ignore[attr-defined]
            self._reads.set_timeout(timedelta(seconds=self._tick))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._where.at("the start")
        self._tell()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._tick):
            self._tell()
            if self._where.seconds_here > self._timeout - 4 * self._tick:
                before = self._ask()
                if self._still(3 * self._tick):
                    self._end(before, self._ask())

    def _still(self, seconds: float) -> bool:
        """Go on telling for so long; whether the rank is where it was."""
        here, end = self._where.since, time.monotonic() + seconds
        while time.monotonic() < end:
            if self._stop.wait(self._tick / 2) or self._where.since != here:
                return False
            self._tell()
        return True

    def _tell(self) -> None:
        self._beat += 1
        if self._tells is not None:
            with suppress(RuntimeError):  # of torch, where the rank that keeps the store has ended
                self._tells.set(self._key(self._rank), json.dumps(asdict(self._report())))

    def _report(self) -> Report:
        call, communicates = innermost(_frames(self._worker))
        return Report(self._beat, self._where.place, self._where.seconds_here, call, communicates, node_name())

    def _ask(self) -> dict[int, Report]:
        """What all ranks tell, by rank; empty where the store does not answer."""
        if self._reads is None:
            return {self._rank: self._report()}
        told = self._of_store(lambda store: store.multi_get([self._key(rank) for rank in range(self._world)]))
        return {rank: Report(**json.loads(text)) for rank, text in enumerate(told or [])}

    def _of_store(self, question: Callable[[Any], T]) -> T | None:
        """The store's answer, within a tick: its own time-out cannot be relied on. None where it does not answer.

        Where it has ended, so has the rank that keeps it, and this process ends too: that rank has said why.
        """
        answer: list[T] = []
        gone: list[RuntimeError] = []

        def ask() -> None:
            try:
                answer.append(question(self._reads))
            except RuntimeError as error:
                gone.append(error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(self._tick)
        if gone and "timeout" not in str(gone[0]).lower():
            os._exit(HUNG)
        return answer[0] if answer else None

    def _end(self, before: dict[int, Report], now: dict[int, Report]) -> None:
        """Say who is to blame, unless another rank has, and end."""
        head = f"[rank {self._rank}] error: no progress for {self._timeout:g} s (parallel.timeout_seconds)"
        if not before or not now:
            mine = self._report()
            said = f"rank 0, where all ranks meet, does not answer; this rank is at {mine.place}, in {mine.call}"
            print(f"{head}: {said}", file=sys.stderr, flush=True)
        elif self._reads is None or self._of_store(lambda store: store.add("watchdog/said", 1)) == 1:
            print(f"{head}: {verdict(before, now)}", file=sys.stderr, flush=True)
        else:
            time.sleep(self._tick / 4)  # so that the launcher does not end the one that speaks
        os._exit(HUNG)

    @staticmethod
    def _key(rank: int) -> str:
        return f"watchdog/{rank}"


def verdict(before: dict[int, Report], now: dict[int, Report]) -> str:
    """Who is to blame, and where: from what all ranks told at two moments, some ticks apart."""
    silent = sorted(now.keys() - _not_stopped(before, now))
    elsewhere = sorted(rank for rank, report in now.items() if not report.communicates and report.place == before[rank].place)
    blamed = silent or elsewhere or sorted(now)
    why = (
        "gives no sign of life (stopped or cut off), last heard of"
        if silent
        else "is in no collective,"
        if elsewhere
        else "waits"
    )
    said = [f"rank {r} on {now[r].node} {why} at {now[r].place}, in {now[r].call}" for r in blamed[:8]]
    waiting = [f"rank {r} at {now[r].place}" for r in sorted(now) if r not in blamed]
    tail = f"; waiting for it: {listed(waiting, 4)}" if waiting else ""
    return "; ".join(said) + (f" and {len(blamed) - 8} more" if len(blamed) > 8 else "") + tail


def _not_stopped(before: dict[int, Report], now: dict[int, Report]) -> set[int]:
    return {rank for rank, report in now.items() if report.beat != before[rank].beat}


def innermost(stack: Sequence[traceback.FrameSummary]) -> tuple[str, bool]:
    """The innermost function of megagpt and of all, with their lines; and whether it is within a collective or a message."""
    if not stack:
        return "nothing", False
    communicates = any("torch/distributed" in f.filename or f.filename.endswith("pipeline/transfers.py") for f in stack)
    ours = next((frame for frame in reversed(stack) if "megagpt/" in frame.filename), stack[-1])
    told = [ours] if ours is stack[-1] or communicates else [ours, stack[-1]]
    return " > ".join(f"{f.name} ({f.filename.rpartition('megagpt/')[2]}:{f.lineno})" for f in told), communicates


def _frames(thread: int) -> list[traceback.FrameSummary]:
    frame = sys._current_frames().get(thread)
    return list(traceback.extract_stack(frame)) if frame is not None else []
