"""Fixed-length samples packed across documents, in an order that depends on nothing but seed, corpus and length.

Any sample of any epoch is found without walking through those before.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.data import index_cache
from megagpt.data.index_cache import IndexCache
from megagpt.data.indexed import IndexedCorpus
from megagpt.data.shuffle import Order, epoch_order, samples_of
from megagpt.errors import DataError


class Sample(NamedTuple):
    """A piece of the stream, one token longer than the model reads: inputs and labels overlap by all but one."""

    tokens: npt.NDArray[np.int64]
    """[seq + 1]"""
    starts: npt.NDArray[np.bool_]
    """Where a document begins, [seq + 1]."""


class PackedCorpus:
    """A range of a corpus's sequences as an endless list of samples; every epoch has an order of its own."""

    def __init__(
        self, corpus: IndexedCorpus, sequences: range, sequence_length: int, seed: int, cache_dir: Path | None = None
    ) -> None:
        """`cache_dir`: where a large order is kept. Raises DataError if the range has too few tokens for one sample."""
        self.corpus, self.sequences, self.sequence_length, self.seed = corpus, sequences, sequence_length, seed
        self._sizes = corpus.sizes[sequences.start : sequences.stop]
        tokens = int(self._sizes.sum(dtype=np.int64))
        self.samples_per_epoch = samples_of(tokens, sequence_length)
        if self.samples_per_epoch == 0:
            raise DataError(
                f"{corpus.prefix}: {tokens} tokens in {len(sequences)} of its documents, too few for one sample of "
                f"model.n_positions {sequence_length} + 1"
            )
        self._cache: IndexCache | None = None
        if len(sequences) + self.samples_per_epoch >= index_cache.SMALLEST:
            self._cache = IndexCache(corpus, cache_dir)
        self._order = lru_cache(maxsize=2)(self._find_order)

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0; indices past an epoch go on into the next."""
        epoch, position = divmod(index, self.samples_per_epoch)
        order = self._order(epoch)
        start = int(order.samples[position]) * self.sequence_length
        out = np.empty(self.sequence_length + 1, np.int64)
        starts = np.zeros(len(out), np.bool_)
        filled, document = 0, int(np.searchsorted(order.ends, start, side="right"))
        while filled < len(out):
            sequence = self.sequences.start + int(order.documents[document])
            size = int(self.corpus.sizes[sequence])
            offset = max(0, start - (int(order.ends[document]) - size))
            part = self.corpus.read(sequence, offset, min(size - offset, len(out) - filled))
            out[filled : filled + len(part)] = part
            if offset == 0 and len(part):
                starts[filled] = True
            filled += len(part)
            document += 1
        return Sample(out, starts)

    def _find_order(self, epoch: int) -> Order:
        def build() -> Order:
            return epoch_order(self._sizes, self.sequence_length, self.seed, epoch)

        if self._cache is None:
            return build()
        at = self.sequences
        return self._cache.get(f"{at.start} {at.stop} {self.sequence_length} {self.seed} {epoch}", build)
