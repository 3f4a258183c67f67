"""Graceful shutdown: a signal, the end of max_hours or of the launcher requests a stop after the current step.

A second signal exits immediately. A thread reads the signals, because Python's own handlers wait until a blocked
collective returns, which may be never.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

from megagpt.distributed.launcher_processes import LauncherProcess, has_ended, launchers_above

REQUEUE = 75
"""Exit code of a run that has saved and should be started again (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
LAUNCHER_ENDED = "the launcher has ended"
"""Reason to stop of a rank that a launcher has left behind."""
_SAME_SIGNAL_SECONDS = 0.5
"""Signals within this time count as one: SLURM and launchers send the same request in several ways at once."""
_LAUNCHER_CHECK_SECONDS = 1.0


class SignalThread:
    """Context manager in the main thread: a thread calls functions on signals and at the end of a launcher of this process.

    A signal that was ignored before stays ignored: `nohup` ignores SIGHUP, and shells ignore SIGINT for a background job.
    """

    def __init__(self, on_signal: Callable[[signal.Signals], None], on_launcher_end: Callable[[], None]) -> None:
        self._on_signal = on_signal
        self._on_launcher_end = on_launcher_end
        self.ignore_after = False
        """Whether the process ignores the signals after the block."""

    def __enter__(self) -> "SignalThread":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {
            number: signal.signal(number, lambda *_: None) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN
        }
        launchers = launchers_above(os.getpid())
        threading.Thread(target=self._listen, args=(launchers,), name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self.ignore_after else handler)
        self._writer.close()

    def _listen(self, launchers: Sequence[LauncherProcess]) -> None:
        self._reader.settimeout(_LAUNCHER_CHECK_SECONDS if launchers else None)
        while True:
            try:
                content = self._reader.recv(64)
            except TimeoutError:
                if any(map(has_ended, launchers)):
                    self._reader.settimeout(None)
                    self._on_launcher_end()
                continue
            if not content:
                break
            for number in content:
                if number in SIGNALS:
                    self._on_signal(signal.Signals(number))
        self._reader.close()


def ending_at_once(rank: int) -> SignalThread:
    """Return a context manager for the start of a run, in which a signal or the end of the launcher ends the process.

    Nothing is trained, so nothing is saved. The exit code is 128 + the signal's number.
    """

    def end(reason: str, code: int) -> None:
        if rank == 0:  # launchers send signals to all ranks
            _print(f"{reason}: the run ends before its first step")
        os._exit(code)

    return SignalThread(
        on_signal=lambda number: end("interrupted" if number == signal.SIGINT else number.name, 128 + number),
        on_launcher_end=lambda: end(LAUNCHER_ENDED, 128 + signal.SIGTERM),
    )


class Interruption:
    """Context manager around the training, in the main thread. `reason` is this rank's request to stop."""

    def __init__(self, max_hours: float | None, start_time: float, rank: int = 0) -> None:
        """`start_time`: when max_hours starts to count, in seconds of `time.monotonic`. Rank 0 reports a signal."""
        self._rank = rank
        self._end = start_time + max_hours * 3600 if max_hours is not None else None
        self._max_hours = max_hours
        self._signal: signal.Signals | None = None
        self._last_signal_time = 0.0
        self._launcher_ended = False
        self._thread = SignalThread(self._receive, self._lose_launcher)

    @property
    def reason(self) -> str | None:
        """Why the run should stop after the current step; None if it should not."""
        if self._signal is not None:
            return self._signal.name
        if self._launcher_ended:
            return LAUNCHER_ENDED
        if self._end is not None and time.monotonic() >= self._end:
            return f"training.max_hours {self._max_hours:g}"
        return None

    def leave(self) -> None:
        """Ignore further signals: the state is saved, and signals that end other ranks must not change the exit code."""
        self._thread.ignore_after = True

    def __enter__(self) -> "Interruption":
        self._thread.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.__exit__(kind, error, trace)

    def _lose_launcher(self) -> None:
        self._launcher_ended = True

    def _receive(self, number: signal.Signals) -> None:
        now, last = time.monotonic(), self._last_signal_time
        self._last_signal_time = now
        if self._signal is None:
            self._signal = number
            if self._rank == 0:  # all ranks of a terminal or a launcher have received it
                _print(f"{number.name}: stopping after the current step; a second signal ends the run immediately")
        elif now - last > _SAME_SIGNAL_SECONDS and not self._thread.ignore_after:
            _print(f"{number.name} again: exiting immediately")
            os._exit(128 + number)


def exit_code(reasons: Sequence[str | None], saved: bool) -> int:
    """Return the exit code of a run that stops early, from the reasons of all ranks.

    130 after Ctrl-C, `REQUEUE` after another reason if the state is saved; otherwise 128 + the number of a signal, or 1.
    """
    if signal.SIGINT.name in reasons:
        return 128 + signal.SIGINT
    if saved:
        return REQUEUE
    return next((128 + number for number in SIGNALS if number.name in reasons), 1)


def _print(text: str) -> None:
    with suppress(OSError, ValueError):  # the terminal may have ended, too
        print(text, file=sys.stderr, flush=True)
