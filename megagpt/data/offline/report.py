"""Report on a pair of token files: sizes, document lengths, token frequencies; and check every token id."""

import math
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megagpt.data.indexed import IndexedCorpus, Tokens, files_of
from megagpt.data.offline.document_blocks import DocumentBlock, TokenReader, document_blocks
from megagpt.data.tokenizer import LARGEST_VOCABULARY
from megagpt.errors import DataError
from megagpt.progress import Progress

CHUNK_TOKENS = 1 << 22
"""Tokens in memory at a time."""
WINDOW_SEQUENCES = 1 << 20
"""Sequences whose sizes are summed at a time."""


@dataclass(frozen=True)
class LengthStatistics:
    """Statistics of the tokens per document."""

    min: int
    median: float
    mean: float
    p95: float
    """95% of the documents are at most this long."""
    max: int


@dataclass(frozen=True)
class TokenFrequency:
    """How often one token occurs."""

    id: int
    count: int
    share: float
    """Share of all tokens, 0 to 1."""


@dataclass(frozen=True)
class CorpusReport:
    """Content of a pair of token files."""

    prefix: str
    bin_bytes: int
    idx_bytes: int
    dtype: str
    sequences: int
    documents: int
    empty_documents: int
    """Documents without a token."""
    tokens: int
    tokens_per_document: LengthStatistics
    smallest_id: int
    largest_id: int
    distinct_ids: int
    most_frequent: list[TokenFrequency]
    eod_id: int | None
    """Token that ends documents, if the caller gave it."""
    documents_ending_in_eod: int | None


def corpus_report(
    corpus: IndexedCorpus, vocab_size: int | None, eod_id: int | None, top: int, progress: Progress
) -> CorpusReport:
    """Read all of `corpus`, `CHUNK_TOKENS` at a time, and list the `top` most frequent tokens.

    Raises DataError if an id is outside 0 ... `vocab_size` - 1, or, if `vocab_size` is None, beyond any vocabulary.
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
    if ids.first_wrong_position is not None:
        raise DataError(_wrong_ids(corpus, ids, ids.first_wrong_position, assumed=vocab_size is None))
    present = np.flatnonzero(ids.counts)
    bin_path, idx_path = files_of(corpus.prefix)
    return CorpusReport(
        prefix=corpus.prefix,
        bin_bytes=bin_path.stat().st_size,
        idx_bytes=idx_path.stat().st_size,
        dtype=str(corpus.dtype),
        sequences=len(corpus.sizes),
        documents=lengths.total(),
        empty_documents=lengths[0],
        tokens=corpus.n_tokens,
        tokens_per_document=_length_statistics(lengths),
        smallest_id=int(present[0]),
        largest_id=int(present[-1]),
        distinct_ids=len(present),
        most_frequent=_most_frequent(ids.counts, present, top),
        eod_id=eod_id,
        documents_ending_in_eod=None if eod_id is None else ending,
    )


def sample_documents(corpus: IndexedCorpus, n: int, seed: int) -> list[int]:
    """Return the first document and `n` - 1 random ones (all, if there are fewer), in file order."""
    others = range(1, len(corpus.document_indices) - 1)
    drawn = random.Random(seed).sample(others, min(n - 1, len(others))) if n > 1 else []
    return [0, *sorted(drawn)][:n]


def document_start(corpus: IndexedCorpus, document: int, n_tokens: int) -> Tokens:
    """Return the first `n_tokens` tokens of a document (all, if it has fewer)."""
    parts = [np.zeros(0, corpus.dtype)]
    for sequence in range(*corpus.document_indices[document : document + 2]):
        parts.append(corpus.read(sequence, 0, min(int(corpus.sizes[sequence]), n_tokens)))
        n_tokens -= len(parts[-1])
        if not n_tokens:
            break
    return np.concatenate(parts)


class _IdCounts:
    """Counts of each id, and the first id outside the vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.counts: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        """Counts of the ids in the vocabulary, [largest id + 1]."""
        self.n_tokens = 0
        self.n_wrong = 0
        self.first_wrong_position: int | None = None
        """Position of the first wrong id among all tokens."""
        self.first_wrong_id = 0

    def add(self, tokens: Tokens) -> None:
        """Count the next tokens of the corpus."""
        in_vocabulary = tokens
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            in_vocabulary = self._without_wrong(tokens)
        # The array has as many entries as the largest id, which can be any number in a damaged file.
        counts = np.bincount(in_vocabulary, minlength=len(self.counts))
        counts[: len(self.counts)] += self.counts
        self.counts = counts
        self.n_tokens += len(tokens)

    def _without_wrong(self, tokens: Tokens) -> Tokens:
        wrong = (tokens < 0) | (tokens >= self.vocab_size)
        if self.first_wrong_position is None:
            position = int(np.argmax(wrong))
            self.first_wrong_position = self.n_tokens + position
            self.first_wrong_id = int(tokens[position])
        self.n_wrong += int(np.count_nonzero(wrong))
        return tokens[~wrong]


def _wrong_ids(corpus: IndexedCorpus, ids: _IdCounts, first_wrong_position: int, assumed: bool) -> str:
    sequence, position = _locate(corpus, first_wrong_position)
    vocabulary = f"{ids.vocab_size} ids that any vocabulary may have" if assumed else f"vocabulary of {ids.vocab_size}"
    return (
        f"{corpus.prefix}: {ids.n_wrong} of {corpus.n_tokens} token ids are outside the {vocabulary}, the first is "
        f"{ids.first_wrong_id}, at position {position} of sequence {sequence}: the pair was written with another tokenizer, "
        "or is damaged"
    )


def _locate(corpus: IndexedCorpus, token: int) -> tuple[int, int]:
    """Return the sequence of the corpus's token number `token`, and its position in it, both counted from 0."""
    before = 0
    for first in range(0, len(corpus.sizes), WINDOW_SEQUENCES):
        sizes = corpus.sizes[first : first + WINDOW_SEQUENCES]
        ends = before + np.cumsum(sizes, dtype=np.int64)
        if token < ends[-1]:
            sequence = int(np.searchsorted(ends, token, side="right"))
            return first + sequence, token - int(ends[sequence] - sizes[sequence])
        before = int(ends[-1])
    raise AssertionError(f"token {token} of {before}")


def _lengths(block: DocumentBlock) -> dict[int, int]:
    """Return the number of documents of each length. There are few entries: n different lengths need n * n / 2 tokens."""
    lengths, counts = np.unique(np.diff(block.token_bounds), return_counts=True)
    return dict(zip(lengths.tolist(), counts.tolist(), strict=True))


def _length_statistics(lengths: Counter[int]) -> LengthStatistics:
    values, counts = (np.array(column, np.int64) for column in zip(*sorted(lengths.items()), strict=True))
    return LengthStatistics(
        min=int(values[0]),
        median=_quantile(values, counts, 0.5),
        mean=float((values * counts).sum() / counts.sum()),
        p95=_quantile(values, counts, 0.95),
        max=int(values[-1]),
    )


def _quantile(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], share: float) -> float:
    """Return a quantile of sorted `values` that occur `counts` times each, with linear interpolation."""
    ends = np.cumsum(counts)
    position = share * int(ends[-1] - 1)
    below, above = (
        int(values[np.searchsorted(ends, index, side="right")]) for index in (math.floor(position), math.ceil(position))
    )
    return below + (above - below) * (position - math.floor(position))


def _most_frequent(counts: npt.NDArray[np.int64], present: npt.NDArray[np.int64], top: int) -> list[TokenFrequency]:
    """Return the most frequent tokens; of equally frequent ones the smaller id comes first."""
    total = int(counts.sum())
    order = present[np.argsort(-counts[present], kind="stable")[:top]]
    return [TokenFrequency(int(token), int(counts[token]), int(counts[token]) / total) for token in order]
