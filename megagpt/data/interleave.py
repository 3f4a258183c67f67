"""Which corpus each sample of a blend comes from: at every position each corpus has given its share, within one sample.

Sample j of a corpus with share p may be at position floor(j / p) or later, and must be before position ceil((j + 1) / p).
Among the samples that may come next, the one with the earliest deadline is taken; this meets every deadline (Tijdeman 1980,
the chairman assignment problem).
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 2**14
"""Positions that are computed together, in about 20 ms."""
MAX_DENOMINATOR = 2**36
"""Shares without a smaller common denominator are rounded to multiples of 1 / MAX_DENOMINATOR: one sample in 10^11."""
MIN_SHARE = 2.0**-22
"""Time and memory to find a far position grow with the reciprocal of the smallest share."""


class _Block(NamedTuple):
    corpora: npt.NDArray[np.int16]
    """Corpus of each position, [BLOCK]."""
    indices: npt.NDArray[np.int64]
    """Index of the sample within its corpus, [BLOCK]."""


class Interleave:
    """The order of the corpora; any position is found directly."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Raises ValueError for a share below `MIN_SHARE`."""
        self._numerators, self._denominator = shares(weights)
        if min(self._numerators) < MIN_SHARE * self._denominator:
            raise ValueError(f"a share of {min(self._numerators) / self._denominator:.2g} is below {MIN_SHARE:.2g}")
        self._block = lru_cache(maxsize=2)(self._compute_block)

    def at(self, position: int) -> tuple[int, int]:
        """Return the corpus at `position`, and the index of the sample within that corpus."""
        number, offset = divmod(position, BLOCK)
        block = self._block(number)
        return int(block.corpora[offset]), int(block.indices[offset])

    def counts(self, position: int) -> list[int]:
        """Return the samples of each corpus before `position`."""
        return counts_before(position, self._numerators, self._denominator)

    def first_position(self, corpus: int, index: int) -> int:
        """Return the first position that can have sample `index` of a corpus."""
        return self._window(corpus, index)[0]

    def _compute_block(self, number: int) -> _Block:
        first = number * BLOCK
        counts = self.counts(first)
        corpora, indices = np.empty(BLOCK, np.int16), np.empty(BLOCK, np.int64)
        waiting = [(*self._window(corpus, count), corpus) for corpus, count in enumerate(counts)]
        heapq.heapify(waiting)
        ready: list[tuple[int, int]] = []
        for offset in range(BLOCK):
            while waiting and waiting[0][0] <= first + offset:
                _, deadline, corpus = heapq.heappop(waiting)
                heapq.heappush(ready, (deadline, corpus))
            _, corpus = heapq.heappop(ready)
            corpora[offset], indices[offset] = corpus, counts[corpus]
            counts[corpus] += 1
            release, deadline = self._window(corpus, counts[corpus])
            heapq.heappush(waiting, (release, deadline, corpus))
        return _Block(corpora, indices)

    def _window(self, corpus: int, index: int) -> tuple[int, int]:
        """Return the first position of a sample and its deadline."""
        return window(index, self._numerators[corpus], self._denominator)


def window(index: int, numerator: int, denominator: int) -> tuple[int, int]:
    """Return the positions [first, end) between which sample `index` of a corpus with this share comes."""
    return index * denominator // numerator, -(-(index + 1) * denominator // numerator)


def shares(weights: Sequence[float]) -> tuple[list[int], int]:
    """Return the shares as numerators over one denominator.

    They are exact if the denominator is at most `MAX_DENOMINATOR`, else rounded by the largest-remainder method.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    exact = [weight / sum(exact) for weight in exact]
    denominator = math.lcm(*(share.denominator for share in exact))
    if denominator <= MAX_DENOMINATOR:
        return [int(share * denominator) for share in exact], denominator
    numerators = [math.floor(share * MAX_DENOMINATOR) for share in exact]
    by_remainder = sorted(range(len(numerators)), key=lambda corpus: numerators[corpus] - exact[corpus] * MAX_DENOMINATOR)
    for corpus in by_remainder[: MAX_DENOMINATOR - sum(numerators)]:
        numerators[corpus] += 1
    return numerators, MAX_DENOMINATOR


def counts_before(position: int, numerators: Sequence[int], denominator: int) -> list[int]:
    """Return the samples of each corpus before `position`, as the rule of this module gives them, without running it.

    Each corpus has given the floor of its share, or one more. Taking the released sample with the first deadline is the
    greedy algorithm of a matroid. So the samples before `position` are found by taking, in order of deadline, every sample
    that still fits between its release and `position`, together with those taken before it. It fits if for no earlier
    position the samples released from there on outnumber the positions from there on.
    """
    counts = [position * numerator // denominator for numerator in numerators]
    releases = {}
    for corpus, numerator in enumerate(numerators):
        if position * numerator % denominator:
            releases[corpus] = position - window(counts[corpus], numerator, denominator)[0]  # positions from its release on
    if not releases:
        return counts
    # slack[t - 1]: of the last t positions before `position`, those that the samples sure to come leave free.
    spans = np.arange(1, max(releases.values()) + 1, dtype=np.int64)
    slack = spans.copy()
    for numerator in numerators:
        slack -= np.maximum(0, (spans * numerator - position * numerator % denominator) // denominator)
    missing = position - sum(counts)
    by_deadline = sorted(releases, key=lambda corpus: (window(counts[corpus], numerators[corpus], denominator)[1], corpus))
    for corpus in by_deadline:
        span = releases[corpus]
        if missing and slack[span - 1 :].min() > 0:
            slack[span - 1 :] -= 1
            counts[corpus] += 1
            missing -= 1
    return counts
