"""Graceful shutdown: the first SIGTERM or SIGUSR1, or the end of max_hours, requests a stop after the current step.

A second signal exits immediately. A thread reads the signals, because Python's own handlers wait until a blocked
collective returns, which may be never.
"""

import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType

REQUEUE = 75
"""Exit code of a run that has saved and should be started again (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SAME_SIGNAL_SECONDS = 0.5
"""Signals within this time count as one: SLURM and launchers send the same request in several ways at once."""


class Interruption:
    """Context manager around the training, in the main thread. `reason` is this rank's request to stop."""

    def __init__(self, max_hours: float | None, start_time: float) -> None:
        """`start_time`: when max_hours starts to count, in seconds of `time.monotonic`."""
        self._end = start_time + max_hours * 3600 if max_hours is not None else None
        self._max_hours = max_hours
        self._signal: signal.Signals | None = None
        self._last_signal_time = 0.0
        self._leaving = False

    @property
    def reason(self) -> str | None:
        """Why the run should stop after the current step; None if it should not."""
        if self._signal is not None:
            return self._signal.name
        if self._end is not None and time.monotonic() >= self._end:
            return f"training.max_hours {self._max_hours:g}"
        return None

    @property
    def exit_code(self) -> int:
        """Exit code of a run that stopped on request without a saved checkpoint."""
        return 128 + self._signal if self._signal is not None else 1

    def leave(self) -> None:
        """Ignore further signals: the state is saved, and signals that end other ranks must not change the exit code."""
        self._leaving = True

    def __enter__(self) -> "Interruption":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self._leaving else handler)
        self._writer.close()

    def _listen(self) -> None:
        while content := self._reader.recv(64):
            for number in content:
                if number in SIGNALS:
                    self._receive(signal.Signals(number))
        self._reader.close()

    def _receive(self, number: signal.Signals) -> None:
        now, last = time.monotonic(), self._last_signal_time
        self._last_signal_time = now
        if self._signal is None:
            self._signal = number
        elif now - last > _SAME_SIGNAL_SECONDS and not self._leaving:
            print(f"{number.name} again: exiting immediately", file=sys.stderr, flush=True)
            os._exit(128 + number)
