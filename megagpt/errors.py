"""The project's own errors: problems that a user can fix, reported in one sentence without a traceback."""

from collections.abc import Iterable


class MegagptError(Exception):
    """Base class of all errors caused by the input or the environment, not by a bug."""


class ConfigError(MegagptError):
    """A config, a flag or a layout that cannot run."""


class DataError(MegagptError):
    """A corpus, tokenizer or index file that is missing, damaged or does not match."""


class CheckpointError(MegagptError):
    """A checkpoint that is missing, damaged or of another model."""


class StorageError(CheckpointError):
    """A checkpoint file or folder that the operating system cannot read or write."""


class TrainingError(MegagptError):
    """A run that must stop: its loss, its weights or its ranks are not valid."""


class ReportedError(MegagptError):
    """An error that another rank has reported already: this rank ends without a message, with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another rank has reported an error")
        self.exit_code = exit_code


def listed(items: Iterable[str], limit: int = 8) -> str:
    """Join items for a message, for example "a, b and 3 more"; at most `limit` items are named."""
    names = list(items)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
