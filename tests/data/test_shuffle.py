"""The order of an epoch is compared with its plain definition; it is fixed, because a change would change resumed runs."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.shuffle import epoch_order, permutation


@given(st.integers(1, 500), st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_a_permutation_contains_every_number_once(n: int, key: list[int]) -> None:
    assert sorted(permutation(n, *key).tolist()) == list(range(n))


def test_a_permutation_sorts_random_numbers_and_breaks_ties_by_position() -> None:
    raw = np.random.Philox(np.random.SeedSequence((5, 6))).random_raw(1000)
    expected = sorted(range(1000), key=lambda number: (int(raw[number]) % 2**54, number))
    assert permutation(1000, 5, 6).tolist() == expected


def test_permutations_equal_the_recorded_ones() -> None:
    """Other numbers mean that a run resumed with this version would read other samples."""
    assert permutation(10, 1234, 0, 0).tolist() == GOLDEN_10
    assert hashlib.sha256(permutation(100_000, 1234, 1, 1).astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN_100000


GOLDEN_10 = [7, 3, 1, 5, 6, 2, 8, 9, 0, 4]
GOLDEN_100000 = "3ec3ac7ac98d5c96"


def test_the_position_of_a_number_is_uniformly_distributed() -> None:
    """Expected mean position of number 0 over 4,000 keys: 49.5 with a standard error of 0.46."""
    positions = [int(np.flatnonzero(permutation(100, seed) == 0)[0]) for seed in range(4000)]
    assert abs(np.mean(positions) - 49.5) < 4 * 0.46
    assert len(set(positions)) == 100


@pytest.mark.parametrize("epoch", [0, 1])
def test_every_epoch_and_every_seed_has_its_own_order(epoch: int) -> None:
    sizes = np.full(200, 10, np.int32)
    order, next_order = (epoch_order(sizes, 7, 3, number) for number in (epoch, epoch + 1))
    assert not np.array_equal(order.documents, next_order.documents)
    assert not np.array_equal(order.samples, next_order.samples)
    assert not np.array_equal(order.documents, epoch_order(sizes, 7, 4, epoch).documents)


def test_samples_cover_the_stream_except_for_an_incomplete_last_one() -> None:
    sizes = np.array([5, 0, 9, 1, 7], np.int32)
    order = epoch_order(sizes, 4, 0, 0)
    assert order.ends.tolist() == np.cumsum(sizes[order.documents]).tolist()
    assert sorted(order.samples.tolist()) == [0, 1, 2, 3, 4]  # 22 tokens: 5 x 4 inputs, the last label, and one unused token
