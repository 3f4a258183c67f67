"""Shares at every prefix of the stream by exact arithmetic; any place against playing the whole stream up to it."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megagpt.data import interleave
from megagpt.data.interleave import FINEST, Interleave, counts_before, shares

WEIGHTS = st.lists(st.one_of(st.integers(1, 60), st.floats(0.01, 10.0)), min_size=1, max_size=8)


def exact_shares(weights: list[float]) -> list[Fraction]:
    return [Fraction(str(weight)) / sum(Fraction(str(weight)) for weight in weights) for weight in weights]


def largest_deviation(weights: list[float], order: Interleave, first: int, count: int) -> Fraction:
    """Samples that a corpus is away from its share, at worst over the prefixes that end in first ... first + count."""
    expected, worst = exact_shares(weights), Fraction(0)
    given_ = counts_before(first, *shares(weights))
    for place in range(first, first + count):
        corpus, rank = order.at(place)
        assert rank == given_[corpus]
        given_[corpus] += 1
        worst = max(worst, *(abs(n - (place + 1) * share) for n, share in zip(given_, expected, strict=True)))
    return worst


def played(weights: list[float], count: int) -> list[int]:
    """The rule, played from the first place on by looking at every corpus at every place."""
    expected, given_, order = exact_shares(weights), [0] * len(weights), []
    for place in range(count):
        released = [c for c, share in enumerate(expected) if given_[c] // share <= place]
        order.append(min(released, key=lambda c: (-(-(given_[c] + 1) // expected[c]), c)))
        given_[order[-1]] += 1
    return order


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
@example([0.1] * 10)
@example([0.123456789, 2.71828182845, 1.0])
def test_every_prefix_is_within_one_sample_of_the_shares(weights: list[float]) -> None:
    assert largest_deviation(weights, Interleave(weights), 0, 500) < 1 + 1e-7


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.integers(0, 10**9))
def test_so_it_is_far_into_the_stream(weights: list[float], first: int) -> None:
    """There the shares' rounding to 1 / FINEST shows, by that part of a sample for each one before."""
    assert largest_deviation(weights, Interleave(weights), first, 60) < 1 + (first + 60) / FINEST


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_the_order_is_that_of_the_rule_played_from_the_beginning(weights: list[float]) -> None:
    order = Interleave(weights)
    assert [order.at(place)[0] for place in range(300)] == played(weights, 300)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=9), st.integers(0, 400))
def test_counts_at_any_place_are_those_of_playing_up_to_it(weights: list[float], place: int) -> None:
    before = played(weights, place)
    assert counts_before(place, *shares(weights)) == [before.count(corpus) for corpus in range(len(weights))]


def test_blocks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [0.31, 0.0171, 5.0, 1.3, 1.3]
    whole = Interleave(weights)
    expected = [whole.at(place) for place in range(1000)]
    monkeypatch.setattr(interleave, "BLOCK", 7)
    pieces = Interleave(weights)
    assert [pieces.at(place) for place in reversed(range(1000))] == expected[::-1]


def test_shares_are_exact_where_they_can_be_and_add_up_where_not() -> None:
    assert shares([0.7, 0.2, 0.1]) == ([7, 2, 1], 10)
    weights = [0.37454011884736254, 0.9507143064162014, 0.7319939418114051]
    parts, whole = shares(weights)
    assert whole == FINEST == sum(parts)
    assert all(
        abs(Fraction(part, whole) - share) < Fraction(1, FINEST)
        for part, share in zip(parts, exact_shares(weights), strict=True)
    )


def test_a_small_share_comes_in_even_distances() -> None:
    order = Interleave([9999, 1])
    places = [place for place in range(60_000) if order.at(place)[0] == 1]
    assert len(places) == 6 and all(abs(b - a - 10_000) <= 10_000 for a, b in pairwise(places))
