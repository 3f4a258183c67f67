"""Several corpora as one stream, and the datasets that a config names."""

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megagpt.config.schema import DataConfig, Source
from megagpt.data.gpt_dataset import PackedCorpus
from megagpt.data.indexed import IndexedCorpus
from megagpt.errors import DataError

_BLOCK = 4096
"""Choices made at a time."""


class Dataset(Protocol):
    """An endless list of samples."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples until every token was seen about once."""

    def sample(self, index: int) -> npt.NDArray[np.int64]:
        """Tokens [sequence_length + 1] of sample `index` >= 0."""


class Datasets(NamedTuple):
    """What the config names; valid and test may be absent."""

    train: Dataset
    valid: Dataset | None
    test: Dataset | None


class Blend:
    """Corpora mixed by weight: at every point of the stream each has given its share to within one sample.

    Sample i is due to the corpus whose next sample has the earliest deadline: the j-th sample of a corpus of weight w
    may come no earlier than j/w and no later than (j+1)/w (Tijdeman 1980, the chairman assignment problem).
    """

    def __init__(self, corpora: list[PackedCorpus], weights: list[float]) -> None:
        self._corpora = corpora
        self._weights = np.array(weights, np.float64) / sum(weights)
        self._choices = np.zeros(0, np.int16)
        self._ranks = np.zeros(0, np.int64)
        self._given = np.zeros(len(corpora), np.int64)
        self.samples_per_epoch = sum(corpus.samples_per_epoch for corpus in corpora)

    def sample(self, index: int) -> npt.NDArray[np.int64]:
        """Tokens [sequence_length + 1] of sample `index` >= 0."""
        while index >= len(self._choices):
            self._extend()
        return self._corpora[self._choices[index]].sample(int(self._ranks[index]))

    def _extend(self) -> None:
        choices, ranks = np.empty(_BLOCK, np.int16), np.empty(_BLOCK, np.int64)
        for position in range(_BLOCK):
            now = len(self._choices) + position
            ready = self._given < self._weights * (now + 1)
            deadline = np.where(ready, (self._given + 1) / self._weights, np.inf)
            choice = int(deadline.argmin())
            choices[position], ranks[position] = choice, self._given[choice]
            self._given[choice] += 1
        self._choices = np.concatenate((self._choices, choices))
        self._ranks = np.concatenate((self._ranks, ranks))


def build_datasets(data: DataConfig, sequence_length: int) -> Datasets:
    """Open what `data` names. Raises DataError for files that are missing, damaged or too short, and where train is absent."""
    if data.paths is not None and data.split is not None:
        parts = [_split_part(data.paths, data.split, part, sequence_length, data.seed) for part in range(3)]
    else:
        parts = [_whole(source, sequence_length, data.seed) for source in (data.train, data.valid, data.test)]
    train, valid, test = parts
    if train is None:
        raise DataError("data.train: no training data; give the prefix of a .bin/.idx pair, or data.paths with data.split")
    return Datasets(train, valid, test)


def split_ranges(n_sequences: int, split: str) -> list[range]:
    """Contiguous ranges for train, valid and test, rounded as Megatron does."""
    shares = [float(share) for share in split.split(",")]
    bounds = np.cumsum([0.0, *shares]) / sum(shares) * n_sequences
    cuts = [round(float(bound)) for bound in bounds]
    return [range(cuts[part], cuts[part + 1]) for part in range(3)]


def check_vocabulary(data: DataConfig, vocab_size: int) -> None:
    """Look at both ends of every corpus: raise DataError for an id that the vocabulary has not.

    The whole is not read, which may be terabytes: every sample is checked when it is used (`sampler.py`).
    """
    for source in (data.train, data.valid, data.test, data.paths):
        for prefix in _prefixes(source):
            corpus = IndexedCorpus(prefix)
            for sequence in {0, len(corpus.sizes) - 1}:
                check_ids(corpus.read(sequence)[: 2**20], vocab_size, prefix)


def check_ids(tokens: npt.NDArray[np.generic], vocab_size: int, where: str) -> None:
    """Raise DataError if an id lies outside the vocabulary."""
    largest = int(tokens.max()) if len(tokens) else 0
    if largest >= vocab_size or int(tokens.min() if len(tokens) else 0) < 0:
        raise DataError(
            f"{where}: token id {largest}, but model.vocab_size is {vocab_size}; "
            "the data was made with another tokenizer than data.tokenizer"
        )


def _split_part(source: Source, split: str, part: int, sequence_length: int, seed: int) -> Dataset | None:
    if float(split.split(",")[part]) == 0:
        return None
    corpora = {prefix: IndexedCorpus(prefix) for prefix in _prefixes(source)}
    ranges = {prefix: split_ranges(len(corpus.sizes), split)[part] for prefix, corpus in corpora.items()}
    return _blend([PackedCorpus(corpora[p], ranges[p], sequence_length, seed) for p in corpora], source)


def _whole(source: Source | None, sequence_length: int, seed: int) -> Dataset | None:
    corpora = [IndexedCorpus(prefix) for prefix in _prefixes(source)]
    if source is None or not corpora:
        return None
    return _blend([PackedCorpus(corpus, range(len(corpus.sizes)), sequence_length, seed) for corpus in corpora], source)


def _blend(corpora: list[PackedCorpus], source: Source) -> Dataset:
    return Blend(corpora, list(source.values())) if isinstance(source, dict) and len(corpora) > 1 else corpora[0]


def _prefixes(source: Source | None) -> list[str]:
    if not source:
        return []
    return [source] if isinstance(source, str) else list(source)
