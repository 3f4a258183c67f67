"""The interface of a progress bar."""

from typing import Protocol


class Progress(Protocol):
    """Receives the number of bytes that are done."""

    def update(self, n_bytes: int) -> object:
        """Report that `n_bytes` more bytes are done."""


class NoProgress:
    """Reports nothing."""

    def update(self, n_bytes: int) -> None:
        """Ignore the number."""
