"""The interface of a logger, and several loggers as one. Only rank 0 logs."""

from collections.abc import Sequence
from typing import Any, Protocol

MetricsRecord = dict[str, Any]
"""Metric name -> number. `step`, the number of completed optimizer steps, is in every record."""


class Logger(Protocol):
    """A destination for metrics."""

    def step(self, record: MetricsRecord) -> None:
        """Log one training or evaluation record."""

    def rewind(self, step: int) -> None:
        """Drop or ignore the records after `step`: the run rolled back and repeats these steps."""

    def close(self) -> None:
        """Finish; no more records follow."""


class FanOut:
    """Several loggers as one; without any it does nothing."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self._loggers = tuple(loggers)

    def step(self, record: MetricsRecord) -> None:
        """Send `record` to each logger."""
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
