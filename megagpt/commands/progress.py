"""Progress of long-running commands: a bar on a terminal, or a line every 30 s in a log."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress(what: str, total_bytes: int) -> "tqdm[None] | LogLines":
    """Return a `megagpt.progress.Progress` over `total_bytes`, to be used as a context manager. `what` is its title."""
    if sys.stderr.isatty():
        from tqdm import tqdm  # slow to import

        return tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what)
    return LogLines(what, total_bytes)


class LogLines:
    """Progress as lines on stderr, at most one every `seconds`."""

    def __init__(self, what: str, total_bytes: int, seconds: float = 30.0) -> None:
        self._what = what
        self._total = total_bytes
        self._seconds = seconds
        self._done = 0
        self._start = time.monotonic()
        self._last = self._start

    def update(self, n_bytes: int) -> None:
        """Report that `n_bytes` more bytes are done."""
        self._done += n_bytes
        now = time.monotonic()
        if now - self._last < self._seconds:
            return
        self._last = now
        rate = self._done / (now - self._start)
        seconds_left = max(0, self._total - self._done) / max(rate, 1)
        print(
            f"{self._what}: {self._done / 1e6:.0f} of {self._total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, "
            f"{seconds_left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "LogLines":
        return self

    def __exit__(self, *error: object) -> None:
        return None
