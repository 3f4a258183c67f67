"""Convert labelled texts to token files: a pair, and beside it, as its mask, the class at the last token of each text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megagpt.data.examples import mask_prefix
from megagpt.data.indexed import IndexedWriter, token_dtype
from megagpt.data.offline.documents import InputFile, Reject, stop
from megagpt.data.tokenizer import Tokenizer, require_characters
from megagpt.errors import DataError

MAX_CLASSES = 60_000
"""A class is stored in 16 bits."""


class Labelled(NamedTuple):
    """A text and its class."""

    text: str
    label: str


def read_labelled(path: Path, reject: Reject = stop) -> list[Labelled]:
    """Read JSON lines or Parquet with "text" and "label", a text or an integer.

    Raises DataError if the file cannot be read or has no example; an example that cannot be used goes to `reject`.
    """
    examples = []
    for place, record in InputFile(path, [], None, reject).records():
        try:
            examples.append(_labelled(record))
        except DataError as error:
            reject(DataError(f"{place}: {error}"))
    if not examples:
        raise DataError(f'{path}: has no example; expected JSON lines such as {{"text": "...", "label": "..."}}')
    return examples


def classes_of(examples: Sequence[Labelled]) -> list[str]:
    """Return the classes in alphabetical order. Raises DataError for fewer than two."""
    classes = sorted({example.label for example in examples})
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise DataError(f"the training data has {len(classes)} classes; expected 2 to {MAX_CLASSES:,}")
    return classes


def write_labelled(
    examples: Sequence[Labelled], classes: Sequence[str], tokenizer: Tokenizer, max_tokens: int, prefix: str
) -> int:
    """Write the pair and its mask; return how many texts were cut to their last `max_tokens` tokens.

    Raises DataError for a label that is not in `classes`, and for a text without a token.
    """
    number_of = {label: number for number, label in enumerate(classes)}
    n_cut = 0
    with (
        IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as tokens,
        IndexedWriter(mask_prefix(prefix), np.uint16) as mask,
    ):
        for number, (text, label) in enumerate(examples, 1):
            ids = tokenizer.encode(text)
            if label not in number_of:
                raise DataError(f"example {number}: the class {label!r} is not in the training data, which has {list(classes)}")
            if not ids:
                raise DataError(f"example {number}: its text has no token")
            n_cut += len(ids) > max_tokens
            ids = ids[-max_tokens:]
            tokens.add_document(ids)
            mask.add_document([*[0] * (len(ids) - 1), number_of[label] + 1])
    return n_cut


def _labelled(record: dict[str, Any]) -> Labelled:
    text, label = record.get("text"), record.get("label")
    if not isinstance(text, str):
        raise DataError('expected a text under "text"')
    require_characters(text, '"text"')
    if not isinstance(label, str | int) or isinstance(label, bool):
        raise DataError('expected a text or an integer under "label"')
    return Labelled(text, str(label))
