"""The schedule "auto" is replaced by the fastest one in simulation that fits in the given memory."""

from typing import Any

import pytest

from megagpt.config import Config, build_config
from megagpt.errors import ConfigError
from megagpt.planner.auto_schedule import planned_costs, resolve_schedule
from megagpt.planner.choose_schedule import best_plan
from megagpt.planner.hardware import find_hardware
from megagpt.schedules.plan import Action, ActionKind


def config_with(**parallel: Any) -> Config:
    return build_config(
        {
            "model": {"n_layer": 8, "n_embd": 32, "n_head": 4, "n_positions": 16, "vocab_size": 100},
            "training": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 16},
            "parallel": parallel,
        }
    )


def chosen(micro_batches: int = 8, pipeline: int = 4, **costs: float) -> tuple[str, int, str]:
    """Return name, virtual stages and reason; check that nothing else in the config changes."""
    config = config_with(pipeline=pipeline, schedule="auto", schedule_costs=costs)
    resolved, reason = resolve_schedule(config, micro_batches)
    assert resolved.model_copy(update={"parallel": config.parallel}) == config
    return resolved.parallel.schedule, resolved.parallel.virtual_stages, reason


def test_with_equal_times_a_zero_bubble_schedule_is_chosen_and_the_reason_names_it() -> None:
    name, _, reason = chosen(forward=1.0)
    assert name in ("zbv", "interleaved_zero_bubble") and name in reason and "Next best" in reason


def test_less_memory_chooses_a_schedule_that_needs_less() -> None:
    name, _, reason = chosen(16, forward=1.0, max_micro_batches=3.3)
    assert name == "v_half" and "above the limit of 3.3" in reason


def test_slow_messages_change_the_choice() -> None:
    assert chosen(forward=1.0, transfer=3.0)[:2] != chosen(forward=1.0)[:2]


def test_one_pipeline_rank_gets_1f1b() -> None:
    assert chosen(pipeline=1)[:2] == ("1f1b", 1)


def test_a_named_schedule_does_not_change() -> None:
    config = config_with(pipeline=2, schedule="gpipe")
    assert resolve_schedule(config, 4) == (config, "")


def test_too_little_memory_for_any_schedule_is_refused_with_the_one_that_needs_least() -> None:
    with pytest.raises(ConfigError, match="max_micro_batches: no schedule has at most 0.1 .*the lowest is v_min "):
        chosen(forward=1.0, max_micro_batches=0.1)


def test_without_times_the_planner_predicts_them_for_each_stage() -> None:
    """The output layer makes the last stage longer; hand-written times would be equal. The reason has seconds."""
    config = config_with(pipeline=4, schedule="auto")
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 500_000})})
    hardware = find_hardware("H100")
    costs, transfer = planned_costs(config, 1, hardware)
    forwards = [costs(4)(Action(ActionKind.FORWARD, stage, 0)) for stage in range(4)]
    assert forwards[3] > 2 * forwards[1] and transfer > 0
    resolved, reason = resolve_schedule(config, 8, hardware=hardware)
    expected = best_plan(4, 8, costs, transfer, max_stages=8)
    assert (resolved.parallel.schedule, reason) == (expected.name, expected.why)


def test_what_the_planner_does_not_cover_gets_equal_times() -> None:
    config = config_with(pipeline=4, schedule="auto")
    frozen = config.model_copy(update={"training": config.training.model_copy(update={"freeze": ["embedding.*"]})})
    equal = config_with(pipeline=4, schedule="auto", schedule_costs={"forward": 1.0})
    assert resolve_schedule(frozen, 8)[1] == resolve_schedule(equal, 8)[1]
