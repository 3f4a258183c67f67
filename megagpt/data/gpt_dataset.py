"""Samples of fixed length, packed across documents. Their order depends on seed, corpus and sequence length only.

Any sample of any epoch is found directly, without reading the samples before it.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.data import index_cache
from megagpt.data.index_cache import IndexCache
from megagpt.data.indexed import IndexedCorpus
from megagpt.data.shuffle import EpochOrder, count_samples, epoch_order
from megagpt.errors import DataError


class Sample(NamedTuple):
    """A piece of the token stream, one token longer than the sequence length: inputs and labels overlap."""

    tokens: npt.NDArray[np.int64]
    """[seq + 1]"""
    starts: npt.NDArray[np.bool_]
    """True at the first token of each document, [seq + 1]."""
    labels: npt.NDArray[np.int64] | None = None
    """What each position of the inputs predicts, [seq]; the next token if absent."""
    references: npt.NDArray[np.float32] | None = None
    """For preferences: the reference model's log p(chosen) - log p(rejected) of each pair, [pairs]."""
    source: npt.NDArray[np.int64] | None = None
    """For a model with an encoder: its input, [encoder positions], filled up with 0."""
    source_length: int = 0
    """Tokens of the source; no position of encoder or decoder attends to those from there on."""


Transform = Callable[[Sample, int], Sample]
"""Changes a sample of a corpus; gets its index as well."""


class TooShortError(DataError):
    """A range of a corpus that has not enough tokens for one sample."""


class PackedCorpus:
    """A range of a corpus's sequences as an endless list of samples; every epoch has its own order."""

    def __init__(
        self,
        corpus: IndexedCorpus,
        sequences: range,
        sequence_length: int,
        seed: int,
        cache_dir: Path | None = None,
        transform: Transform | None = None,
    ) -> None:
        """`cache_dir`: folder for large shuffle orders; `transform`: changes each sample.

        Raises TooShortError without tokens for one sample.
        """
        self.corpus = corpus
        self.sequences = sequences
        self.sequence_length = sequence_length
        self.seed = seed
        self._transform = transform
        self._sizes = corpus.sizes[sequences.start : sequences.stop]
        tokens = int(self._sizes.sum(dtype=np.int64))
        self.samples_per_epoch = count_samples(tokens, sequence_length)
        if self.samples_per_epoch == 0:
            raise TooShortError(
                f"{corpus.prefix}: {tokens} tokens in {len(sequences)} of its {len(corpus.sizes)} documents, too few for one "
                f"sample of model.n_positions {sequence_length} + 1"
            )
        self.unrepeated_samples = self.samples_per_epoch
        self._cache: IndexCache | None = None
        if len(sequences) + self.samples_per_epoch >= index_cache.MIN_SIZE:
            self._cache = IndexCache(corpus, cache_dir)
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    def sample(self, index: int) -> Sample:
        """Return sample `index` >= 0; indices beyond an epoch continue in the next one."""
        self.corpus.require_unchanged()
        epoch, position = divmod(index, self.samples_per_epoch)
        order = self._order(epoch)
        start = int(order.samples[position]) * self.sequence_length
        tokens = np.empty(self.sequence_length + 1, np.int64)
        starts = np.zeros(len(tokens), np.bool_)
        filled = 0
        document = int(np.searchsorted(order.ends, start, side="right"))
        while filled < len(tokens):
            sequence = self.sequences.start + int(order.documents[document])
            size = int(self.corpus.sizes[sequence])
            offset = max(0, start - (int(order.ends[document]) - size))
            piece = self.corpus.read(sequence, offset, min(size - offset, len(tokens) - filled))
            tokens[filled : filled + len(piece)] = piece
            if offset == 0 and len(piece):
                starts[filled] = True
            filled += len(piece)
            document += 1
        sample = Sample(tokens, starts)
        return sample if self._transform is None else self._transform(sample, index)

    def _epoch_order(self, epoch: int) -> EpochOrder:
        def build() -> EpochOrder:
            return epoch_order(self._sizes, self.sequence_length, self.seed, epoch)

        if self._cache is None:
            return build()
        sequences = self.sequences
        key = f"{sequences.start} {sequences.stop} {self.sequence_length} {self.seed} {epoch}"
        return self._cache.get(key, build)
