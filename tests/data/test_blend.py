"""Blends and splits by what they hand out, near and far into the stream."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from megagpt.data.blend import Blend, split_ranges
from megagpt.errors import DataError


class Numbered:
    """Stands for a corpus: a sample is its own number and its place in the corpus."""

    samples_per_epoch = 10

    def __init__(self, number: int) -> None:
        self._number = number

    def sample(self, index: int) -> Any:
        return self._number, index


def blend_of(weights: list[float]) -> Blend:
    return Blend([Numbered(number) for number in range(len(weights))], weights)


def test_each_corpus_gives_its_own_samples_once_and_in_order() -> None:
    blend, following = blend_of([0.7, 0.2, 0.1]), Counter[int]()
    for index in range(95):
        corpus, own = blend.sample(index)
        assert own == following[corpus]
        following[corpus] += 1


def test_a_sample_far_into_the_stream_follows_on_from_the_exact_counts() -> None:
    far = 10**12  # out of reach for anything that walks there
    corpus, own = blend_of([7, 2, 1]).sample(far)
    assert (corpus, own) == (0, far * 7 // 10)


def test_a_weight_too_small_to_matter_is_refused() -> None:
    with pytest.raises(DataError, match="weights 1, 1e-09: a share of 1e-09 is below 2.4e-07; leave it out"):
        blend_of([1, 1e-9])


@pytest.mark.parametrize(
    "n, split", [(1000, "949,50,1"), (7, "98,1,1"), (10, "85,10,5"), (3, "0,1,1"), (123457, "0.9,0.05,0.05")]
)
def test_splits_round_as_cumulative_shares_and_cover_all(n: int, split: str) -> None:
    shares = np.array([float(share) for share in split.split(",")])
    parts, end = split_ranges(n, split), 0
    for part, bound in zip(parts, np.cumsum(shares / shares.sum()), strict=True):
        assert part.start == end and abs(part.stop - bound * n) <= 0.5 + 1e-9
        end = part.stop
    assert end == n
