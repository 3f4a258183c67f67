from typing import get_args

import pytest

from megagpt.config.schema import Schedule
from megagpt.pipeline.choose import best_plan
from megagpt.pipeline.costs import even_costs
from megagpt.pipeline.plan import Action, Kind
from megagpt.pipeline.schedule import INTERLEAVED, chunks_per_rank, make_plan
from megagpt.pipeline.simulate import Cost, simulate


def heavy_last_stage(stages: int) -> Cost:
    """Four layers' worth of time, shared evenly, and an output layer on the last stage as dear as three of them."""
    times = {Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.0, Kind.W: 1.0}
    return lambda action: times[action.kind] * (4 / stages + (3 if action.stage == stages - 1 else 0))


def test_equal_times_and_memory_for_all_make_chunks_and_split_backwards_win():
    choice = best_plan(4, 8, even_costs(4))
    assert (choice.name, choice.virtual_stages) == ("interleaved_zero_bubble", 4)
    assert choice.plan == make_plan("interleaved_zero_bubble", 4, 8, 4)
    assert (choice.makespan, choice.peak) == (24 + 3 / 4, 4)


@pytest.mark.parametrize("most_live, name", [(4, "interleaved_zero_bubble"), (3, "v_half"), (2, "v_min")])
def test_less_memory_makes_another_choice(most_live: float, name: str):
    choice = best_plan(4, 8, even_costs(4), most_live=most_live)
    assert choice.name == name
    assert choice.peak <= most_live


def test_slow_messages_make_the_choice_with_the_fewest_of_them():
    assert best_plan(4, 8, even_costs(4), transfer=0.1).name == "zbv"
    assert best_plan(4, 8, even_costs(4), transfer=5).plan.n_stages == 4


def test_hand_made_unequal_times_make_another_choice():
    """Where the last stage is the dearest, cutting the other layers into more chunks gains nothing: one chunk, least held."""
    costs = heavy_last_stage
    choice = best_plan(4, 8, costs)
    assert choice.name != best_plan(4, 8, even_costs(4)).name
    assert _shortest(4, 8, costs) == choice.makespan


@pytest.mark.parametrize("ranks, micro_batches, transfer", [(2, 3, 0.0), (3, 9, 0.2), (6, 4, 0.05)])
def test_no_schedule_is_shorter(ranks: int, micro_batches: int, transfer: float):
    costs = even_costs(ranks, 1, 1.3, 0.8)
    assert best_plan(ranks, micro_batches, costs, transfer).makespan == _shortest(ranks, micro_batches, costs, transfer)


def _shortest(ranks: int, micro_batches: int, costs, transfer: float = 0.0) -> float:
    return min(
        simulate(plan, costs(plan.n_stages), transfer, in_order=False).makespan
        for name in get_args(Schedule)
        for chunks in ((2, 3, 4) if name in INTERLEAVED else (1,))
        for plan in [make_plan(name, ranks, micro_batches, chunks)]
    )


def test_of_equally_short_steps_the_simplest_is_taken():
    assert best_plan(1, 8, even_costs(1)).name == "1f1b"


def test_stages_are_never_more_than_layers():
    choice = best_plan(4, 8, even_costs(4), most_stages=7)
    assert (choice.name, choice.plan.n_stages) == ("zb_h1", 4)
    assert best_plan(4, 8, even_costs(4), most_stages=8).plan.n_stages == 8
    with pytest.raises(ValueError, match="^3 layers do not make a stage for each of 4 ranks$"):
        best_plan(4, 8, even_costs(4), most_stages=3)


def test_the_reason_names_the_next_best_and_what_memory_forbids_with_the_numbers():
    assert best_plan(4, 8, even_costs(4), most_live=3).why == (
        "v_half (27.5 a step, 3 micro-batches held) is the fastest of 2 that fit. "
        "Next best: v_min (29.5 a step, 2 micro-batches held); faster, but above the 3 that fit: "
        "interleaved_zero_bubble with 4 virtual stages (24.75 a step, 4 micro-batches held)."
    )


def test_too_little_memory_for_any_schedule_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match=r"^no schedule holds at most 1 micro-batches; the least: v_min \(29.5 a step, 2 mic"):
        best_plan(4, 8, even_costs(4), most_live=1)


def test_even_costs_share_a_ranks_time_among_its_chunks():
    for name in get_args(Schedule):
        chunks = chunks_per_rank(name, 2 if name in INTERLEAVED else 1)
        cost = even_costs(4, 1, 3, 2)(4 * chunks)
        times = [cost(Action(kind, 0, 0)) * chunks for kind in (Kind.F, Kind.I, Kind.W, Kind.B)]
        assert times == [1, 3, 2, 5]
