"""How far long work has come: a bar on a terminal, now and then a whole line in a log."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress(what: str, total_bytes: int) -> "tqdm[None] | LogLines":
    """Told of bytes done by `update`; used as a context manager."""
    if sys.stderr.isatty():
        from tqdm import tqdm  # its import takes a tenth of a small run

        return tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what)
    return LogLines(what, total_bytes)


class LogLines:
    """Progress in a log: a whole line every `seconds`."""

    def __init__(self, what: str, total_bytes: int, seconds: float = 30.0) -> None:
        self._what, self._total, self._seconds, self._done = what, total_bytes, seconds, 0
        self._start = self._last = time.monotonic()

    def update(self, n_bytes: int) -> None:
        """`n_bytes` more are done."""
        self._done += n_bytes
        now = time.monotonic()
        if now - self._last < self._seconds:
            return
        self._last = now
        rate = self._done / (now - self._start)
        left = max(0, self._total - self._done) / max(rate, 1)
        print(
            f"{self._what}: {self._done / 1e6:.0f} of {self._total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "LogLines":
        return self

    def __exit__(self, *error: object) -> None:
        return None
