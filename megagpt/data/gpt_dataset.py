"""Fixed-length samples packed across documents, in an order that depends on nothing but seed, corpus and length.

Epochs are independent: epoch e shuffles the documents with a generator seeded by (seed, e), joins them, cuts the
stream into samples that overlap by one token (the last label of one is the first input of the next), and shuffles the
samples. Any sample of any epoch is found without walking through those before.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.data.indexed import IndexedCorpus
from megagpt.errors import DataError


class Sample(NamedTuple):
    """A piece of the stream, one token longer than the model reads: inputs and labels overlap by all but one."""

    tokens: npt.NDArray[np.int64]
    """[seq + 1]"""
    starts: npt.NDArray[np.bool_]
    """Where a document begins, [seq + 1]."""


class _Epoch(NamedTuple):
    documents: npt.NDArray[np.int64]
    """Sequence numbers in the epoch's order."""
    ends: npt.NDArray[np.int64]
    """Tokens of the epoch up to and with each of them."""
    samples: npt.NDArray[np.int64]
    """Which piece of the stream each sample is."""


class PackedCorpus:
    """A range of a corpus's sequences as an endless list of samples."""

    def __init__(self, corpus: IndexedCorpus, sequences: range, sequence_length: int, seed: int) -> None:
        """Raises DataError if the range has too few tokens for one sample."""
        self.corpus, self.sequences, self.sequence_length, self.seed = corpus, sequences, sequence_length, seed
        tokens = int(corpus.sizes[sequences.start : sequences.stop].sum(dtype=np.int64))
        self.samples_per_epoch = max(0, tokens - 1) // sequence_length
        if self.samples_per_epoch == 0:
            raise DataError(
                f"{corpus.prefix}: {tokens} tokens in {len(sequences)} of its documents, too few for one sample of "
                f"model.n_positions {sequence_length} + 1"
            )
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0; indices past an epoch go on into the next."""
        epoch, position = divmod(index, self.samples_per_epoch)
        order = self._epoch(epoch)
        start = int(order.samples[position]) * self.sequence_length
        out = np.empty(self.sequence_length + 1, np.int64)
        starts = np.zeros(len(out), np.bool_)
        filled, document = 0, int(np.searchsorted(order.ends, start, side="right"))
        while filled < len(out):
            sequence = int(order.documents[document])
            size = int(self.corpus.sizes[sequence])
            offset = max(0, start - (int(order.ends[document]) - size))
            part = self.corpus.read(sequence, offset, min(size - offset, len(out) - filled))
            out[filled : filled + len(part)] = part
            if offset == 0 and len(part):
                starts[filled] = True
            filled += len(part)
            document += 1
        return Sample(out, starts)

    def _build_epoch(self, epoch: int) -> _Epoch:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch))))
        documents = generator.permutation(len(self.sequences)) + self.sequences.start
        ends = np.cumsum(self.corpus.sizes[documents], dtype=np.int64)
        return _Epoch(documents, ends, generator.permutation(self.samples_per_epoch))
