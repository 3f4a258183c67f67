import math
from itertools import product

import pytest

from megagpt.pipeline.building_block import v_half, v_min
from megagpt.pipeline.simulate import simulate
from megagpt.pipeline.v_shape import v_placement

SIZES = list(product(range(1, 17), (1, 2, 3, 7, 16, 33)))


@pytest.mark.parametrize("maker, share, more", [(v_half, 1 / 2, 1), (v_min, 1 / 3, 4 / 3)])
def test_a_rank_holds_the_papers_share_of_one_f_one_bs_activations_and_little_more(maker, share: float, more: float):
    """Half or a third of p micro-batches (Qi et al., arXiv 2405.15362), and a constant."""
    for ranks, micro_batches in SIZES:
        plan = maker(ranks, micro_batches)
        assert plan.rank_of_stage == v_placement(ranks)
        halves = max(simulate(plan, in_order=False).peak_live)
        assert halves / 2 <= ranks * share + more + 1e-9


def test_what_v_half_and_v_min_hold_exactly_where_there_are_micro_batches_enough():
    for ranks in range(1, 17):
        assert max(simulate(v_half(ranks, 16), in_order=False).peak_live) == 2 * math.ceil((ranks + 1) / 2)
        assert max(simulate(v_min(ranks, 16), in_order=False).peak_live) == 2 * math.ceil((ranks + 2) / 3)


@pytest.mark.parametrize("maker, share", [(v_half, 1 / 2), (v_min, 2 / 3)])
def test_the_bubble_is_at_most_the_papers_share_of_one_f_one_bs(maker, share: float):
    """1F1B's bubble is 6(p - 1) in units of an F, I or W of half a stage. V-Half fills the pipe with p micro-batches."""
    for ranks, micro_batches in SIZES:
        if micro_batches < ranks:
            continue
        bubble = simulate(maker(ranks, micro_batches), in_order=False).makespan - 6 * micro_batches
        assert bubble <= 6 * (ranks - 1) * share
