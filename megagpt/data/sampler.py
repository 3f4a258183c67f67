"""Which samples a data-parallel rank reads of a global batch.

The global batch of size G at `first` is samples [first, first + G), whatever the layout; rank d of D takes the d-th part.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megagpt.data.blend import Dataset
from megagpt.data.indexed import check_ids


@dataclass(frozen=True)
class Rows:
    """Tokens of one micro-batch."""

    index: int
    """Of the micro-batch in the global batch, the same under every data-parallel size."""
    tokens: npt.NDArray[np.int64]
    """[batch, seq + 1]"""
    starts: npt.NDArray[np.bool_]
    """Where a document begins, [batch, seq + 1]."""


class GlobalBatches:
    """This data rank's micro-batches of any global batch, in O(1)."""

    def __init__(
        self, dataset: Dataset, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int, vocab_size: int
    ) -> None:
        self._dataset, self._micro, self._vocab_size = dataset, micro_batch_size, vocab_size
        self._rank, self._ranks = data_rank, data_size
        self.size = global_batch_size
        """Samples in a global batch, where `at` is told no other number."""

    def at(self, first: int, size: int | None = None) -> list[Rows]:
        """Micro-batches of the global batch of `size` samples that begins at sample `first`.

        Raises DataError for a token id above the vocabulary.
        """
        part = (size or self.size) // self._ranks
        found = []
        for row in range(self._rank * part, (self._rank + 1) * part, self._micro):
            samples = [self._dataset.sample(first + row + offset) for offset in range(self._micro)]
            tokens = np.stack([sample.tokens for sample in samples])
            starts = np.stack([sample.starts for sample in samples])
            check_ids(tokens, self._vocab_size, f"sample {first + row}")
            found.append(Rows(row // self._micro, tokens, starts))
        return found
