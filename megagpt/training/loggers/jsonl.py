"""Metrics as a file of JSON lines."""

import json
import math
import os
from collections import deque
from itertools import islice
from pathlib import Path

from megagpt.errors import ConfigError
from megagpt.output import warn
from megagpt.training.loggers.base import MetricsRecord
from megagpt.training.loggers.metrics_file import Contents, cannot_write, read_contents, require_metrics_file

MAX_UNWRITTEN = 10_000
"""Records that are kept in memory, some megabytes, while the file cannot be written. After that the oldest are lost."""

BATCH = 256
"""Records that are written at once."""


class JsonlLogger:
    """Writes one JSON line per record. A full disk does not end the run: records wait in memory until it has room again."""

    def __init__(self, path: str | Path, start_step: int = 0) -> None:
        """Open the file for a run that starts after `start_step` steps; missing folders are created.

        Records after `start_step` are dropped, because these steps run again. At step 0, and if the file has records of
        several runs, its records are kept in another file, and a new one is started.
        Raises ConfigError if the file cannot be written or contains anything else than records.
        """
        self._path = require_metrics_file(path)
        self._unwritten: deque[tuple[int, bytes]] = deque()
        """Step and line of the records that are not in the file yet."""
        self._lost = 0
        self._failed = False
        self._rewind_to: int | None = None
        """A step whose later records must still be removed from the file."""
        self._cut_at: int | None = None
        """Size of the file without an incomplete line that must still be removed."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("ab").close()
            self._begin(start_step)
        except OSError as error:
            raise cannot_write(path, error) from None

    def step(self, record: MetricsRecord) -> None:
        """Append `record`."""
        if len(self._unwritten) == MAX_UNWRITTEN:
            self._unwritten.popleft()
            self._lost += 1
        self._unwritten.append((record["step"], to_json_line(record)))
        self._write()

    def rewind(self, step: int) -> None:
        """Drop the records after `step`."""
        self._unwritten = deque(entry for entry in self._unwritten if entry[0] <= step)
        self._rewind_to = step if self._rewind_to is None else min(step, self._rewind_to)
        self._write()

    def close(self) -> None:
        """Write the records that are left, if possible."""
        if self._unwritten or self._lost:
            self._write()
        if self._unwritten:
            warn(f"logging.metrics_file: {self._path}: {len(self._unwritten) + self._lost} records could not be written")

    def _write(self) -> None:
        """Write all records that wait, or warn once that this is not possible."""
        waiting = len(self._unwritten)
        try:
            if self._rewind_to is not None and self._path.exists():
                self._drop_after(self._rewind_to, read_contents(self._path, self._rewind_to))
            self._rewind_to = None
            while batch := list(islice(self._unwritten, BATCH)):
                self._append(b"".join(line for _, line in batch))
                for _ in batch:
                    self._unwritten.popleft()
        except (OSError, ConfigError) as error:
            if not self._failed:
                warn(
                    f"logging.metrics_file: {self._path}: cannot be written: {getattr(error, 'strerror', None) or error}; "
                    "training continues, and the records are kept until it can be written again"
                )
            self._failed = True
            return
        if self._failed:
            lost = f", {self._lost} of the oldest are lost" if self._lost else ""
            self._report(f"written again, {waiting} records at once{lost}")
        self._failed, self._lost = False, 0

    def _append(self, lines: bytes) -> None:
        """Append complete lines. Raises OSError, and then removes what was written of them, now or before the next lines.

        The file is opened for each call: a network file system reports a full disk when a file is closed.
        """
        with self._path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if self._cut_at is not None and self._cut_at < size:
                size = file.truncate(self._cut_at)
            self._cut_at = size
            try:
                while lines:
                    lines = lines[file.write(lines) :]
            except OSError:
                file.truncate(size)
                raise
        self._cut_at = None

    def _begin(self, step: int) -> None:
        """Remove the records of steps that run again, or move all records to another file."""
        contents = read_contents(self._path, step)
        if self._path.stat().st_size and (step == 0 or not contents.in_order):
            name = _free_name(self._path)
            self._path.replace(name)
            self._path.touch()
            self._report(f"the {contents.kept + contents.later} records of an earlier run are now in {name}")
        else:
            self._drop_after(step, contents)

    def _drop_after(self, step: int, contents: Contents) -> None:
        """Remove the records after `step` and an incomplete last line; report how many records."""
        os.truncate(self._path, contents.kept_bytes)
        self._cut_at = None
        if contents.later:
            self._report(f"{contents.later} records after step {step} removed; these steps run again")

    def _report(self, text: str) -> None:
        print(f"logging.metrics_file: {self._path}: {text}", flush=True)


def to_json_line(record: MetricsRecord) -> bytes:
    """Return the record as a line of strict JSON, which has no NaN and no Infinity.

    Such a number is written as null, and as text ("nan", "inf" or "-inf") under its name and `_text`.
    """
    values: MetricsRecord = {}
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            values |= {name: None, f"{name}_text": str(value)}
        else:
            values[name] = value
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def _free_name(path: Path) -> Path:
    """Create an empty file with the first free name of `path`.1, `path`.2, ...; return its path."""
    number = 1
    while True:
        name = path.with_name(f"{path.name}.{number}")
        try:
            name.open("xb").close()
            return name
        except FileExistsError:
            number += 1
