"""The choice is the fastest schedule in simulation that fits in memory, and its reason has the numbers."""

import pytest

from megagpt.planner.choose_schedule import best_plan
from megagpt.planner.schedule_costs import even_costs
from megagpt.schedules.plan import Action, ActionKind
from megagpt.schedules.registry import SCHEDULES, chunks_per_rank, make_plan
from megagpt.schedules.simulate import Cost, simulate


def heavy_last_stage(stages: int) -> Cost:
    """Return costs of four layers, shared evenly, and of an output layer on the last stage that costs as much as three."""
    times = {ActionKind.FORWARD: 1.0, ActionKind.BACKWARD: 2.0, ActionKind.BACKWARD_INPUT: 1.0, ActionKind.BACKWARD_WEIGHT: 1.0}
    return lambda action: times[action.kind] * (4 / stages + (3 if action.stage == stages - 1 else 0))


def test_with_equal_times_and_enough_memory_many_chunks_and_split_backwards_are_fastest():
    choice = best_plan(4, 8, even_costs(4))
    assert (choice.name, choice.virtual_stages) == ("interleaved_zero_bubble", 4)
    assert choice.n_stages == 16
    assert (choice.makespan, choice.in_flight) == (24 + 3 / 4, 4)


@pytest.mark.parametrize("max_in_flight, name", [(4, "interleaved_zero_bubble"), (3, "v_half"), (2, "v_min")])
def test_less_memory_gives_another_choice(max_in_flight: float, name: str):
    choice = best_plan(4, 8, even_costs(4), max_in_flight=max_in_flight)
    assert choice.name == name
    assert choice.in_flight <= max_in_flight


def test_slow_messages_give_a_choice_with_fewer_of_them():
    assert best_plan(4, 8, even_costs(4), transfer=0.1).name == "zbv"
    assert best_plan(4, 8, even_costs(4), transfer=5).n_stages == 4


def test_unequal_times_give_another_choice():
    """If the last stage is by far the most expensive, more chunks of the other layers gain nothing."""
    costs = heavy_last_stage
    choice = best_plan(4, 8, costs)
    assert choice.name != best_plan(4, 8, even_costs(4)).name
    assert _shortest(4, 8, costs) == choice.makespan


@pytest.mark.parametrize("ranks, micro_batches, transfer", [(2, 3, 0.0), (3, 9, 0.2), (6, 4, 0.05)])
def test_no_other_schedule_is_faster(ranks: int, micro_batches: int, transfer: float):
    costs = even_costs(ranks, 1, 1.3, 0.8)
    assert best_plan(ranks, micro_batches, costs, transfer).makespan == _shortest(ranks, micro_batches, costs, transfer)


@pytest.mark.parametrize("transfer", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("ranks, micro_batches", [(2, 19), (2, 40), (3, 31), (4, 56), (4, 61)])
def test_with_many_micro_batches_the_choice_and_its_time_are_those_of_the_full_simulation(
    ranks: int, micro_batches: int, transfer: float
):
    costs = even_costs(ranks, 1, 1.3, 0.8)
    choice = best_plan(ranks, micro_batches, costs, transfer)
    assert choice.makespan == pytest.approx(_shortest(ranks, micro_batches, costs, transfer), rel=1e-9)
    plan = make_plan(choice.name, ranks, micro_batches, choice.virtual_stages)
    full = simulate(plan, costs(plan.n_stages), transfer, in_order=False)
    assert choice.makespan == pytest.approx(full.makespan, rel=1e-9)
    assert choice.in_flight == max(full.peak_activations) / plan.chunks_per_rank


def test_the_time_for_very_many_micro_batches_follows_from_a_short_step():
    """ZB-H1's bubble is (ranks - 1)(F + I - W), by arXiv 2401.10241. A plan of all micro-batches would not fit in memory."""
    choice = best_plan(8, 10**9, even_costs(8), max_stages=8)
    assert (choice.name, choice.makespan, choice.in_flight) == ("zb_h1", 3 * 10**9 + 7, 8)
    with pytest.raises(ValueError, match="the lowest is 1f1b"):
        best_plan(8, 10**9, even_costs(8), max_stages=8, max_in_flight=1)


def test_progress_is_reported_after_each_schedule():
    reports: list[tuple[int, int]] = []
    best_plan(2, 4, even_costs(2), report=lambda done, total: reports.append((done, total)))
    assert reports == [(done, 12) for done in range(1, 13)]


def _shortest(ranks: int, micro_batches: int, costs, transfer: float = 0.0) -> float:
    return min(
        simulate(plan, costs(plan.n_stages), transfer, in_order=False).makespan
        for name, spec in SCHEDULES.items()
        for chunks in ((2, 3, 4) if spec.interleaved else (1,))
        for plan in [make_plan(name, ranks, micro_batches, chunks)]
    )


def test_of_equally_fast_schedules_the_simplest_is_chosen():
    assert best_plan(1, 8, even_costs(1)).name == "1f1b"


def test_there_are_never_more_stages_than_layers():
    choice = best_plan(4, 8, even_costs(4), max_stages=7)
    assert (choice.name, choice.n_stages) == ("zb_h1", 4)
    assert best_plan(4, 8, even_costs(4), max_stages=8).n_stages == 8
    with pytest.raises(ValueError, match="^3 layers cannot fill one stage on each of 4 ranks$"):
        best_plan(4, 8, even_costs(4), max_stages=3)


def test_the_reason_names_the_next_best_schedule_and_the_faster_one_that_does_not_fit():
    assert best_plan(4, 8, even_costs(4), max_in_flight=3).why == (
        "v_half (27.5 per step, 3 micro-batches in flight) is the fastest of 2 that fit. "
        "Next best: v_min (29.5 per step, 2 micro-batches in flight); faster, but above the limit of 3: "
        "interleaved_zero_bubble with 4 virtual stages (24.75 per step, 4 micro-batches in flight)."
    )


def test_too_little_memory_for_any_schedule_is_refused_with_the_one_that_needs_least():
    message = r"^no schedule has at most 1 micro-batches in flight; the lowest is v_min \(29.5 per step, 2 micro-batches in fl"
    with pytest.raises(ValueError, match=message):
        best_plan(4, 8, even_costs(4), max_in_flight=1)


def test_even_costs_divide_a_ranks_time_evenly_among_its_chunks():
    for name, spec in SCHEDULES.items():
        chunks = chunks_per_rank(name, 2 if spec.interleaved else 1)
        cost = even_costs(4, 1, 3, 2)(4 * chunks)
        times = [
            cost(Action(kind, 0, 0)) * chunks
            for kind in (ActionKind.FORWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT, ActionKind.BACKWARD)
        ]
        assert times == [1, 3, 2, 5]
