"""The log of an unfinished preprocessing run: one JSON line with its settings, then one line per resume point.

A line that a crash left incomplete is ignored.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from megagpt.errors import DataError

LogRecord = dict[str, Any]


class ResumeLog:
    """The log file beside an unfinished output. It is locked, so two runs cannot write the same output."""

    def __init__(self, path: Path) -> None:
        """Raises DataError if another run holds the lock, or if the folder cannot be written."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise DataError(f"{path.parent}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise DataError(f"{path}: another run is writing this output; wait for it, or choose another prefix") from None
        except OSError:
            pass  # the file system has no locks: the user must avoid two runs at once

    def read(self) -> list[LogRecord]:
        """Return the settings and the resume points that are complete; empty for a new log."""
        self._file.seek(0)
        records: list[LogRecord] = []
        for line in self._file.read().split(b"\n")[:-1]:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def start(self, settings: LogRecord) -> None:
        """Empty the log and write the settings."""
        self._file.truncate(0)
        self.add(settings)

    def add(self, record: LogRecord) -> None:
        """Append one line and flush it to disk."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and leave it for a later run."""
        self._file.close()

    def remove(self) -> None:
        """Remove the file: the run is complete."""
        self.path.unlink(missing_ok=True)
        self._file.close()
