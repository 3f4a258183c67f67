from itertools import product

import pytest
from torch_orders import printed, torch_order

from megagpt.schedules.common import loop_placement
from megagpt.schedules.interleaved import interleaved_1f1b, interleaved_zero_bubble
from megagpt.schedules.one_f_one_b import zb_h1
from megagpt.schedules.simulate import simulate

TORCH_NAMES = [(interleaved_1f1b, "Interleaved1F1B"), (interleaved_zero_bubble, "InterleavedZeroBubble")]
SIZES = [(2, 1, 2), (2, 4, 3), (3, 3, 2), (3, 5, 2), (3, 9, 3), (4, 2, 2), (4, 8, 2), (4, 10, 3), (5, 20, 4), (8, 16, 2)]
FULL_ROUNDS = [(p, rounds * p, v) for p, rounds, v in product((1, 2, 3, 5, 8), (1, 2, 4), (2, 3))]


def test_stages_are_placed_in_a_loop_over_the_ranks():
    assert loop_placement(3, 2) == (0, 1, 2, 0, 1, 2)


def test_interleaved_1f1b_on_two_ranks_is_this_list():
    assert printed(interleaved_1f1b(2, 2, 2)) == [
        ["0F0", "0F1", "2F0", "2F1", "2B0", "2B1", "0B0", "0B1"],
        ["1F0", "1F1", "3F0", "3B0", "3F1", "3B1", "1B0", "1B1"],
    ]


@pytest.mark.parametrize("build, name", TORCH_NAMES)
@pytest.mark.parametrize("ranks, micro_batches, chunks", SIZES)
def test_the_order_equals_torchs(build, name: str, ranks: int, micro_batches: int, chunks: int):
    assert printed(build(ranks, micro_batches, chunks)) == torch_order(name, ranks, micro_batches, chunks)


@pytest.mark.parametrize("build, name", TORCH_NAMES)
def test_numbers_of_micro_batches_that_torch_refuses_give_rounds_of_two_lengths(build, name: str):
    """Nine micro-batches on four ranks: five, then four."""
    with pytest.raises(ValueError, match="multiple of the number of rounds"):
        torch_order(name, 4, 9, 2)
    first = printed(build(4, 9, 2))[0]
    forwards = [action for action in first if "F" in action]
    assert forwards == [f"{stage}F{index}" for batch in (range(5), range(5, 9)) for stage in (0, 4) for index in batch]


def test_the_bubble_is_that_of_1f1b_divided_by_the_chunks():
    """(p - 1) / (v m) of the work (Narayanan et al., arXiv 2104.04473, section 2.2.2). A chunk's F takes 1, its B 2."""
    for ranks, micro_batches, chunks in FULL_ROUNDS:
        work = 3 * chunks * micro_batches
        bubble = simulate(interleaved_1f1b(ranks, micro_batches, chunks), in_order=False).makespan - work
        assert bubble / work == pytest.approx((ranks - 1) / (chunks * micro_batches))


def test_the_first_rank_has_as_many_micro_batches_in_flight_as_the_paper_says():
    """p (1 + (p - 1) / (p v)) micro-batches (Korthikanti et al., arXiv 2205.05198, section 4.2.3), if there are that many."""
    for ranks, micro_batches, chunks in FULL_ROUNDS:
        peak = max(simulate(interleaved_1f1b(ranks, micro_batches, chunks), in_order=False).peak_activations)
        assert peak / chunks == pytest.approx(min(micro_batches, ranks * (1 + (ranks - 1) / (ranks * chunks))))


def test_delayed_weight_gradients_leave_a_third_of_the_bubble_and_need_no_more_memory_than_1f1b():
    """(p - 1)(F + I - W) of one chunk: ZB-H1's bubble (Qi et al., arXiv 2401.10241) divided by the chunks."""
    for ranks, micro_batches, chunks in FULL_ROUNDS:
        simulation = simulate(interleaved_zero_bubble(ranks, micro_batches, chunks), in_order=False)
        assert simulation.makespan == 3 * chunks * micro_batches + ranks - 1
        assert max(simulation.peak_activations) == chunks * ranks


def test_with_one_chunk_it_equals_zb_h1():
    assert interleaved_zero_bubble(4, 6, 1) == zb_h1(4, 6)
