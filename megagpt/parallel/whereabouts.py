"""Where a rank is in its step, and how long it has waited for others: what a watchdog and a search for stragglers read."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def node_name() -> str:
    """The host that this process runs on."""
    return socket.gethostname()


class Whereabouts:
    """Kept by the rank as it goes; one assignment an action, so that another thread can read it at any time."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.step = 0
        """In work; 0 before the first."""
        self.at("the start")

    def at(self, phase: str) -> None:
        """Here the rank is now, such as "forward of stage 0, micro-batch 3"."""
        self.place, self.since = f"step {self.step}: {phase}" if self.step else phase, time.monotonic()

    @property
    def seconds_here(self) -> float:
        """Since the last `at`."""
        return time.monotonic() - self.since

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What the block takes is spent on waiting for other ranks; on CUDA the time of its part of the stream."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        begun = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begun

    def take_waited(self) -> float:
        """Seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        events, self._events = self._events, []
        if events:
            events[-1][1].synchronize()
        return seconds + sum(begin.elapsed_time(end) for begin, end in events) / 1000
