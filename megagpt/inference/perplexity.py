"""Perplexity of a text: per token, per word and per byte, so that models with different tokenizers can be compared."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megagpt.data.indexed import IndexedCorpus, files_of
from megagpt.data.offline.documents import InputFile, input_files
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import ConfigError
from megagpt.inference.scoring import Window, score, windows_of
from megagpt.inference.source import TrainedModel

GROUP = 64
"""Documents whose windows are sorted into batches together."""


class Document(NamedTuple):
    """A document to be scored."""

    tokens: list[int]
    text: str


@dataclass
class Totals:
    """Sums over documents."""

    documents: int = 0
    tokens: int = 0
    words: int = 0
    """Pieces of text between white space."""
    bytes: int = 0
    """Length of the text in UTF-8."""
    loss: float = 0.0
    """Sum of the losses of the tokens, in nats."""

    def add(self, other: "Totals") -> None:
        """Add the sums of other documents."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def report(self) -> dict[str, Any]:
        """Return the sums, the mean loss, the perplexities and the bits per byte."""
        return {
            **vars(self),
            "loss_per_token": self.loss / self.tokens,
            "token_perplexity": _exp(self.loss / self.tokens),
            "word_perplexity": _exp(self.loss / max(1, self.words)),
            "byte_perplexity": _exp(self.loss / max(1, self.bytes)),
            "bits_per_byte": self.loss / max(1, self.bytes) / math.log(2),
        }


def documents_of(data: str, tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield the documents of a .bin/.idx pair (its prefix, or one of its files), or of files of texts.

    Raises DataError if there are none. An end-of-document token at the end of a document is left out.
    """
    prefix = re.sub(r"\.(bin|idx)$", "", data)
    if files_of(prefix)[1].is_file():
        yield from _indexed(prefix, tokenizer)
        return
    for path in input_files([data]):
        for (content,) in InputFile(Path(path), ["text"]):
            text = content.decode()
            if text:
                yield Document(tokenizer.encode(text), text)


def _indexed(prefix: str, tokenizer: Tokenizer) -> Iterator[Document]:
    corpus = IndexedCorpus(prefix)
    for sequence in range(len(corpus.sizes)):
        tokens = corpus.read(sequence).tolist()
        if tokens and tokens[-1] == tokenizer.eod_id:
            tokens.pop()
        if tokens:
            yield Document(tokens, tokenizer.decode(tokens))


def measure(trained: TrainedModel, documents: Iterable[Document], stride: int) -> Totals:
    """Return the sums over documents. Each one is read after an end-of-document token, so all of its tokens are scored.

    `stride`: tokens that each window scores; see `windows_of`. Raises ConfigError for a token that the model does not know.
    Collective under tensor parallelism.
    """
    totals, iterator = Totals(), iter(documents)
    positions, vocab_size = trained.config.model.n_positions, trained.config.model.tokens_in_vocab
    before = list(trained.before) or [trained.tokenizer.eod_id]
    while group := list(islice(iterator, GROUP)):
        windows: list[Window] = []
        for document in group:
            if max(document.tokens) >= vocab_size:
                raise ConfigError(
                    f"token id {max(document.tokens)} is not in the model's vocabulary of {vocab_size}; give the tokenizer of "
                    "its training, and data that was made with it"
                )
            windows += windows_of([*before[-1:], *document.tokens], positions, stride)
        totals.add(
            Totals(
                documents=len(group),
                tokens=sum(len(document.tokens) for document in group),
                words=sum(len(document.text.split()) for document in group),
                bytes=sum(len(document.text.encode()) for document in group),
                loss=-math.fsum(result.logprob for result in score(trained.model, windows)),
            )
        )
    return totals


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
