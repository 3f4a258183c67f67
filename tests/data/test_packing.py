"""Every example that fits is packed once, no sample is overfull, and few are needed."""

import numpy as np
import pytest

from megagpt.data.packing import pack


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_every_example_that_fits_is_in_one_sample_which_has_room_for_it(capacity: int) -> None:
    lengths = np.random.default_rng(capacity).integers(1, 2 * capacity, 500)
    packing = pack(lengths, capacity)
    samples = [packing.of_sample(sample).tolist() for sample in range(len(packing))]
    assert sorted(np.concatenate(samples).tolist()) == np.flatnonzero(lengths <= capacity).tolist()
    assert all(0 < lengths[sample].sum() <= capacity for sample in samples)


def test_the_number_of_samples_is_near_the_least_possible() -> None:
    """Best-fit decreasing needs at most 11/9 of the optimum, plus 4 (Johnson 1973); on many small examples hardly more."""
    lengths = np.random.default_rng(0).integers(10, 400, 3000)
    least = -(-int(lengths.sum()) // 1000)
    assert least <= len(pack(lengths, 1000)) <= 1.01 * least


def test_packing_nothing_gives_no_sample() -> None:
    assert len(pack(np.array([5, 6]), 4)) == 0
    assert len(pack(np.zeros(0, np.int64), 4)) == 0
