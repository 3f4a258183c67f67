import random
from dataclasses import replace
from itertools import pairwise

import pytest
from torch_orders import torch_plan

from megagpt.pipeline.one_stage import gpipe, one_f_one_b
from megagpt.pipeline.plan import Action, Kind, Plan, forward_plan, split_backward
from megagpt.pipeline.simulate import ScheduleError, kind_costs, simulate


def edited(plan: Plan, rank: int, order: list[Action]) -> Plan:
    orders = list(plan.actions)
    orders[rank] = tuple(order)
    return replace(plan, actions=tuple(orders))


def test_evaluation_holds_one_micro_batch_at_a_time():
    assert simulate(forward_plan(range(3), 7)).peak_live == (1, 1, 1)


def test_a_split_backward_takes_as_long_and_holds_as_much_as_the_whole():
    """The input's gradient goes to the neighbour before the weights' are made, so the pipe drains no later."""
    for plan in (one_f_one_b(4, 8), gpipe(3, 5)):
        whole, split = simulate(plan), simulate(split_backward(plan))
        assert split.peak_live == whole.peak_live
        assert split.makespan <= whole.makespan


def test_an_action_starts_when_its_input_has_arrived_and_its_rank_is_free():
    played = simulate(one_f_one_b(2, 1), kind_costs(forward=3, backward=5), transfer=2)
    times = {str(action): (played.start[action], played.end[action]) for action in played.start}
    assert times == {"0F0": (0, 3), "1F0": (5, 8), "1B0": (8, 13), "0B0": (15, 20)}
    assert played.makespan == 20
    assert played.idle_share == pytest.approx((12 / 20, 12 / 20))


def test_costs_may_differ_by_stage():
    played = simulate(forward_plan(range(3), 10), lambda action: 4.0 if action.stage == 1 else 1.0)
    assert played.makespan == 1 + 10 * 4 + 1


@pytest.mark.parametrize("name", ["Interleaved1F1B", "InterleavedZeroBubble"])
def test_torchs_interleaved_orders_play_to_the_end_with_a_smaller_bubble(name: str):
    plan = torch_plan(name, 4, 8)
    assert plan.rank_of_stage == (0, 1, 2, 3, 0, 1, 2, 3)
    assert all(share < 3 / 11 for share in simulate(plan).idle_share)  # (p - 1) / (m + p - 1) is 1F1B's


def test_torchs_zbv_plays_with_few_held_but_needs_messages_in_another_order_than_sent():
    plan = torch_plan("ZBVZeroBubble", 4, 8)
    assert plan.rank_of_stage == (0, 1, 2, 3, 3, 2, 1, 0)
    played = simulate(plan, in_order=False)
    assert max(played.peak_live) == 8  # 2p half stages
    assert all(share < 3 / 11 for share in played.idle_share)
    with pytest.raises(ScheduleError, match="order of messages: rank 1 waits for"):
        simulate(plan)


@pytest.mark.parametrize(
    "plan", [one_f_one_b(4, 6), gpipe(3, 4), forward_plan(range(3), 3)], ids=["1f1b", "gpipe", "evaluation"]
)
def test_every_doubled_action_is_found_by_name(plan: Plan):
    for rank, order in enumerate(plan.actions):
        for index, action in enumerate(order):
            with pytest.raises(ScheduleError, match=f"^{action} stands 2 times$"):
                simulate(edited(plan, rank, [*order[:index], action, *order[index:]]))


def test_an_action_on_a_wrong_rank_is_found():
    plan = one_f_one_b(2, 2)
    with pytest.raises(ScheduleError, match="rank 0: 1F0 belongs to rank 1"):
        simulate(edited(plan, 0, [Action(Kind.F, 1, 0), *plan.actions[0]]))


def test_an_action_outside_the_plan_is_found():
    plan = one_f_one_b(2, 2)
    with pytest.raises(ScheduleError, match="rank 1: 1F2 is outside 2 stages x 2"):
        simulate(edited(plan, 1, [*plan.actions[1], Action(Kind.F, 1, 2)]))


def test_a_stage_without_a_rank_is_found():
    with pytest.raises(ScheduleError, match="does not give each of 2 stages a rank"):
        simulate(replace(one_f_one_b(2, 2), rank_of_stage=(0,)))


def test_a_whole_backward_beside_half_of_one_is_found():
    plan = one_f_one_b(1, 1)
    with pytest.raises(ScheduleError, match="0B0 stands beside a split backward"):
        simulate(edited(plan, 0, [*plan.actions[0], Action(Kind.W, 0, 0)]))


def test_every_swap_that_breaks_a_dependency_or_the_order_of_messages_is_found():
    """In 1F1B on two ranks and more, no two neighbours of one kind and no B before its F can be exchanged."""
    plan = one_f_one_b(4, 6)
    for rank, order in enumerate(plan.actions):
        for index in range(len(order) - 1):
            first, second = order[index], order[index + 1]
            if first.kind is not second.kind and first.micro_batch != second.micro_batch:
                continue  # an F and a B of other micro-batches: another schedule, not a wrong one
            with pytest.raises(ScheduleError, match=r"deadlock|order of messages"):
                simulate(edited(plan, rank, [*order[:index], second, first, *order[index + 2 :]]))


def test_a_deadlock_says_what_every_stuck_rank_waits_for():
    plan = one_f_one_b(2, 1)
    stuck = edited(plan, 0, [Action(Kind.B, 0, 0), Action(Kind.F, 0, 0)])
    with pytest.raises(
        ScheduleError, match=r"^deadlock: rank 0 at 0B0 waits for 0F0 of rank 0; rank 1 at 1F0 waits for 0F0 of rank 0$"
    ):
        simulate(stuck)


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


def test_an_order_is_found_or_played_but_never_played_with_a_dependency_broken():
    """Random orders of the right actions: whatever the simulation lets through keeps every dependency."""
    generator = random.Random(0)
    played_through = 0
    for _ in range(300):
        plan = one_f_one_b(2, 2)
        shuffled = replace(plan, actions=tuple(tuple(generator.sample(order, len(order))) for order in plan.actions))
        try:
            played = simulate(shuffled, in_order=False)
        except ScheduleError:
            continue
        played_through += 1
        ends = {str(action): time for action, time in played.end.items()}
        starts = {str(action): time for action, time in played.start.items()}
        for batch in (0, 1):
            chain = [f"0F{batch}", f"1F{batch}", f"1B{batch}", f"0B{batch}"]
            assert all(ends[a] <= starts[b] for a, b in pairwise(chain))
    assert 0 < played_through < 300
