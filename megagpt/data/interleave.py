"""From which corpus each sample of a blend comes: at every point each corpus has given its share, to within one sample.

The j-th sample of a corpus with the share p may come from place floor(j / p) on and has to come before place
ceil((j + 1) / p). Of those that may come, the one that has to come first is taken, which meets every deadline
(Tijdeman 1980, the chairman assignment problem).
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
"""Places that are laid out at a time: about 20 ms."""
FINEST = 2**36
"""Shares are multiples of 1 / FINEST where they have no smaller common denominator: off by a sample in 10^11."""
SMALLEST_SHARE = 2.0**-22
"""Finding a place far into the stream takes time and memory in proportion to the reciprocal of the smallest share."""


class _Block(NamedTuple):
    choices: npt.NDArray[np.int16]
    """Corpora, [BLOCK]."""
    ranks: npt.NDArray[np.int64]
    """How many samples their corpus gave before each, [BLOCK]."""


class Interleave:
    """The order of corpora, for any place without walking through those before."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Raises ValueError for a share below `SMALLEST_SHARE`."""
        self._parts, self._whole = shares(weights)
        if min(self._parts) < SMALLEST_SHARE * self._whole:
            raise ValueError(f"a share of {min(self._parts) / self._whole:.2g} is below {SMALLEST_SHARE:.2g}")
        self._block = lru_cache(maxsize=2)(self._lay_out)

    def at(self, place: int) -> tuple[int, int]:
        """The corpus of the sample at `place`, and how many samples that corpus gave before it."""
        number, offset = divmod(place, BLOCK)
        block = self._block(number)
        return int(block.choices[offset]), int(block.ranks[offset])

    def _lay_out(self, number: int) -> _Block:
        first = number * BLOCK
        given = counts_before(first, self._parts, self._whole)
        choices, ranks = np.empty(BLOCK, np.int16), np.empty(BLOCK, np.int64)
        coming = [(*self._window(corpus, rank), corpus) for corpus, rank in enumerate(given)]
        heapq.heapify(coming)
        ready: list[tuple[int, int]] = []
        for offset in range(BLOCK):
            while coming and coming[0][0] <= first + offset:
                _, deadline, corpus = heapq.heappop(coming)
                heapq.heappush(ready, (deadline, corpus))
            _, corpus = heapq.heappop(ready)
            choices[offset], ranks[offset] = corpus, given[corpus]
            given[corpus] += 1
            release, deadline = self._window(corpus, given[corpus])
            heapq.heappush(coming, (release, deadline, corpus))
        return _Block(choices, ranks)

    def _window(self, corpus: int, rank: int) -> tuple[int, int]:
        """The first place that a sample may come at, and the first that it may not."""
        return window(rank, self._parts[corpus], self._whole)


def window(rank: int, part: int, whole: int) -> tuple[int, int]:
    """The places [first, end) between which sample `rank` of a corpus of the share part / whole comes."""
    return rank * whole // part, -(-(rank + 1) * whole // part)


def shares(weights: Sequence[float]) -> tuple[list[int], int]:
    """The shares as whole parts of a whole: exact where its size is at most `FINEST`, else rounded by largest remainder."""
    exact = [Fraction(str(weight)) for weight in weights]
    exact = [weight / sum(exact) for weight in exact]
    whole = math.lcm(*(share.denominator for share in exact))
    if whole <= FINEST:
        return [int(share * whole) for share in exact], whole
    parts = [math.floor(share * FINEST) for share in exact]
    by_need = sorted(range(len(parts)), key=lambda corpus: parts[corpus] - exact[corpus] * FINEST)
    for corpus in by_need[: FINEST - sum(parts)]:
        parts[corpus] += 1
    return parts, FINEST


def counts_before(place: int, parts: Sequence[int], whole: int) -> list[int]:
    """Samples of each corpus before `place`, as the rule of this module gives them from place 0 on, without playing it.

    Each has given the floor of its share or one more. To take the released sample with the first deadline is to be
    greedy in a matroid: what has come before `place` is, taken by deadline, whatever still fits, together with what was
    taken before it, between its release and `place`. It fits if for no earlier place the samples that are released from
    it on outnumber the places from it on.
    """
    given = [place * part // whole for part in parts]
    releases = {}
    for corpus, part in enumerate(parts):
        if place * part % whole:
            releases[corpus] = place - window(given[corpus], part, whole)[0]  # places from its release to `place`
    if not releases:
        return given
    # slack[t - 1]: of the last t places before `place`, those that the samples sure to come leave free.
    spans = np.arange(1, max(releases.values()) + 1, dtype=np.int64)
    slack = spans.copy()
    for part in parts:
        slack -= np.maximum(0, (spans * part - place * part % whole) // whole)
    missing = place - sum(given)
    for corpus in sorted(releases, key=lambda corpus: (window(given[corpus], parts[corpus], whole)[1], corpus)):
        span = releases[corpus]
        if missing and slack[span - 1 :].min() > 0:
            slack[span - 1 :] -= 1
            given[corpus] += 1
            missing -= 1
    return given
