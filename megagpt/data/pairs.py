"""Pairs of a source and a target, for fine-tuning a model with an encoder: one pair in each sample."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megagpt.config.schema import DataConfig
from megagpt.data.encoder_samples import EncoderFormat, encoder_sample
from megagpt.data.examples import ExampleCorpus
from megagpt.data.gpt_dataset import Sample, TooShortError
from megagpt.data.shuffle import permutation

SEQUENCES_PER_PAIR = 2


class Pairs:
    """A range of a corpus's pairs as an endless list of samples; every epoch has its own order."""

    def __init__(self, corpus: ExampleCorpus, pairs: range, length: int, data: DataConfig, encoder: EncoderFormat) -> None:
        """`length`: positions of the decoder. Raises TooShortError if no pair fits."""
        self.corpus = corpus.tokens
        self._length = length
        self._encoder = encoder
        self._seed = data.seed
        sizes = corpus.tokens.sizes.reshape(-1, SEQUENCES_PER_PAIR)[pairs.start : pairs.stop]
        too_long = (sizes > (encoder.positions, length)).any(1)
        truncates = data.long_examples == "truncate"
        self._used = pairs.start + np.flatnonzero(~too_long | truncates)
        self.n_dropped = 0 if truncates else int(too_long.sum())
        self.n_truncated = int(too_long.sum()) if truncates else 0
        """Pairs of which a part is too long."""
        self.samples_per_epoch = self.unrepeated_samples = len(self._used)
        if not self.samples_per_epoch:
            raise TooShortError(
                f"{corpus.tokens.prefix}: none of {len(sizes)} pairs fits into model.encoder_positions {encoder.positions} and "
                f"model.n_positions {length}"
            )
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def summary(self) -> str:
        """Number of pairs, and what became of long ones, for the start of a run."""
        limits = f"longer than {self._encoder.positions:,} or {self._length:,} tokens"
        long = [(self.n_dropped, "dropped"), (self.n_truncated, "truncated")]
        notes = [f"{count:,} {limits} {what}" for count, what in long if count]
        return f"{self.corpus.prefix}: {'; '.join([f'{self.samples_per_epoch:,} pairs', *notes])}"

    def sample(self, index: int) -> Sample:
        """Return sample `index` >= 0; indices beyond an epoch continue in the next one."""
        self.corpus.require_unchanged()
        epoch, position = divmod(index, self.samples_per_epoch)
        first = SEQUENCES_PER_PAIR * int(self._used[int(self._order(epoch)[position])])
        source, target = self._read(first, self._encoder.positions), self._read(first + 1, self._length)
        return encoder_sample(source, target, self._length, self._encoder)

    def _read(self, sequence: int, limit: int) -> npt.NDArray[np.int64]:
        """Return a sequence; one that is too long loses tokens before its last one, which ends it."""
        size = int(self.corpus.sizes[sequence])
        if size <= limit:
            return self.corpus.read(sequence, 0, size).astype(np.int64)
        tokens = self.corpus.read(sequence, 0, limit).astype(np.int64)
        tokens[-1] = self.corpus.read(sequence, size - 1, 1)[0]
        return tokens

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.unsignedinteger]:
        return permutation(self.samples_per_epoch, self._seed, epoch, 1)
