import random
from dataclasses import replace
from itertools import pairwise

import pytest
from torch_orders import torch_plan

from megagpt.schedules.one_f_one_b import gpipe, one_f_one_b
from megagpt.schedules.plan import Action, ActionKind, Plan, forward_plan, split_backward
from megagpt.schedules.registry import SCHEDULES, make_plan
from megagpt.schedules.simulate import ScheduleError, kind_costs, peak_activations, simulate, step_time


def edited(plan: Plan, rank: int, order: list[Action]) -> Plan:
    orders = list(plan.actions)
    orders[rank] = tuple(order)
    return replace(plan, actions=tuple(orders))


def test_evaluation_has_one_micro_batch_in_flight_at_a_time():
    assert simulate(forward_plan(range(3), 7)).peak_activations == (1, 1, 1)


def test_a_split_backward_is_not_slower_than_the_full_one_and_needs_the_same_memory():
    """The neighbour gets the input gradient before the weight gradients are computed, so the pipeline drains no later."""
    for plan in (one_f_one_b(4, 8), gpipe(3, 5)):
        full, split = simulate(plan), simulate(split_backward(plan))
        assert split.peak_activations == full.peak_activations
        assert split.makespan <= full.makespan


def test_an_action_starts_when_its_input_has_arrived_and_its_rank_is_free():
    simulation = simulate(one_f_one_b(2, 1), kind_costs(forward=3, backward=5), transfer=2)
    times = {str(action): (simulation.start[action], simulation.end[action]) for action in simulation.start}
    assert times == {"0F0": (0, 3), "1F0": (5, 8), "1B0": (8, 13), "0B0": (15, 20)}
    assert simulation.makespan == 20
    assert simulation.idle_share == pytest.approx((12 / 20, 12 / 20))


def test_costs_may_differ_by_stage():
    simulation = simulate(forward_plan(range(3), 10), lambda action: 4.0 if action.stage == 1 else 1.0)
    assert simulation.makespan == 1 + 10 * 4 + 1


@pytest.mark.parametrize("name", ["Interleaved1F1B", "InterleavedZeroBubble"])
def test_torchs_interleaved_orders_run_to_the_end_with_a_smaller_bubble(name: str):
    plan = torch_plan(name, 4, 8)
    assert plan.rank_of_stage == (0, 1, 2, 3, 0, 1, 2, 3)
    assert all(share < 3 / 11 for share in simulate(plan).idle_share)  # (p - 1) / (m + p - 1) is 1F1B's


def test_torchs_zbv_needs_little_memory_but_needs_messages_in_another_order_than_sent():
    plan = torch_plan("ZBVZeroBubble", 4, 8)
    assert plan.rank_of_stage == (0, 1, 2, 3, 3, 2, 1, 0)
    simulation = simulate(plan, in_order=False)
    assert max(simulation.peak_activations) == 8  # 2p half stages
    assert all(share < 3 / 11 for share in simulation.idle_share)
    with pytest.raises(ScheduleError, match="order of messages: rank 1 waits for"):
        simulate(plan)


@pytest.mark.parametrize(
    "plan", [one_f_one_b(4, 6), gpipe(3, 4), forward_plan(range(3), 3)], ids=["1f1b", "gpipe", "evaluation"]
)
def test_every_duplicated_action_is_found_by_name(plan: Plan):
    for rank, order in enumerate(plan.actions):
        for index, action in enumerate(order):
            with pytest.raises(ScheduleError, match=f"^{action} appears 2 times$"):
                simulate(edited(plan, rank, [*order[:index], action, *order[index:]]))


def test_an_action_on_a_wrong_rank_is_found():
    plan = one_f_one_b(2, 2)
    with pytest.raises(ScheduleError, match="rank 0: 1F0 belongs to rank 1"):
        simulate(edited(plan, 0, [Action(ActionKind.FORWARD, 1, 0), *plan.actions[0]]))


def test_an_action_outside_the_plan_is_found():
    plan = one_f_one_b(2, 2)
    with pytest.raises(ScheduleError, match="rank 1: 1F2 is outside 2 stages x 2 micro-batches"):
        simulate(edited(plan, 1, [*plan.actions[1], Action(ActionKind.FORWARD, 1, 2)]))


def test_a_stage_without_a_rank_is_found():
    with pytest.raises(ScheduleError, match="does not give each of 2 stages a rank"):
        simulate(replace(one_f_one_b(2, 2), rank_of_stage=(0,)))


def test_a_full_backward_together_with_half_of_one_is_found():
    plan = one_f_one_b(1, 1)
    with pytest.raises(ScheduleError, match="0B0 appears together with a split backward"):
        simulate(edited(plan, 0, [*plan.actions[0], Action(ActionKind.BACKWARD_WEIGHT, 0, 0)]))


def test_every_swap_that_breaks_a_dependency_or_the_order_of_messages_is_found():
    """In 1F1B on two ranks or more, no two neighbours of the same kind can be swapped, and no B with its F."""
    plan = one_f_one_b(4, 6)
    for rank, order in enumerate(plan.actions):
        for index in range(len(order) - 1):
            first, second = order[index], order[index + 1]
            if first.kind is not second.kind and first.micro_batch != second.micro_batch:
                continue  # an F and a B of different micro-batches: another valid schedule
            with pytest.raises(ScheduleError, match=r"deadlock|order of messages"):
                simulate(edited(plan, rank, [*order[:index], second, first, *order[index + 2 :]]))


def test_a_deadlock_says_what_every_blocked_rank_waits_for():
    plan = one_f_one_b(2, 1)
    blocked = edited(plan, 0, [Action(ActionKind.BACKWARD, 0, 0), Action(ActionKind.FORWARD, 0, 0)])
    with pytest.raises(
        ScheduleError, match=r"^deadlock: rank 0 at 0B0 waits for 0F0 of rank 0; rank 1 at 1F0 waits for 0F0 of rank 0$"
    ):
        simulate(blocked)


def test_a_w_before_its_i_is_a_deadlock():
    plan = split_backward(one_f_one_b(1, 1))
    f, i, w = plan.actions[0]
    with pytest.raises(ScheduleError, match="rank 0 at 0W0 waits for 0I0"):
        simulate(edited(plan, 0, [f, w, i]))


def test_messages_needed_in_another_order_than_sent_are_refused_only_where_receives_block_in_order():
    plan = gpipe(2, 2)
    order = plan.actions[1]
    swapped = edited(plan, 1, [order[1], order[0], *order[2:]])
    with pytest.raises(
        ScheduleError, match="order of messages: rank 1 waits for 1F1's input, but rank 0 sends 1F0's before it"
    ):
        simulate(swapped)
    assert simulate(swapped, in_order=False).makespan > simulate(plan).makespan


def test_a_random_order_is_refused_or_simulated_with_every_dependency_kept():
    """The orders are random permutations of the right actions."""
    generator = random.Random(0)
    simulated = 0
    for _ in range(300):
        plan = one_f_one_b(2, 2)
        shuffled = replace(plan, actions=tuple(tuple(generator.sample(order, len(order))) for order in plan.actions))
        try:
            simulation = simulate(shuffled, in_order=False)
        except ScheduleError:
            continue
        simulated += 1
        ends = {str(action): time for action, time in simulation.end.items()}
        starts = {str(action): time for action, time in simulation.start.items()}
        for batch in (0, 1):
            chain = [f"0F{batch}", f"1F{batch}", f"1B{batch}", f"0B{batch}"]
            assert all(ends[a] <= starts[b] for a, b in pairwise(chain))
    assert 0 < simulated < 300


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("transfer", [0.0, 0.3, 4.0])
def test_the_fast_step_time_and_the_peak_are_those_of_the_full_simulation(name: str, transfer: float):
    cost = kind_costs(1.0, 1.9, 1.1, 0.8)
    for ranks, micro_batches in ((1, 3), (2, 5), (4, 9), (5, 3)):
        plan = make_plan(name, ranks, micro_batches, 3 if SCHEDULES[name].interleaved else 1)
        full = simulate(plan, cost, transfer, in_order=False)
        assert step_time(plan, cost, transfer) == full.makespan
        assert peak_activations(plan) == max(full.peak_activations)


def test_the_fast_step_time_finds_deadlocks():
    plan = one_f_one_b(2, 2)
    first, second, third, fourth = plan.actions[0]
    assert third.kind is ActionKind.BACKWARD
    with pytest.raises(ScheduleError, match="deadlock"):
        step_time(edited(plan, 0, [third, first, second, fourth]), kind_costs())
