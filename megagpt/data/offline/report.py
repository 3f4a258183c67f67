"""What is in a pair of token files: sizes, lengths of documents, how often each token occurs; and whether it is sound."""

import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.data.indexed import IndexedCorpus, Tokens, files_of
from megagpt.data.offline.document_blocks import DocumentBlock, TokenReader, document_blocks
from megagpt.errors import DataError

CHUNK_TOKENS = 1 << 22
"""Tokens in memory at a time."""
LARGEST_VOCABULARY = 1 << 24
"""More ids than any tokenizer has: 128 MiB of counts at most, whatever a damaged file holds."""
_SEQUENCES = 1 << 20
"""Sequences whose sizes are added up at a time."""


@dataclass(frozen=True)
class Spread:
    """Of the tokens in a document."""

    min: int
    median: float
    mean: float
    p95: float
    """95 of 100 documents are as long or shorter."""
    max: int


@dataclass(frozen=True)
class Frequency:
    """Of one token."""

    id: int
    count: int
    share: float
    """Of all tokens, 0 to 1."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect` finds in a pair."""

    prefix: str
    bin_bytes: int
    idx_bytes: int
    dtype: str
    sequences: int
    documents: int
    empty_documents: int
    """Documents without a token."""
    tokens: int
    tokens_per_document: Spread
    smallest_id: int
    largest_id: int
    distinct_ids: int
    most_frequent: list[Frequency]
    eod_id: int | None
    """The token that ends documents, as the caller said."""
    documents_ending_in_eod: int | None


def inspect(corpus: IndexedCorpus, vocab_size: int | None, eod_id: int | None, top: int, progress: Any) -> Inspection:
    """Read the whole of `corpus`, `CHUNK_TOKENS` at a time, and list the `top` most frequent tokens.

    `progress` has `update(bytes read)`. Raises DataError if an id is outside 0 ... `vocab_size` - 1, or, where that is
    None, outside of what any vocabulary has.
    """
    ids = _IdCounts(vocab_size or LARGEST_VOCABULARY)
    lengths: Counter[int] = Counter()
    ending = 0
    with TokenReader(corpus) as reader:
        for block in document_blocks(corpus, CHUNK_TOKENS):
            lengths.update(_lengths(block))
            ends = block.token_bounds[1:][np.diff(block.token_bounds) > 0]
            for start in range(0, block.n_tokens, CHUNK_TOKENS):
                tokens = reader.take(min(CHUNK_TOKENS, block.n_tokens - start))
                ids.add(tokens)
                if eod_id is not None:
                    here = np.searchsorted(ends, [start, start + len(tokens)], side="right")
                    ending += int(np.count_nonzero(tokens[ends[here[0] : here[1]] - start - 1] == eod_id))
                progress.update(tokens.nbytes)
    if ids.first_wrong is not None:
        raise DataError(_wrong_ids(corpus, ids, *ids.first_wrong, assumed=vocab_size is None))
    present = np.flatnonzero(ids.counts)
    bin_path, idx_path = files_of(corpus.prefix)
    return Inspection(
        prefix=corpus.prefix,
        bin_bytes=bin_path.stat().st_size,
        idx_bytes=idx_path.stat().st_size,
        dtype=str(corpus.dtype),
        sequences=len(corpus.sizes),
        documents=lengths.total(),
        empty_documents=lengths[0],
        tokens=corpus.n_tokens,
        tokens_per_document=_spread(lengths),
        smallest_id=int(present[0]),
        largest_id=int(present[-1]),
        distinct_ids=len(present),
        most_frequent=_most_frequent(ids.counts, present, top),
        eod_id=eod_id,
        documents_ending_in_eod=None if eod_id is None else ending,
    )


def sample_documents(corpus: IndexedCorpus, n: int, seed: int) -> list[int]:
    """The first document and `n` - 1 drawn ones (all, if there are fewer), in the order of the file."""
    others = range(1, len(corpus.document_indices) - 1)
    drawn = random.Random(seed).sample(others, min(n - 1, len(others))) if n > 1 else []
    return [0, *sorted(drawn)][:n]


def document_start(corpus: IndexedCorpus, document: int, n_tokens: int) -> Tokens:
    """The first `n_tokens` of a document's tokens (all, if it has fewer)."""
    parts = [np.zeros(0, corpus.dtype)]
    for sequence in range(*corpus.document_indices[document : document + 2]):
        parts.append(corpus.read(sequence, 0, min(int(corpus.sizes[sequence]), n_tokens)))
        n_tokens -= len(parts[-1])
        if not n_tokens:
            break
    return np.concatenate(parts)


class _IdCounts:
    """How often each id occurs, and the first that is outside the vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.counts: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        """Of ids in the vocabulary, [largest one + 1]."""
        self.n_tokens = self.n_wrong = 0
        self.first_wrong: tuple[int, int] | None = None
        """Its place among all tokens, and the id."""

    def add(self, tokens: Tokens) -> None:
        """Count the next tokens of the corpus."""
        in_vocabulary = tokens
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            in_vocabulary = self._without_wrong(tokens)
        # Counts have room up to the largest id, which in a damaged file may be any number.
        counts = np.bincount(in_vocabulary)
        longer, shorter = (counts, self.counts) if len(counts) > len(self.counts) else (self.counts, counts)
        longer[: len(shorter)] += shorter
        self.counts = longer
        self.n_tokens += len(tokens)

    def _without_wrong(self, tokens: Tokens) -> Tokens:
        wrong = (tokens < 0) | (tokens >= self.vocab_size)
        if self.first_wrong is None:
            place = int(np.argmax(wrong))
            self.first_wrong = (self.n_tokens + place, int(tokens[place]))
        self.n_wrong += int(np.count_nonzero(wrong))
        return tokens[~wrong]


def _wrong_ids(corpus: IndexedCorpus, ids: _IdCounts, token: int, found: int, assumed: bool) -> str:
    sequence, position = _place(corpus, token)
    vocabulary = f"{ids.vocab_size} ids that any vocabulary may have" if assumed else f"vocabulary of {ids.vocab_size}"
    return (
        f"{corpus.prefix}: {ids.n_wrong} of {corpus.n_tokens} token ids are outside the {vocabulary}, the first is {found}, "
        f"at position {position} of sequence {sequence}: it was written with another tokenizer, or is damaged"
    )


def _place(corpus: IndexedCorpus, token: int) -> tuple[int, int]:
    """The sequence that has the corpus's token number `token`, and its position there, both from 0."""
    before = 0
    for first in range(0, len(corpus.sizes), _SEQUENCES):
        sizes = corpus.sizes[first : first + _SEQUENCES]
        ends = before + np.cumsum(sizes, dtype=np.int64)
        if token < ends[-1]:
            sequence = int(np.searchsorted(ends, token, side="right"))
            return first + sequence, token - int(ends[sequence] - sizes[sequence])
        before = int(ends[-1])
    raise AssertionError(f"token {token} of {before}")


def _lengths(block: DocumentBlock) -> dict[int, int]:
    """How many documents have how many tokens. Few entries: `n` lengths that differ need n * n / 2 tokens."""
    lengths, counts = np.unique(np.diff(block.token_bounds), return_counts=True)
    return dict(zip(lengths.tolist(), counts.tolist(), strict=True))


def _spread(lengths: Counter[int]) -> Spread:
    values, counts = (np.array(column, np.int64) for column in zip(*sorted(lengths.items()), strict=True))
    return Spread(
        min=int(values[0]),
        median=_quantile(values, counts, 0.5),
        mean=float((values * counts).sum() / counts.sum()),
        p95=_quantile(values, counts, 0.95),
        max=int(values[-1]),
    )


def _quantile(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], share: float) -> float:
    """Of sorted `values` that occur `counts` times each; between two of them it goes on in a straight line."""
    ends = np.cumsum(counts)
    position = share * int(ends[-1] - 1)
    below, above = (
        int(values[np.searchsorted(ends, place, side="right")]) for place in (math.floor(position), math.ceil(position))
    )
    return below + (above - below) * (position - math.floor(position))


def _most_frequent(counts: npt.NDArray[np.int64], present: npt.NDArray[np.int64], top: int) -> list[Frequency]:
    """Among equals the smaller id comes first."""
    total = int(counts.sum())
    order = present[np.argsort(-counts[present], kind="stable")[:top]]
    return [Frequency(int(token), int(counts[token]), int(counts[token]) / total) for token in order]
