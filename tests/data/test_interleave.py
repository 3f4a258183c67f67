"""Shares are checked at every prefix of the stream by exact arithmetic; positions are compared with a plain simulation."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megagpt.data import interleave
from megagpt.data.interleave import MAX_DENOMINATOR, Interleave, counts_before, shares

WEIGHTS = st.lists(st.one_of(st.integers(1, 60), st.floats(0.01, 10.0)), min_size=1, max_size=8)


def exact_shares(weights: list[float]) -> list[Fraction]:
    return [Fraction(str(weight)) / sum(Fraction(str(weight)) for weight in weights) for weight in weights]


def largest_deviation(weights: list[float], order: Interleave, first: int, count: int) -> Fraction:
    """Return the largest difference of any corpus from its share, in samples, over the prefixes that end from `first` on."""
    expected = exact_shares(weights)
    counts = counts_before(first, *shares(weights))
    largest = Fraction(0)
    for position in range(first, first + count):
        corpus, index = order.at(position)
        assert index == counts[corpus]
        counts[corpus] += 1
        largest = max(largest, *(abs(n - (position + 1) * share) for n, share in zip(counts, expected, strict=True)))
    return largest


def simulated(weights: list[float], count: int) -> list[int]:
    """Return the corpora of the first `count` positions, by a plain loop that compares all corpora at each position."""
    expected = exact_shares(weights)
    counts = [0] * len(weights)
    order: list[int] = []
    for position in range(count):
        released = [c for c, share in enumerate(expected) if counts[c] // share <= position]
        order.append(min(released, key=lambda c: (-(-(counts[c] + 1) // expected[c]), c)))
        counts[order[-1]] += 1
    return order


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
@example([0.1] * 10)
@example([0.123456789, 2.71828182845, 1.0])
def test_every_prefix_of_the_stream_is_within_one_sample_of_the_shares(weights: list[float]) -> None:
    assert largest_deviation(weights, Interleave(weights), 0, 500) < 1 + 1e-7


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.integers(0, 10**9))
def test_prefixes_far_into_the_stream_are_within_one_sample_of_the_shares(weights: list[float], first: int) -> None:
    """Rounding the shares to 1 / MAX_DENOMINATOR adds at most 1 / MAX_DENOMINATOR of a sample per position."""
    assert largest_deviation(weights, Interleave(weights), first, 60) < 1 + (first + 60) / MAX_DENOMINATOR


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_the_order_equals_that_of_a_plain_simulation(weights: list[float]) -> None:
    order = Interleave(weights)
    assert [order.at(position)[0] for position in range(300)] == simulated(weights, 300)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=9), st.integers(0, 400))
def test_counts_before_any_position_equal_those_of_a_plain_simulation(weights: list[float], position: int) -> None:
    before = simulated(weights, position)
    assert counts_before(position, *shares(weights)) == [before.count(corpus) for corpus in range(len(weights))]


def test_the_order_does_not_depend_on_the_block_size_or_the_order_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [0.31, 0.0171, 5.0, 1.3, 1.3]
    one_block = Interleave(weights)
    expected = [one_block.at(position) for position in range(1000)]
    monkeypatch.setattr(interleave, "BLOCK", 7)
    small_blocks = Interleave(weights)
    assert [small_blocks.at(position) for position in reversed(range(1000))] == expected[::-1]


def test_shares_are_exact_if_the_denominator_is_small_and_else_rounded_to_a_sum_of_one() -> None:
    assert shares([0.7, 0.2, 0.1]) == ([7, 2, 1], 10)
    weights = [0.37454011884736254, 0.9507143064162014, 0.7319939418114051]
    numerators, denominator = shares(weights)
    assert denominator == MAX_DENOMINATOR == sum(numerators)
    for numerator, share in zip(numerators, exact_shares(weights), strict=True):
        assert abs(Fraction(numerator, denominator) - share) < Fraction(1, MAX_DENOMINATOR)


def test_samples_of_a_small_share_are_evenly_spaced() -> None:
    order = Interleave([9999, 1])
    positions = [position for position in range(60_000) if order.at(position)[0] == 1]
    assert len(positions) == 6 and all(abs(b - a - 10_000) <= 10_000 for a, b in pairwise(positions))
