"""A polite end: the first SIGTERM or SIGUSR1, or the end of the hours, asks for one at the next step; a second signal
is one at once.

Signals are read by a thread (Python's own handlers wait until a blocked collective returns, which may be never).
"""

import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType

REQUEUE = 75
"""Exit code of a run that has saved and wants to be started again (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SAME = 0.5
"""Seconds: SLURM and launchers tell a rank the same thing by several ways at once."""


class Interruption:
    """Used as a context manager around the work, in the main thread. `reason` is what this rank was told."""

    def __init__(self, max_hours: float | None, begun: float) -> None:
        """`begun`: when the hours began, in seconds of `time.monotonic`."""
        self._end = begun + max_hours * 3600 if max_hours is not None else None
        self._max_hours = max_hours
        self._signal: signal.Signals | None = None
        self._last = 0.0
        self._leaving = False

    @property
    def reason(self) -> str | None:
        """Why the run should end at the next step; None while it should not."""
        if self._signal is not None:
            return self._signal.name
        if self._end is not None and time.monotonic() >= self._end:
            return f"training.max_hours {self._max_hours:g}"
        return None

    @property
    def exit_code(self) -> int:
        """Of a run that ended when it was asked to and has nothing saved."""
        return 128 + self._signal if self._signal is not None else 1

    def leave(self) -> None:
        """All is saved: further signals are what ends the other ranks, and must not change the exit code."""
        self._leaving = True

    def __enter__(self) -> "Interruption":
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self._leaving else handler)
        self._theirs.close()

    def _listen(self) -> None:
        while content := self._ours.recv(64):
            for number in content:
                if number in SIGNALS:
                    self._told(signal.Signals(number))
        self._ours.close()

    def _told(self, number: signal.Signals) -> None:
        now, last = time.monotonic(), self._last
        self._last = now
        if self._signal is None:
            self._signal = number
        elif now - last > _SAME and not self._leaving:
            print(f"{number.name} again: ending at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
