"""Several corpora as one stream, and the datasets that a config names."""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megagpt.config.schema import DataConfig, Source
from megagpt.data.gpt_dataset import PackedCorpus, Sample
from megagpt.data.indexed import IndexedCorpus, check_corpus
from megagpt.errors import DataError

LONGEST_PERIOD = 2**18
"""Samples after which a blend's order repeats at the latest: a third of a second to lay out, 1.5 MB."""


class Dataset(Protocol):
    """An endless list of samples."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples until every token was seen about once."""

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0."""


class Datasets(NamedTuple):
    """What the config names; valid and test may be absent."""

    train: Dataset
    valid: Dataset | None
    test: Dataset | None


class Blend:
    """Corpora mixed by weight: at every point of the stream each has given its share to within one sample.

    The order of corpora repeats, so that any sample is found at once, however far into the stream: after as many
    samples as the weights' common denominator, or, where that is above `LONGEST_PERIOD`, after so many, with the
    shares rounded to multiples of 1 / LONGEST_PERIOD.
    """

    def __init__(self, corpora: list[PackedCorpus], weights: list[float]) -> None:
        self._corpora = corpora
        self._counts = samples_per_period(weights)
        self._choices = earliest_deadline_first(self._counts)
        self._ranks = np.empty(len(self._choices), np.int32)
        for corpus, count in enumerate(self._counts):
            self._ranks[self._choices == corpus] = np.arange(count)
        self.samples_per_epoch = sum(corpus.samples_per_epoch for corpus in corpora)

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0."""
        period, position = divmod(index, len(self._choices))
        choice = int(self._choices[position])
        return self._corpora[choice].sample(period * self._counts[choice] + int(self._ranks[position]))


def samples_per_period(weights: Sequence[float]) -> list[int]:
    """How many samples of each corpus one period has; exactly in the weights' proportion if it is not too long.

    Otherwise rounded by largest remainder, and at least one each.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    wanted = [share * LONGEST_PERIOD for share in shares]
    counts = [max(1, math.floor(count)) for count in wanted]
    spare = LONGEST_PERIOD - sum(counts)
    by_need = sorted(range(len(counts)), key=lambda corpus: counts[corpus] - wanted[corpus])
    for corpus in by_need[:spare] if spare > 0 else ():
        counts[corpus] += 1
    if spare < 0:  # more corpora were lifted to one sample than floors had left over: the largest pays
        counts[counts.index(max(counts))] += spare
    return counts


def earliest_deadline_first(counts: Sequence[int]) -> npt.NDArray[np.int16]:
    """The order of corpora in one period, [sum(counts)], which keeps each to within one sample of its share.

    The j-th sample of a corpus that has `count` of the `period` samples may come from place floor(j period / count)
    on and has to come before place ceil((j + 1) period / count). Of those that may come, the one that has to come
    first is taken, which meets every deadline (Tijdeman 1980, the chairman assignment problem).
    """
    period = sum(counts)
    order = np.empty(period, np.int16)
    coming = [(0, corpus, 0) for corpus in range(len(counts))]
    ready: list[tuple[int, int, int]] = []
    for place in range(period):
        while coming and coming[0][0] <= place:
            _, corpus, rank = heapq.heappop(coming)
            heapq.heappush(ready, (-(-(rank + 1) * period // counts[corpus]), corpus, rank))
        _, corpus, rank = heapq.heappop(ready)
        order[place] = corpus
        if rank + 1 < counts[corpus]:
            heapq.heappush(coming, ((rank + 1) * period // counts[corpus], corpus, rank + 1))
    return order


def build_datasets(data: DataConfig, sequence_length: int) -> Datasets:
    """Open what `data` names. Raises DataError for files that are missing, damaged or too short, and where train is absent."""
    if data.paths is not None and data.split is not None:
        parts = [_split_part(data, data.paths, data.split, part, sequence_length) for part in range(3)]
    else:
        parts = [_whole(data, source, sequence_length) for source in (data.train, data.valid, data.test)]
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
    """Raise DataError if a corpus has an id that the vocabulary has not (`indexed.check_corpus` says how far it looks)."""
    for source in (data.train, data.valid, data.test, data.paths):
        for prefix in _prefixes(source):
            check_corpus(IndexedCorpus(prefix), vocab_size)


def _split_part(data: DataConfig, source: Source, split: str, part: int, sequence_length: int) -> Dataset | None:
    if float(split.split(",")[part]) == 0:
        return None
    corpora = [IndexedCorpus(prefix) for prefix in _prefixes(source)]
    ranges = [split_ranges(len(corpus.sizes), split)[part] for corpus in corpora]
    return _blend([_packed(data, c, r, sequence_length) for c, r in zip(corpora, ranges, strict=True)], source)


def _whole(data: DataConfig, source: Source | None, sequence_length: int) -> Dataset | None:
    if not source:
        return None
    corpora = [IndexedCorpus(prefix) for prefix in _prefixes(source)]
    return _blend([_packed(data, corpus, range(len(corpus.sizes)), sequence_length) for corpus in corpora], source)


def _packed(data: DataConfig, corpus: IndexedCorpus, sequences: range, sequence_length: int) -> PackedCorpus:
    cache_dir = Path(data.cache_dir) if data.cache_dir else None
    return PackedCorpus(corpus, sequences, sequence_length, data.seed, cache_dir)


def _blend(corpora: list[PackedCorpus], source: Source) -> Dataset:
    return Blend(corpora, list(source.values())) if isinstance(source, dict) and len(corpora) > 1 else corpora[0]


def _prefixes(source: Source | None) -> list[str]:
    if not source:
        return []
    return [source] if isinstance(source, str) else list(source)
