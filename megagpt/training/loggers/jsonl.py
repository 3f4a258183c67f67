"""Metrics as a file of JSON lines."""

import json
from pathlib import Path

from megagpt.errors import ConfigError
from megagpt.training.loggers.base import MetricsRecord


class JsonlLogger:
    """Writes one JSON line per record and flushes it. NaN and Infinity are written as `json.loads` reads them."""

    def __init__(self, path: str | Path) -> None:
        """Append to `path`; missing folders are created. Raises ConfigError if the file cannot be written."""
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"logging.metrics_file: {path}: cannot be written: {error.strerror}") from None

    def step(self, record: MetricsRecord) -> None:
        """Append `record`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Drop the records after `step`."""
        self.truncate_after(step)

    def truncate_after(self, step: int) -> None:
        """Drop the records after `step`, and an incomplete last line of a killed run.

        If a run starts at step 0 and the file has records of another run, they are saved as `<name>.previous`.
        Raises ConfigError if the file contains anything else, because then it is not a metrics file.
        """
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if lines and not (lines[-1].endswith("\n") and _is_record(lines[-1])):
            lines.pop()
        for number, line in enumerate(lines, start=1):
            if not _is_record(line):
                raise ConfigError(
                    f"logging.metrics_file: {self._path}: line {number} is not a JSON record with a step; name another file"
                )
        if step == 0 and lines:
            self._path.with_name(self._path.name + ".previous").write_text("".join(lines), encoding="utf-8")
        remaining = [line for line in lines if json.loads(line)["step"] <= step and step > 0]
        temporary = self._path.with_name(self._path.name + ".new")
        temporary.write_text("".join(remaining), encoding="utf-8")
        self._file.close()
        temporary.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int)
