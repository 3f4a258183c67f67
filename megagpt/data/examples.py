"""Examples for fine-tuning: a token pair with a mask beside it that says which tokens count in the loss.

The mask of PREFIX is a pair of its own, PREFIX.mask.bin and .idx, with one byte per token: 1 for a token that is learned. A
document is one example: one sequence, or two for a preference (the chosen answer, then the rejected one).
"""

from functools import lru_cache
from typing import ClassVar

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

    reserved: ClassVar[int] = 0
    """Positions at the end of a sample that no example may use."""

    def __init__(self, corpus: ExampleCorpus, examples: range, sequence_length: int, data: DataConfig) -> None:
        """Raises TooShortError if no example fits into a sample."""
        self.corpus = corpus.tokens
        self._corpus = corpus
        self._first = examples.start
        self._seed = data.seed
        self._length = sequence_length + 1
        self._capacity = self._length - self.reserved
        lengths = corpus.lengths[examples.start : examples.stop]
        too_long = lengths > self._capacity
        truncated = np.zeros(len(lengths), np.bool_)
        if data.long_examples == "truncate" and corpus.sequences_per_example == 1:
            for number in np.flatnonzero(too_long):
                truncated[number] = bool(corpus.mask.read(examples.start + int(number), 0, self._capacity).any())
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
        self.references: npt.NDArray[np.float32] | None = None
        """For preferences: the reference model's log p(chosen) - log p(rejected) of all examples of the corpus."""
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def n_examples(self) -> int:
        """Examples in the entire corpus, of which this dataset may use a range."""
        return len(self._corpus.lengths)

    @property
    def used_examples(self) -> npt.NDArray[np.int64]:
        """The examples that are not dropped, as numbers in the corpus."""
        return self._first + np.sort(self._packing.examples)

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
        tokens = np.full(self._length, PADDING, np.int64)
        starts = np.zeros(self._length, np.bool_)
        mask = np.zeros(self._length, np.int64)
        filled = 0
        examples = self.examples_of(index)
        for sequence in self._sequences(examples):
            length = min(int(self.corpus.sizes[sequence]), self._capacity)
            piece = slice(filled, filled + length)
            tokens[piece] = self.corpus.read(sequence, 0, length)
            mask[piece] = self._corpus.mask.read(sequence, 0, length)
            starts[filled] = True
            filled += length
        if filled < self._length:
            starts[filled] = True
        labels = self._labels(tokens, starts, mask)
        return Sample(tokens, starts, labels, None if self.references is None else self.references[examples])

    def examples_of(self, index: int) -> npt.NDArray[np.int64]:
        """Return the examples of sample `index`, as numbers in the corpus."""
        epoch, position = divmod(index, self.samples_per_epoch)
        return self._examples(int(self._order(epoch)[position]))

    def _labels(
        self, tokens: npt.NDArray[np.int64], starts: npt.NDArray[np.bool_], mask: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Return what each position predicts: the next token, if it is learned. All arguments: [seq + 1]."""
        counted = (mask != 0) & ~starts  # nothing predicts the first token of an example
        return np.where(counted[1:], tokens[1:], IGNORED)

    def _examples(self, sample: int) -> npt.NDArray[np.int64]:
        return self._first + self._packing.of_sample(sample)

    def _sequences(self, examples: npt.NDArray[np.int64]) -> list[int]:
        """Return the sequences of examples, one after the other."""
        each = self._corpus.sequences_per_example
        return [int(example) * each + number for example in examples for number in range(each)]

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.unsignedinteger]:
        return permutation(self.samples_per_epoch, self._seed, epoch, 1)


class LabelledExamples(PackedExamples):
    """Texts with a class: the mask has the number of the class, from 1, at the last token, which predicts it."""

    reserved = 1  # the last token must be an input

    def _labels(
        self, tokens: npt.NDArray[np.int64], starts: npt.NDArray[np.bool_], mask: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        return np.where(mask[:-1] > 0, mask[:-1] - 1, IGNORED)
