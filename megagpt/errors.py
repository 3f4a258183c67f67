"""The project's own errors: what a user can mend, said in one sentence, printed without a traceback."""

from collections.abc import Iterable


class MegagptError(Exception):
    """Base of every error that is the input's fault, not the program's."""


class ConfigError(MegagptError):
    """A config, a flag or a layout that cannot run."""


class DataError(MegagptError):
    """A corpus, tokenizer or index file that is missing, damaged or does not match."""


class CheckpointError(MegagptError):
    """A checkpoint that is missing, damaged or of another model."""


class TrainingError(MegagptError):
    """A run that must not go on: its loss, its weights or its ranks are not what they should be."""


def listed(items: Iterable[str], most: int = 8) -> str:
    """A list for a message, cut where it is long."""
    found = list(items)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
