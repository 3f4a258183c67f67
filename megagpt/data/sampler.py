"""Which samples a data-parallel rank reads of each global batch.

The global batch of `size` samples that starts at sample `first` holds the samples first ... first + size - 1, under every
layout. Data-parallel rank d of D gets the d-th of D equal ranges.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megagpt.data.blend import Dataset
from megagpt.data.gpt_dataset import Sample
from megagpt.data.indexed import check_ids


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of one micro-batch."""

    first_sample: int
    """Number of the first sample in the run; the others follow it."""
    tokens: npt.NDArray[np.int64]
    """[batch, seq + 1]"""
    starts: npt.NDArray[np.bool_]
    """True at the first token of each document, [batch, seq + 1]."""
    labels: npt.NDArray[np.int64] | None = None
    """What each position of the inputs predicts, [batch, seq]; the next token if absent."""
    references: tuple[npt.NDArray[np.float32], ...] = ()
    """For preferences: those of each sample, each [pairs]."""
    source: npt.NDArray[np.int64] | None = None
    """Input of the encoder, [batch, encoder positions]; absent without an encoder."""
    source_lengths: npt.NDArray[np.int64] | None = None
    """Tokens of each source, the rest is padding, [batch]; goes with `source`."""


class GlobalBatches:
    """The micro-batches of one data-parallel rank, for any global batch, in O(1)."""

    def __init__(
        self, dataset: Dataset, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int, vocab_size: int
    ) -> None:
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._vocab_size = vocab_size
        self.size = global_batch_size
        """Samples in a global batch, unless `micro_batches` gets another size."""

    def micro_batches(self, first_sample: int, size: int | None = None) -> list[TokenBatch]:
        """Return this rank's micro-batches of the global batch of `size` samples that starts at `first_sample`.

        Raises DataError if a token id is not in the vocabulary.
        """
        samples_per_rank = (size or self.size) // self._dp_size
        first_row = self._dp_rank * samples_per_rank
        batches = []
        for row in range(first_row, first_row + samples_per_rank, self._micro_batch_size):
            samples = [self._dataset.sample(first_sample + row + offset) for offset in range(self._micro_batch_size)]
            tokens = np.stack([sample.tokens for sample in samples])
            starts = np.stack([sample.starts for sample in samples])
            check_ids(tokens, self._vocab_size, f"sample {first_sample + row}")
            given = [sample.labels for sample in samples if sample.labels is not None]
            labels = np.stack(given) if given else None
            references = tuple(sample.references for sample in samples if sample.references is not None)
            source, source_lengths = _sources(samples)
            if source is not None:
                check_ids(source, self._vocab_size, f"source of sample {first_sample + row}")
            batches.append(TokenBatch(first_sample + row, tokens, starts, labels, references, source, source_lengths))
        return batches


def _sources(samples: Sequence[Sample]) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64] | None]:
    """Return the sources of the samples, [batch, encoder positions], and their lengths, [batch]; None without an encoder."""
    sources = [sample.source for sample in samples if sample.source is not None]
    if not sources:
        return None, None
    return np.stack(sources), np.array([sample.source_length for sample in samples], np.int64)
