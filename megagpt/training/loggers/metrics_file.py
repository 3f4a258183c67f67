"""What a metrics file may be and may contain, checked before anything is written to it. Does not import torch."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megagpt.errors import ConfigError

MAX_LINE_BYTES = 2**20
"""A longer line is no record; a file is never read in larger pieces."""
RECORD_START = b'{"step"'
"""How every record starts, so that an incomplete one can be recognized."""


class Contents(NamedTuple):
    """Records of a metrics file up to some step, and what follows them."""

    kept: int
    """Number of records up to the step."""
    kept_bytes: int
    """Position in the file where these records end."""
    later: int
    """Number of records after the step."""
    in_order: bool
    """Whether the steps never decrease."""


def parse_record(line: bytes | str) -> dict[str, Any] | None:
    """Return the record in a line, or None if the line is not a JSON object with an integer `step`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) else None


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file with their line ends, in pieces of at most `MAX_LINE_BYTES`."""
    while line := file.readline(MAX_LINE_BYTES):
        yield line


def read_contents(path: Path, step: int) -> Contents:
    """Return what a metrics file contains up to `step` and after it. An incomplete last line is not counted.

    Raises ConfigError if the file contains anything else than records, and OSError if it cannot be read.
    """
    kept = kept_bytes = later = position = 0
    in_order, last = True, 0
    with path.open("rb") as file:
        for number, line in enumerate(lines_of(file), start=1):
            record = parse_record(line) if line.endswith(b"\n") else None
            if record is None:
                if _is_incomplete(line, n_records=number - 1) and not file.read(1):
                    break
                raise ConfigError(
                    f"logging.metrics_file: {path}: line {number} is not a JSON record with a step, so this is not a metrics "
                    "file; name another file"
                )
            position += len(line)
            in_order, last = in_order and record["step"] >= last, record["step"]
            if record["step"] > step:
                later += 1
            else:
                kept, kept_bytes = kept + 1, position
    return Contents(kept, kept_bytes, later, in_order)


def require_metrics_file(path: str | Path) -> Path:
    """Return the path with all symbolic links resolved, of a regular file or of one that can be created.

    Raises ConfigError if it is anything else, or if it cannot be written. Creates nothing, and does not read the content.
    """
    real = Path(os.path.realpath(path))
    try:
        kind = Path(path).stat().st_mode
    except FileNotFoundError:
        folder = next(parent for parent in real.parents if parent.exists())
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"logging.metrics_file: {path}: cannot be written: {folder} is read-only for this user") from None
        return real
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from None
    if stat.S_ISDIR(kind):
        raise ConfigError(f"logging.metrics_file: {path}: is a folder; name a file in it, for example {path}/metrics.jsonl")
    if not stat.S_ISREG(kind):
        raise ConfigError(f"logging.metrics_file: {path}: is a device or a pipe; name a regular file, or leave the key out")
    if not os.access(real, os.R_OK | os.W_OK):
        raise ConfigError(f"logging.metrics_file: {path}: cannot be written: this user may not read and write the file")
    return real


def cannot_write(path: str | Path, error: Exception) -> ConfigError:
    """Return the error for a metrics file that the operating system refuses."""
    return ConfigError(f"logging.metrics_file: {path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def _is_incomplete(line: bytes, n_records: int) -> bool:
    """Return whether a last line is what a killed run or a power failure leaves of a record."""
    if line.startswith(RECORD_START):
        return not line.rstrip().endswith(b"}") or parse_record(line) is not None
    if RECORD_START.startswith(line):
        return True
    return n_records > 0 and not line.strip(b"\0")  # blocks that the file system had allocated, but not written
