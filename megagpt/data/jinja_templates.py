"""Jinja templates of chats, run in a sandbox: they are part of downloaded models, so they are not trusted.

Templates get what Hugging Face transformers gives them: trimmed blocks, `break` and `continue`, the filter `tojson`, the
functions `raise_exception` and `strftime_now`, and the block `{% generation %}` around the text of the assistant.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megagpt.errors import DataError

_GENERATION_START, _GENERATION_END = "\U000fffc0", "\U000fffc1"
"""Characters for private use that mark the text of `generation` blocks while a template is rendered."""


class Rendered(NamedTuple):
    """The text of a chat."""

    text: str
    generated: list[range]
    """Characters of the text that `generation` blocks have written; empty if the template has none."""


class JinjaTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, where: str) -> None:
        """`where`: file of the template, for messages. Raises DataError if it is not a Jinja template."""
        self.source = source
        self.where = where
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        with self._errors("not a valid template"):
            self._template = environment.from_string(source)

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: object) -> Rendered:
        """Return the text of the messages. Raises DataError if the template raises an error."""
        with self._errors("cannot render these messages"):
            text = self._template.render(messages=messages, **variables)
        return _without_marks(text)

    @contextmanager
    def _errors(self, problem: str) -> Iterator[None]:
        try:
            yield
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            line = getattr(error, "lineno", None)
            where = self.where if line is None else f"{self.where}, line {line}"
            raise DataError(f"chat template of {where}: {problem}: {error}") from None
        except (RecursionError, MemoryError):
            raise DataError(f"chat template of {self.where}: {problem}: it needs too much memory") from None


class _GenerationBlock(Extension):
    """The block `{% generation %} ... {% endgeneration %}`, which writes its content between two marks."""

    tags = {"generation"}  # noqa: RUF012 (declared by jinja2 as a plain attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{_GENERATION_START}{caller()}{_GENERATION_END}"


def _without_marks(text: str) -> Rendered:
    if _GENERATION_START not in text:
        return Rendered(text, [])
    first, *blocks = text.split(_GENERATION_START)
    pieces, ranges, length = [first], [], len(first)
    for block in blocks:
        generated, _, rest = block.partition(_GENERATION_END)
        ranges.append(range(length, length + len(generated)))
        pieces += [generated, rest]
        length += len(generated) + len(rest)
    return Rendered("".join(pieces), ranges)


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, **({"ensure_ascii": False, "indent": indent} | options))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
