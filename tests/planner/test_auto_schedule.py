""" "auto" becomes the schedule that simulates fastest within the memory given."""

import pytest
from support.runs import tiny_config

from megagpt.errors import ConfigError
from megagpt.planner.schedule import resolve_schedule


def chosen(micro_batches: int = 8, pipeline: int = 4, **costs: float) -> tuple[str, int, str]:
    config = tiny_config(
        model={"n_layer": 8}, parallel={"pipeline": pipeline, "schedule": "auto", "schedule_costs": costs}, zero={"stage": 1}
    )
    resolved, why = resolve_schedule(config, micro_batches)
    assert resolved.model_copy(update={"parallel": config.parallel}) == config
    return resolved.parallel.schedule, resolved.parallel.virtual_stages, why


def test_with_equal_times_a_zero_bubble_schedule_wins_and_says_so() -> None:
    name, _, why = chosen()
    assert name in ("zbv", "interleaved_zero_bubble") and name in why and "Next best" in why


def test_less_memory_takes_a_schedule_that_holds_less() -> None:
    name, _, why = chosen(16, most_micro_batches=3.3)
    assert name == "v_half" and "above the 3.3 that fit" in why


def test_slow_messages_take_a_schedule_with_fewer_of_them() -> None:
    assert chosen(transfer=3.0)[:2] != chosen()[:2]


def test_one_rank_waits_for_nobody() -> None:
    assert chosen(pipeline=1)[:2] == ("1f1b", 1)


def test_a_named_schedule_stays() -> None:
    config = tiny_config(parallel={"pipeline": 2, "schedule": "gpipe"})
    assert resolve_schedule(config, 4) == (config, "")


def test_memory_for_nothing_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match="most_micro_batches: no schedule holds at most 0.1 .*the least: "):
        chosen(most_micro_batches=0.1)
