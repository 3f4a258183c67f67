"""Pairs of a text and its summary that a text itself contains, to fine-tune on: a function and its docstring, or a paragraph
and its first sentence."""

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence

from megagpt.inference.text_scores import Pair

MIN_SUMMARY, MAX_SUMMARY = 15, 80
"""Characters of a summary."""
MIN_LINES = 3
"""Lines of a function without its docstring."""
MIN_PARAGRAPH = 200
"""Characters of a paragraph."""
MAX_SOURCE = 400
"""Characters of a source; a longer one loses its end."""
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")


def summary_pairs(documents: Sequence[str]) -> list[Pair]:
    """Return the pairs of all documents, in order."""
    return [pair for document in documents for pair in _pairs(document)]


def _pairs(document: str) -> Iterator[Pair]:
    try:
        tree = ast.parse(document)
    except (SyntaxError, ValueError, RecursionError):
        return _paragraphs(document)
    return _functions(document.splitlines(), tree)


def _functions(lines: Sequence[str], tree: ast.Module) -> Iterator[Pair]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node) is None:
            continue
        docstring = node.body[0]
        before, after = lines[node.lineno - 1 : docstring.lineno - 1], lines[docstring.end_lineno : node.end_lineno]
        source = textwrap.dedent("\n".join([*before, *after]))[:MAX_SOURCE]
        summary = (ast.get_docstring(node) or "").strip().split("\n", 1)[0].strip()
        if before and len(before) + len(after) >= MIN_LINES and MIN_SUMMARY <= len(summary) <= MAX_SUMMARY:
            yield Pair(source, summary)


def _paragraphs(document: str) -> Iterator[Pair]:
    for paragraph in re.split(r"\n\s*\n", document):
        text = " ".join(paragraph.split())
        summary, *rest = SENTENCE_END.split(text, maxsplit=1)
        if len(text) >= MIN_PARAGRAPH and rest and MIN_SUMMARY <= len(summary) <= MAX_SUMMARY:
            yield Pair(rest[0][:MAX_SOURCE], summary)
