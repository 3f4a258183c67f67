"""Output that cannot be written: on a full disk, to a closed pipe, or in an encoding that does not have a character.

A run must not end because of it, so it loses these lines. A tool must report it, because its output is its result.
"""

import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TextIO

P = ParamSpec("P")
UNWRITABLE = 2
"""Exit code of a tool whose output could not be written; the same as for other errors that the user can fix."""
CLOSED_PIPE = 141
"""Exit code of a tool whose output pipe was closed: 128 + SIGPIPE, as a shell reports it for other programs."""


def note(text: str) -> None:
    """Print a line about the progress of something slow to standard error."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextmanager
def lossy_output() -> Iterator[None]:
    """In this block `print` never fails, also in libraries: a line that cannot be written is lost, the next one is tried.

    Standard output and standard error are replaced, except where they are replaced already.
    """
    with _lossy("stdout"), _lossy("stderr"):
        yield


def report_unwritable(run: Callable[P, int]) -> Callable[P, int]:
    """Decorate a function that returns an exit code: output that cannot be written becomes an error.

    A closed pipe ends quietly with `CLOSED_PIPE`, anything else in one sentence with `UNWRITABLE`. The code of another
    error has priority. Characters that the encoding does not have are printed as escapes.
    """

    @functools.wraps(run)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=_escaping(sys.stdout))
        try:
            code = run(*args, **kwargs)
        except SystemExit as exit:  # argparse, after --help or an error
            error = _flush_error()
            if error is None or exit.code:
                raise
            sys.exit(_exit_code(error))
        except OSError:
            error = _flush_error("\n")  # shows whether the output is the cause
            if error is None:
                raise
            return _exit_code(error)
        error = _flush_error()
        return code if error is None or code else _exit_code(error)

    return wrapper


class _LossyFile(io.RawIOBase):
    """A file descriptor to write to that ignores errors."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError:
            return len(data)


@contextmanager
def _lossy(name: str) -> Iterator[None]:
    stream = getattr(sys, name)
    if stream is None or stream is not getattr(sys, f"__{name}__"):
        yield
        return
    buffer = io.BufferedWriter(_LossyFile(stream.fileno()))
    setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, _escaping(stream), line_buffering=True))
    try:
        yield
    finally:
        setattr(sys, name, stream)


def _escaping(stream: TextIO) -> str | None:
    """Return the stream's error handler; escapes in place of exceptions."""
    return "backslashreplace" if stream.errors == "strict" else stream.errors


def _flush_error(more: str = "") -> OSError | None:
    """Write `more` to standard output and flush it. Return the error, after the output has been sent to /dev/null.

    Without that, Python's own flush at exit would print the error again and set exit code 120.
    """
    if sys.stdout is None:  # closed before the program started
        return None
    try:
        if more:  # /dev/full refuses an empty write, too
            sys.stdout.write(more)
        sys.stdout.flush()
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        sys.stdout.flush()
        return error
    return None


def _exit_code(error: OSError) -> int:
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr, flush=True)
    return UNWRITABLE
