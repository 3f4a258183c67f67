"""Hang detection: a thread on each rank that ends a job without progress, and names the rank that the others wait for.

Every watchdog reports its rank's phase to the store that the ranks connected through. If its own rank makes no progress
for most of the timeout, it reads the other ranks' reports, checks that nothing changes, and exits at the timeout; the
launcher then ends the other ranks. The rank to blame is the one that stopped reporting (its process is stopped), or the
one that is in no collective while the others are.
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
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from megagpt.distributed.phase import PhaseTracker, host_name
from megagpt.errors import listed

T = TypeVar("T")
HUNG = 3
"""Exit code of a hung job."""
REPORTS_PER_TIMEOUT = 12
"""Minimum number of reports of each rank within the timeout."""
MAX_REPORT_INTERVAL = 5.0
"""Seconds."""
PACKAGE = str(Path(__file__).parents[1]) + os.sep
"""Folder of megagpt's source. Not any path with that name in it: a clone, with torch in its .venv, often has it, too."""


@dataclass(frozen=True)
class Report:
    """State of one rank, as its watchdog reports it."""

    beat: int
    """Counter of the watchdog: it grows as long as the process runs, even if the rank waits."""
    phase: str
    seconds: float
    """Seconds in this phase."""
    call: str
    """Innermost function of the rank's main thread."""
    communicates: bool
    """Whether that function is a collective or a message."""
    host: str


class Watchdog:
    """Context manager around the training. `store` is None on one process."""

    def __init__(self, store: dist.Store | None, rank: int, world: int, phase: PhaseTracker, timeout_seconds: float) -> None:
        self._rank = rank
        self._world = world
        self._phase = phase
        self._timeout = timeout_seconds
        self._interval = min(timeout_seconds / REPORTS_PER_TIMEOUT, MAX_REPORT_INTERVAL)
        self._beat = 0
        self._worker = threading.get_ident()
        self._stop = threading.Event()
        self._write_store: Any = None
        self._read_store: Any = None
        if store is not None:  # own connections: a blocked read must not block the training's use of the store
            self._write_store = store.clone()  # type: ignore[attr-defined]
            self._read_store = store.clone()  # type: ignore[attr-defined]
            self._read_store.set_timeout(timedelta(seconds=self._interval))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._phase.enter("startup")
        self._publish()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._publish()
            if self._phase.seconds > self._timeout - 4 * self._interval:
                before = self._read_reports()
                if self._unchanged_for(3 * self._interval):
                    self._exit(before, self._read_reports())

    def _unchanged_for(self, seconds: float) -> bool:
        """Keep reporting for `seconds`; return whether the rank stayed in its phase."""
        since, end = self._phase.since, time.monotonic() + seconds
        while time.monotonic() < end:
            if self._stop.wait(self._interval / 2) or self._phase.since != since:
                return False
            self._publish()
        return True

    def _publish(self) -> None:
        self._beat += 1
        if self._write_store is not None:
            with suppress(RuntimeError):  # raised by torch if the rank that hosts the store has ended
                self._write_store.set(self._key(self._rank), json.dumps(asdict(self._report())))

    def _report(self) -> Report:
        call, communicates = innermost_call(_frames(self._worker))
        return Report(self._beat, self._phase.name, self._phase.seconds, call, communicates, host_name())

    def _read_reports(self) -> dict[int, Report]:
        """Return the reports of all ranks; empty if the store does not answer."""
        if self._read_store is None:
            return {self._rank: self._report()}
        texts = self._query(lambda store: store.multi_get([self._key(rank) for rank in range(self._world)]))
        return {rank: Report(**json.loads(text)) for rank, text in enumerate(texts or [])}

    def _query(self, question: Callable[[Any], T]) -> T | None:
        """Return the store's answer, or None if it takes longer than an interval: its own timeout is not reliable.

        If the store has ended, so has the rank that hosts it, and this process exits too: that rank has reported why.
        """
        answer: list[T] = []
        errors: list[RuntimeError] = []

        def ask() -> None:
            try:
                answer.append(question(self._read_store))
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(self._interval)
        if errors and "timeout" not in str(errors[0]).lower():
            os._exit(HUNG)
        return answer[0] if answer else None

    def _exit(self, before: dict[int, Report], now: dict[int, Report]) -> None:
        """Print which rank is to blame, unless another rank has, and exit."""
        head = f"[rank {self._rank}] error: no progress for {self._timeout:g} s (parallel.timeout_seconds)"
        if not before or not now:
            own = self._report()
            text = f"rank 0, which hosts the store, does not answer; this rank is in {own.phase}, in {own.call}"
            print(f"{head}: {text}", file=sys.stderr, flush=True)
        elif self._read_store is None or self._query(lambda store: store.add("watchdog/reported", 1)) == 1:
            print(f"{head}: {diagnose(before, now)}", file=sys.stderr, flush=True)
        else:
            time.sleep(self._interval / 4)  # so that the launcher does not end the rank that prints
        os._exit(HUNG)

    @staticmethod
    def _key(rank: int) -> str:
        return f"watchdog/{rank}"


def diagnose(before: dict[int, Report], now: dict[int, Report]) -> str:
    """Name the ranks to blame and their phase, from all ranks' reports at two times a few intervals apart."""
    silent = sorted(rank for rank, report in now.items() if report.beat == before[rank].beat)
    not_communicating = sorted(
        rank for rank, report in now.items() if not report.communicates and report.phase == before[rank].phase
    )
    if silent:
        blamed, state = silent, "stopped responding; last seen"
    elif not_communicating:
        blamed, state = not_communicating, "is in no collective,"
    else:
        blamed, state = sorted(now), "waits"
    sentences = [f"rank {r} ({now[r].host}) {state} in {now[r].phase}, in {now[r].call}" for r in blamed[:8]]
    rest = f" and {len(blamed) - 8} more" if len(blamed) > 8 else ""
    waiting = [f"rank {r} in {now[r].phase}" for r in sorted(now) if r not in blamed]
    return "; ".join(sentences) + rest + (f"; waiting for it: {listed(waiting, 4)}" if waiting else "")


def innermost_call(stack: Sequence[traceback.FrameSummary]) -> tuple[str, bool]:
    """Return the innermost function of megagpt and of the stack with their lines, and whether it communicates."""
    if not stack:
        return "nothing", False
    communicates = any("torch/distributed" in f.filename or f.filename.endswith("pipeline/transfers.py") for f in stack)
    own = next((frame for frame in reversed(stack) if frame.filename.startswith(PACKAGE)), stack[-1])
    frames = [own] if own is stack[-1] or communicates else [own, stack[-1]]
    return " > ".join(f"{f.name} ({f.filename.removeprefix(PACKAGE)}:{f.lineno})" for f in frames), communicates


def _frames(thread: int) -> list[traceback.FrameSummary]:
    frame = sys._current_frames().get(thread)
    return list(traceback.extract_stack(frame)) if frame is not None else []
