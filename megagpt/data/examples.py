"""Examples for fine-tuning: a token pair with a mask beside it that says which tokens count in the loss.

The mask of PREFIX is a pair of its own, PREFIX.mask.bin and .idx, with one byte per token: 1 for a token that is learned. A
document is one example: one sequence, or two for a preference (the chosen answer, then the rejected one).
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megagpt.config.schema import DataConfig
from megagpt.data.gpt_dataset import Sample, TooShortError
from megagpt.data.indexed import IndexedCorpus, files_of
from megagpt.data.packing import pack
from megagpt.data.shuffle import permutation
from megagpt.errors import DataError
from megagpt.labels import IGNORED

PADDING = 0
"""Token that fills up a sample. Its label is ignored, and no example attends to it."""


def mask_prefix(prefix: str) -> str:
    """Return the prefix of the mask that belongs to a pair."""
    return f"{prefix}.mask"


class ExampleCorpus:
    """A pair and its mask, opened and compared. Raises DataError if they do not belong together."""

    def __init__(self, prefix: str, sequences_per_example: int) -> None:
        self.tokens = IndexedCorpus(prefix)
        missing = [path for path in files_of(mask_prefix(prefix)) if not path.is_file()]
        if missing:
            raise DataError(
                f"{missing[0]}: no such file; data.task needs the mask that preprocess_data.py --task writes beside a pair"
            )
        self.mask = IndexedCorpus(mask_prefix(prefix))
        if not np.array_equal(self.tokens.sizes, self.mask.sizes):
            raise DataError(f"{mask_prefix(prefix)}.idx: is the mask of another pair than {prefix}; write both again")
        bounds = self.tokens.document_indices
        wrong = np.flatnonzero(np.diff(bounds) != sequences_per_example)
        if len(wrong):
            raise DataError(
                f"{prefix}: example {wrong[0]} has {np.diff(bounds)[wrong[0]]} sequences, and this data.task needs "
                f"{sequences_per_example}; preprocess with the same --task"
            )
        self.sequences_per_example = sequences_per_example
        self.lengths = self.tokens.sizes.reshape(-1, sequences_per_example).sum(1, dtype=np.int64)
        """Tokens of each example, [examples]."""


class PackedExamples:
    """A range of a corpus's examples as an endless list of samples, each with several entire examples.

    The packing is the same in all epochs; the order of the samples is shuffled with (seed, epoch).
    """

    def __init__(self, corpus: ExampleCorpus, examples: range, sequence_length: int, data: DataConfig) -> None:
        """Raises TooShortError if no example fits into a sample."""
        self.corpus = corpus.tokens
        self._corpus = corpus
        self._first = examples.start
        self._seed = data.seed
        self._capacity = sequence_length + 1
        lengths = corpus.lengths[examples.start : examples.stop]
        too_long = lengths > self._capacity
        truncated = np.zeros(len(lengths), np.bool_)
        if data.long_examples == "truncate" and corpus.sequences_per_example == 1:
            for number in np.flatnonzero(too_long):
                truncated[number] = bool(self._counted(examples.start + int(number), self._capacity).any())
        self.n_dropped, self.n_truncated = int((too_long & ~truncated).sum()), int(truncated.sum())
        """Examples that are too long for a sample."""
        used = np.where(truncated, self._capacity, lengths)
        self._packing = pack(used, self._capacity)
        self.n_tokens = int(used[self._packing.examples].sum())
        """Tokens of all examples in an epoch, without padding."""
        self.samples_per_epoch = self.unrepeated_samples = len(self._packing)
        if not self.samples_per_epoch:
            raise TooShortError(
                f"{corpus.tokens.prefix}: none of {len(lengths)} examples fits into the {self._capacity} tokens of "
                f"model.n_positions {sequence_length} + 1"
            )
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def summary(self) -> str:
        """Number of examples and padding, and what became of long examples, for the start of a run."""
        padding = 1 - self.n_tokens / (self.samples_per_epoch * self._capacity)
        long = [(self.n_dropped, "dropped"), (self.n_truncated, "truncated")]
        notes = [f"{count:,} longer than {self._capacity:,} tokens {what}" for count, what in long if count]
        return (
            f"{self.corpus.prefix}: {'; '.join([f'{len(self._packing.examples):,} examples, {padding:.1%} padding', *notes])}"
        )

    def sample(self, index: int) -> Sample:
        """Return sample `index` >= 0; indices beyond an epoch continue in the next one."""
        self.corpus.require_unchanged()
        epoch, position = divmod(index, self.samples_per_epoch)
        tokens = np.full(self._capacity, PADDING, np.int64)
        starts = np.zeros(self._capacity, np.bool_)
        counted = np.zeros(self._capacity, np.bool_)
        filled = 0
        for sequence in self._sequences(int(self._order(epoch)[position])):
            length = min(int(self.corpus.sizes[sequence]), self._capacity)
            piece = slice(filled, filled + length)
            tokens[piece] = self.corpus.read(sequence, 0, length)
            counted[piece] = self._counted(sequence, length)
            starts[filled] = True
            filled += length
        if filled < self._capacity:
            starts[filled] = True
        counted &= ~starts  # nothing predicts the first token of an example
        return Sample(tokens, starts, np.where(counted[1:], tokens[1:], IGNORED))

    def _sequences(self, sample: int) -> list[int]:
        """Return the sequences of a sample."""
        each = self._corpus.sequences_per_example
        examples = (self._first + self._packing.of_sample(sample)) * each
        return [int(example) + number for example in examples for number in range(each)]

    def _counted(self, sequence: int, length: int) -> npt.NDArray[np.bool_]:
        """Return which of the first `length` tokens of a sequence count in the loss."""
        return self._corpus.mask.read(sequence, 0, length) != 0

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.unsignedinteger]:
        return permutation(self.samples_per_epoch, self._seed, epoch, 1)
