from itertools import product

import pytest
from torch_orders import printed, torch_order

from megagpt.schedules.common import v_placement
from megagpt.schedules.plan import Plan
from megagpt.schedules.simulate import Simulation, simulate
from megagpt.schedules.zbv import zbv

SIZES = list(product((1, 2, 3, 5, 8, 16), (1, 2, 3, 7, 16, 64)))


def idle_within(plan: Plan, simulation: Simulation) -> list[float]:
    """Return, for each rank, its idle time between its first and its last action."""
    spans = [simulation.end[order[-1]] - simulation.start[order[0]] for order in plan.actions]
    work = [sum(simulation.end[action] - simulation.start[action] for action in order) for order in plan.actions]
    return [span - time for span, time in zip(spans, work, strict=True)]


def test_stages_are_placed_in_a_v():
    assert v_placement(3) == (0, 1, 2, 2, 1, 0)
    assert v_placement(2, 3) == (0, 1, 1, 0, 0, 1)


@pytest.mark.parametrize(
    "ranks, micro_batches", [(1, 1), (1, 4), (2, 1), (2, 6), (3, 2), (3, 7), (4, 6), (4, 8), (5, 17), (8, 16)]
)
def test_the_order_equals_torchs(ranks: int, micro_batches: int):
    assert printed(zbv(ranks, micro_batches)) == torch_order("ZBVZeroBubble", ranks, micro_batches, 2)


def test_no_rank_idles_between_its_first_action_and_its_last():
    """The paper's bubble, 0 if F, I and W take the same time, counts from each rank's own start; ranks start one F apart."""
    for ranks, micro_batches in SIZES:
        if micro_batches < 2 * ranks - 1:
            continue
        plan = zbv(ranks, micro_batches)
        simulation = simulate(plan, in_order=False)
        assert idle_within(plan, simulation) == [0] * ranks
        assert simulation.makespan == 6 * micro_batches + ranks - 1


def test_the_bubble_is_never_larger_than_that_of_1f1b():
    for ranks, micro_batches in SIZES:
        makespan = simulate(zbv(ranks, micro_batches), in_order=False).makespan
        assert makespan <= 6 * (micro_batches + ranks - 1)  # 1F1B's, in units of half a stage


def test_no_rank_needs_more_memory_than_the_first_one_of_1f1b():
    """p micro-batches, each of two halves (Qi et al., arXiv 2401.10241, table 2)."""
    for ranks, micro_batches in SIZES:
        assert max(simulate(zbv(ranks, micro_batches), in_order=False).peak_activations) == 2 * min(ranks, micro_batches)
