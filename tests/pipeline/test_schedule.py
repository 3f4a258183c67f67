"""Every schedule of the config, whatever the sizes: all is computed once, nothing waits for ever."""

from typing import get_args

import pytest

from megagpt.config.schema import Schedule
from megagpt.pipeline.schedule import INTERLEAVED, V_SHAPED, chunks_per_rank, make_plan, placement
from megagpt.pipeline.simulate import simulate

NAMES: tuple[Schedule, ...] = get_args(Schedule)
SCHEDULES = [(name, chunks) for name in NAMES for chunks in ((2, 3) if name in INTERLEAVED else (1,))]
"""Names and virtual stages."""


@pytest.mark.parametrize("name, virtual_stages", SCHEDULES)
def test_every_action_once_and_no_deadlock_for_any_ranks_and_micro_batches(name: Schedule, virtual_stages: int):
    """`simulate` raises for an action that is missing, double or never ready; sizes that do not divide are among these."""
    for ranks in (1, 2, 3, 4, 7, 8, 13, 16):
        for micro_batches in sorted({1, 2, ranks - 1 or 1, ranks, ranks + 1, 2 * ranks + 1, 23, 64 if ranks in (4, 16) else 1}):
            plan = make_plan(name, ranks, micro_batches, virtual_stages)
            assert plan.rank_of_stage == placement(name, ranks, virtual_stages)
            assert (plan.n_ranks, plan.n_stages) == (ranks, ranks * chunks_per_rank(name, virtual_stages))
            assert plan.n_micro_batches == micro_batches
            played = simulate(plan, in_order=_needs_what_was_sent_first(name, ranks))
            computed = {(action.stage, action.micro_batch) for action in played.end}
            assert len(computed) == plan.n_stages * micro_batches
            assert any(action.kind.value in "BI" for action in played.end)


def _needs_what_was_sent_first(name: Schedule, ranks: int) -> bool:
    """In a V, and in a loop of two ranks, activations and gradients go the same way between two ranks.

    What was sent first may then be needed second: `Transfers` holds it.
    """
    return name not in V_SHAPED and not (name in INTERLEAVED and ranks == 2)


def test_placements():
    assert placement("1f1b", 3) == placement("gpipe", 3) == placement("zb_h1", 3) == (0, 1, 2)
    assert placement("interleaved_1f1b", 2, 3) == placement("interleaved_zero_bubble", 2, 3) == (0, 1, 0, 1, 0, 1)
    assert placement("zbv", 2) == placement("v_half", 2) == placement("v_min", 2, 2) == (0, 1, 1, 0)


@pytest.mark.parametrize(
    "name, virtual_stages, message",
    [
        ("interleaved_1f1b", 1, "interleaved_1f1b: interleaves 2 or more stages on each rank, not 1"),
        ("1f1b", 2, "1f1b: has one stage on each rank, not 2; interleaved_1f1b and interleaved_zero_bubble may have more"),
        ("zbv", 3, "zbv: has two stages on each rank, not 3; interleaved_1f1b and interleaved_zero_bubble may have more"),
    ],
)
def test_virtual_stages_that_a_schedule_cannot_have_are_refused(name: Schedule, virtual_stages: int, message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_plan(name, 4, 8, virtual_stages)
    with pytest.raises(ValueError, match=f"^{message}$"):
        placement(name, 4, virtual_stages)


@pytest.mark.parametrize("ranks, micro_batches", [(0, 4), (4, 0), (2, -1)])
def test_a_plan_for_nobody_or_nothing_is_refused(ranks: int, micro_batches: int):
    with pytest.raises(ValueError, match=f"^1f1b: {ranks} ranks and {micro_batches} micro-batches; at least one of each"):
        make_plan("1f1b", ranks, micro_batches)
