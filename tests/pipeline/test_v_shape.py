from itertools import product

import pytest
from torch_orders import printed, torch_order

from megagpt.pipeline.plan import Plan
from megagpt.pipeline.simulate import Simulation, simulate
from megagpt.pipeline.v_shape import v_placement, zbv

SIZES = list(product((1, 2, 3, 5, 8, 16), (1, 2, 3, 7, 16, 64)))


def idle_within(plan: Plan, played: Simulation) -> list[float]:
    """By rank: the time between its first action and its last in which it computes nothing."""
    spans = [played.end[order[-1]] - played.start[order[0]] for order in plan.actions]
    work = [sum(played.end[action] - played.start[action] for action in order) for order in plan.actions]
    return [span - time for span, time in zip(spans, work, strict=True)]


def test_stages_go_down_the_ranks_and_up_again():
    assert v_placement(3) == (0, 1, 2, 2, 1, 0)


@pytest.mark.parametrize(
    "ranks, micro_batches", [(1, 1), (1, 4), (2, 1), (2, 6), (3, 2), (3, 7), (4, 6), (4, 8), (5, 17), (8, 16)]
)
def test_the_order_is_torchs(ranks: int, micro_batches: int):
    assert printed(zbv(ranks, micro_batches)) == torch_order("ZBVZeroBubble", ranks, micro_batches, 2)


def test_no_rank_idles_between_its_first_action_and_its_last():
    """The paper's bubble, 0 where F, I and W take the same time, counts from a rank's own start; ranks start one F apart."""
    for ranks, micro_batches in SIZES:
        if micro_batches < 2 * ranks - 1:
            continue
        plan = zbv(ranks, micro_batches)
        played = simulate(plan, in_order=False)
        assert idle_within(plan, played) == [0] * ranks
        assert played.makespan == 6 * micro_batches + ranks - 1


def test_the_bubble_is_never_above_one_f_one_bs():
    for ranks, micro_batches in SIZES:
        makespan = simulate(zbv(ranks, micro_batches), in_order=False).makespan
        assert makespan <= 6 * (micro_batches + ranks - 1)  # 1F1B's, in units of half a stage


def test_no_rank_holds_more_than_one_f_one_bs_first():
    """p micro-batches, each of two halves (Qi et al., arXiv 2401.10241, table 2)."""
    for ranks, micro_batches in SIZES:
        assert max(simulate(zbv(ranks, micro_batches), in_order=False).peak_live) == 2 * min(ranks, micro_batches)
