"""Shares of a blend against exact arithmetic on what it hands out, near and far into the stream."""

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.blend import LONGEST_PERIOD, Blend, samples_per_period, split_ranges


class Numbered:
    """Stands for a corpus: a sample is its own number and its place in the corpus."""

    samples_per_epoch = 10

    def __init__(self, number: int) -> None:
        self._number = number

    def sample(self, index: int) -> Any:
        return self._number, index


def blend_of(weights: list[float]) -> Blend:
    return Blend([Numbered(number) for number in range(len(weights))], weights)  # type: ignore[list-item]


def largest_deviation(weights: list[float], samples: list[Any]) -> Fraction:
    """Samples that a corpus is away from its share, at worst over all prefixes of `samples`."""
    shares = [Fraction(str(weight)) / sum(Fraction(str(weight)) for weight in weights) for weight in weights]
    given_, worst = [0] * len(weights), Fraction(0)
    for length, (corpus, _) in enumerate(samples, 1):
        given_[corpus] += 1
        worst = max(worst, *(abs(count - length * share) for count, share in zip(given_, shares, strict=True)))
    return worst


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_every_prefix_of_a_blend_is_within_one_sample_of_the_shares(weights: list[float]) -> None:
    blend = blend_of(weights)
    assert largest_deviation(weights, [blend.sample(index) for index in range(400)]) < 1


def test_shares_without_a_short_common_period_are_kept_to_one_part_in_the_longest_period() -> None:
    weights = [0.123456789, 2.71828182845, 1.0]
    counts = samples_per_period(weights)
    assert sum(counts) == LONGEST_PERIOD
    assert all(abs(c / LONGEST_PERIOD - w / sum(weights)) < 1 / LONGEST_PERIOD for c, w in zip(counts, weights, strict=True))
    blend = blend_of(weights)
    assert largest_deviation(weights, [blend.sample(index) for index in range(2000)]) < 1.01


def test_a_corpus_of_the_smallest_weight_still_has_its_turn() -> None:
    assert samples_per_period([1e-9, 1.0, 2.7182818])[0] == 1


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
