"""Read the arguments of Megatron-LM in a command, a shell script, or a file with one argument per line."""

import math
import re
import shlex
from typing import Any, NamedTuple

from megagpt.config.foreign_tables import LAUNCHER_NAMES
from megagpt.errors import ConfigError


class Repeated(NamedTuple):
    """Values of an argument that is given more than once; the last one counts, as in Python's argparse."""

    earlier: Any
    last: Any


COMPUTED = "$computed"
"""Value in the place of what the shell would compute: $((...)), $(...) and `...`."""
_END = "::end::"
"""Word in the place of what ends an array of bash."""


def from_arguments(text: str) -> dict[str, Any]:
    """Return the arguments in a text, with underscores in their names. Words that are no arguments are skipped.

    A name that has two different values gets a `Repeated`.
    Raises ConfigError if quotes do not match or if there is no argument.
    """
    text = re.sub(r"\$\(\(.*?\)\)|\$\(.*?\)|`.*?`", f"'{COMPUTED}'", text.replace("\\\n", " "))
    text = re.sub(r"\w+=\(|\)", f" {_END} ", text)  # arrays of bash: NAME=( ... )
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise ConfigError(f"the arguments cannot be read: {error}") from None
    quoted = [word for word in words if " " in word and re.search(r"(^|=|\s)--", word)]  # MODEL="--num-layers 32 ..."
    plain = [word for word in words if word not in quoted and not re.match(r"\w+=", word)]
    given = [pair for word in quoted for pair in _arguments(re.sub(r"^\w+=(?=\s*--)", "", word).split())] + _arguments(plain)
    values: dict[str, Any] = {}
    for name, value in given:
        values[name] = value if values.get(name, value) == value else Repeated(values[name], value)
    for name in LAUNCHER_NAMES:
        values.pop(name, None)
    if not values:
        raise ConfigError("no argument such as --num-layers was found")
    return values


def _arguments(words: list[str]) -> list[tuple[str, Any]]:
    """Return names and values of the arguments in a list of words: the words after an argument are its values."""
    arguments: list[tuple[str, Any]] = []
    takes_values = False
    for word in words:
        if word == _END or "[@]" in word or word in ("$@", "$*"):
            takes_values = False
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            arguments.append((name.replace("-", "_"), _parsed(value) if equals else True))
            takes_values = True
        elif takes_values and not re.match(r"-[^\d.]", word):  # a negative number is a value
            name, earlier = arguments[-1]
            arguments[-1] = (name, _with(earlier, _parsed(word)))
    return arguments


def _with(earlier: Any, value: Any) -> Any:
    """Return the value of an argument after one more word."""
    if earlier is True:
        return value
    return [*earlier, value] if isinstance(earlier, list) else [earlier, value]


def _parsed(text: str) -> Any:
    """Return a number if the text is one."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return {"true": True, "false": False}.get(text.lower(), text)
