"""Every schedule of the registry, for many sizes: each action is computed once, and there is no deadlock."""

import pytest
from support.exhaustive import EXHAUSTIVE

from megagpt.config import build_config
from megagpt.config.schema import ParallelConfig
from megagpt.errors import ConfigError
from megagpt.schedules.common import v_placement
from megagpt.schedules.registry import SCHEDULES, chunks_per_rank, make_plan, placement
from megagpt.schedules.simulate import simulate

NAMES_AND_VIRTUAL_STAGES = [
    (name, chunks) for name, spec in SCHEDULES.items() for chunks in ((2, 3) if spec.interleaved else (1,))
]


@pytest.mark.parametrize("name, virtual_stages", NAMES_AND_VIRTUAL_STAGES)
def test_every_action_appears_once_and_there_is_no_deadlock_for_any_ranks_and_micro_batches(name: str, virtual_stages: int):
    """`simulate` raises for an action that is missing, duplicated or never ready. Some sizes do not divide each other."""
    for ranks in (1, 2, 3, 4, 7, 8, 13, 16) if EXHAUSTIVE else (1, 2, 3, 4, 7, 8):
        for micro_batches in sorted({1, 2, ranks - 1 or 1, ranks, ranks + 1, 2 * ranks + 1, 23, 64 if ranks in (4, 16) else 1}):
            plan = make_plan(name, ranks, micro_batches, virtual_stages)
            assert plan.rank_of_stage == placement(name, ranks, virtual_stages)
            assert (plan.n_ranks, plan.n_stages) == (ranks, ranks * chunks_per_rank(name, virtual_stages))
            assert plan.n_micro_batches == micro_batches
            assert plan.chunks_per_rank == chunks_per_rank(name, virtual_stages)
            simulation = simulate(plan, in_order=_uses_messages_in_sending_order(name, ranks))
            computed = {(action.stage, action.micro_batch) for action in simulation.end}
            assert len(computed) == plan.n_stages * micro_batches
            assert any(action.kind.value in "BI" for action in simulation.end)


def _uses_messages_in_sending_order(name: str, ranks: int) -> bool:
    """In a V, and in a loop of two ranks, activations and gradients go in the same direction between two ranks.

    A message that was sent first may then be needed second; `Transfers` stores it.
    """
    spec = SCHEDULES[name]
    return spec.placement is not v_placement and not (spec.interleaved and ranks == 2)


def test_the_config_accepts_exactly_the_schedules_of_the_registry_and_auto():
    schema = ParallelConfig.model_json_schema()["properties"]["schedule"]
    assert schema["enum"] == [*SCHEDULES, "auto"]
    for name, virtual_stages in NAMES_AND_VIRTUAL_STAGES:
        assert config_with(name, virtual_stages).parallel.schedule == name
    assert config_with("auto", 1).parallel.schedule == "auto"
    with pytest.raises(ConfigError, match="parallel.schedule: \"1f1\": input should be '1f1b', .*; did you mean '1f1b'?"):
        config_with("1f1", 1)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("virtual_stages", [1, 2, 3])
def test_the_config_accepts_exactly_the_virtual_stages_that_a_plan_can_have(name: str, virtual_stages: int):
    try:
        chunks_per_rank(name, virtual_stages)
    except ValueError:
        with pytest.raises(ConfigError, match=f"parallel.virtual_stages: {virtual_stages} with parallel.schedule {name}"):
            config_with(name, virtual_stages)
    else:
        config_with(name, virtual_stages)


def config_with(schedule: str, virtual_stages: int):
    return build_config(
        {
            "model": {"n_layer": 6, "n_embd": 32, "n_head": 4, "n_positions": 16},
            "training": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 16},
            "parallel": {"pipeline": 2, "schedule": schedule, "virtual_stages": virtual_stages},
        }
    )


def test_one_chunk_and_interleaved_schedules_have_a_loop_placement_and_v_schedules_a_v():
    assert placement("1f1b", 3) == placement("gpipe", 3) == placement("zb_h1", 3) == (0, 1, 2)
    assert placement("interleaved_1f1b", 2, 3) == placement("interleaved_zero_bubble", 2, 3) == (0, 1, 0, 1, 0, 1)
    assert placement("zbv", 2) == placement("v_half", 2) == placement("v_min", 2, 2) == (0, 1, 1, 0)


@pytest.mark.parametrize(
    "name, virtual_stages, message",
    [
        ("interleaved_1f1b", 1, "interleaved_1f1b: virtual_stages must be 2 or more, not 1"),
        (
            "1f1b",
            2,
            "1f1b: virtual_stages must be 1, not 2; interleaved_1f1b and interleaved_zero_bubble can have more",
        ),
        (
            "zbv",
            3,
            "zbv: virtual_stages must be 1 or 2, not 3; interleaved_1f1b and interleaved_zero_bubble can have more",
        ),
    ],
)
def test_virtual_stages_that_a_schedule_cannot_have_are_refused(name: str, virtual_stages: int, message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_plan(name, 4, 8, virtual_stages)
    with pytest.raises(ValueError, match=f"^{message}$"):
        placement(name, 4, virtual_stages)


@pytest.mark.parametrize("ranks, micro_batches", [(0, 4), (4, 0), (2, -1)])
def test_a_plan_without_ranks_or_micro_batches_is_refused(ranks: int, micro_batches: int):
    with pytest.raises(ValueError, match=f"^1f1b: {ranks} ranks and {micro_batches} micro-batches; at least one of each"):
        make_plan("1f1b", ranks, micro_batches)
