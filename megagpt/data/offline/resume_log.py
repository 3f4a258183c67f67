"""What an unfinished preprocessing run has done: one line of JSON for its settings, then one for each point to resume at.

A line that was cut short by a crash is as if it had never been written.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from megagpt.errors import DataError

Record = dict[str, Any]


class Journal:
    """The journal file beside an output that is being written; locked, so that two runs cannot write the same output."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where another run holds it, or the folder cannot be written."""
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
            pass  # a file system without locks: two runs at once are the user's to avoid

    def read(self) -> list[Record]:
        """The settings and the points, as far as they were written whole; empty for a new journal."""
        self._file.seek(0)
        found: list[Record] = []
        for line in self._file.read().split(b"\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def start(self, settings: Record) -> None:
        """Begin anew."""
        self._file.truncate(0)
        self.add(settings)

    def add(self, record: Record) -> None:
        """Append one line; on the disk when this returns."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leave it for a later run."""
        self._file.close()

    def remove(self) -> None:
        """The work is done."""
        self.path.unlink(missing_ok=True)
        self._file.close()
