"""The interface of a logger, and several loggers as one. Only rank 0 logs."""

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, Protocol

from megagpt.output import warn

MetricsRecord = dict[str, Any]
"""Metric name -> number. `step`, the number of completed optimizer steps, is in every record and comes first."""


class Logger(Protocol):
    """A destination for metrics."""

    def step(self, record: MetricsRecord) -> None:
        """Log one training or evaluation record."""

    def rewind(self, step: int) -> None:
        """Drop or ignore the records after `step`: the run rolled back and repeats these steps."""

    def close(self) -> None:
        """Finish; no more records follow."""


class FanOut:
    """Several loggers as one; without any it does nothing. Adds the time to each record."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self._loggers = tuple(loggers)

    def step(self, record: MetricsRecord) -> None:
        """Send `record` to each logger, with the present time (UTC, ISO 8601) as `time`."""
        record = {**record, "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
        for logger in self._loggers:
            logger.step(record)

    def rewind(self, step: int) -> None:
        """Rewind each logger."""
        for logger in self._loggers:
            logger.rewind(step)

    def close(self) -> None:
        """Close each logger."""
        for logger in self._loggers:
            logger.close()


class Tolerant:
    """A logger whose exceptions become one warning: a tracker that fails must not end the run."""

    def __init__(self, logger: Logger, key: str) -> None:
        """`key`: the config key that asks for the logger; named in the warning."""
        self._logger = logger
        self._key = key
        self._warned = False

    def step(self, record: MetricsRecord) -> None:
        """Log `record` if possible."""
        try:
            self._logger.step(record)
        except Exception as error:
            self._warn(error)

    def rewind(self, step: int) -> None:
        """Rewind the logger if possible."""
        try:
            self._logger.rewind(step)
        except Exception as error:
            self._warn(error)

    def close(self) -> None:
        """Close the logger if possible."""
        try:
            self._logger.close()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            warn(f"{self._key}: {reason}; training continues, but records may be missing there")
        self._warned = True
