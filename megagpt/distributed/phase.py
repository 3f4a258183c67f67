"""The phase of a step that a rank is in, and the time that it spends waiting for other ranks.

The watchdog and the straggler detection read these values.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def host_name() -> str:
    """Return the name of the host that this process runs on."""
    return socket.gethostname()


class PhaseTracker:
    """Current phase of this rank.

    Each update is one assignment, so the watchdog thread can read the fields at any time.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.step = 0
        """Optimizer step in progress; 0 before the first one."""
        self.enter("startup")

    def enter(self, phase: str) -> None:
        """Set the current phase, for example "forward of stage 0, micro-batch 3"."""
        self.name = f"step {self.step}: {phase}" if self.step else phase
        self.since = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the rank entered its current phase."""
        return time.monotonic() - self.since

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of this block as waiting for other ranks; on CUDA, the time of its work on the current stream."""
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
            return
        start_seconds = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start_seconds

    def take_wait_seconds(self) -> float:
        """Return the seconds spent waiting since the last call, and reset the counter."""
        seconds, self._seconds = self._seconds, 0.0
        events, self._events = self._events, []
        if events:
            events[-1][1].synchronize()
        return seconds + sum(start.elapsed_time(end) for start, end in events) / 1000
