import math
from itertools import product

import pytest

from megagpt.schedules.common import v_placement
from megagpt.schedules.simulate import simulate
from megagpt.schedules.v_half_v_min import v_half, v_min

SIZES = list(product(range(1, 17), (1, 2, 3, 7, 16, 33)))


@pytest.mark.parametrize("build, share, more", [(v_half, 1 / 2, 1), (v_min, 1 / 3, 4 / 3)])
def test_a_rank_needs_the_papers_share_of_the_activation_memory_of_1f1b_and_little_more(build, share: float, more: float):
    """Half or a third of p micro-batches (Qi et al., arXiv 2405.15362), and a constant."""
    for ranks, micro_batches in SIZES:
        plan = build(ranks, micro_batches)
        assert plan.rank_of_stage == v_placement(ranks)
        halves = max(simulate(plan, in_order=False).peak_activations)
        assert halves / 2 <= ranks * share + more + 1e-9


def test_the_peak_activations_with_many_micro_batches_are_exactly_these():
    for ranks in range(1, 17):
        assert max(simulate(v_half(ranks, 16), in_order=False).peak_activations) == 2 * math.ceil((ranks + 1) / 2)
        assert max(simulate(v_min(ranks, 16), in_order=False).peak_activations) == 2 * math.ceil((ranks + 2) / 3)


@pytest.mark.parametrize("build, share", [(v_half, 1 / 2), (v_min, 2 / 3)])
def test_the_bubble_is_at_most_the_papers_share_of_that_of_1f1b(build, share: float):
    """1F1B's bubble is 6(p - 1) in units of an F, I or W of half a stage. V-Half needs p micro-batches to fill the pipeline."""
    for ranks, micro_batches in SIZES:
        if micro_batches < ranks:
            continue
        bubble = simulate(build(ranks, micro_batches), in_order=False).makespan - 6 * micro_batches
        assert bubble <= 6 * (ranks - 1) * share
