"""Infinity and NaN are refused, and so are DeepSpeed's short forms, which would set a key that megagpt sets."""

import json
from typing import Any

import pytest

from megagpt.config import build_config
from megagpt.errors import ConfigError

SMALL: dict[str, Any] = {
    "model": {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 16},
    "training": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 16},
}


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize(
    "key, tree",
    [
        ("optimizer.learning_rate", lambda value: {"optimizer": {"learning_rate": value}}),
        ("lr_schedule.min_lr", lambda value: {"lr_schedule": {"min_lr": value}}),
        ("data.train", lambda value: {"data": {"train": {"corpus": value}}}),
    ],
)
def test_infinity_and_nan_are_refused_as_numbers(key: str, tree: Any, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        build_config(SMALL | tree(value))


@pytest.mark.parametrize("section, value", [("fp16", True), ("zero_optimization", 3)])
def test_deepspeeds_short_forms_are_refused(section: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"deepspeed.{section}: expected an object of settings, not {json.dumps(value)}"):
        build_config(SMALL | {"deepspeed": {section: value}})
    assert build_config(SMALL | {"deepspeed": {section: {}}})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("communication_data_type", "zzz", '"fp16" or "bf16" or "fp32", not "zzz"'),
        ("communication_data_type", 5, '"fp16" or "bf16" or "fp32", not 5'),
        ("seq_parallel_communication_data_type", [], '"fp16" or "bf16" or "fp32", not []'),
        ("log_level", "loud", '"debug" or "info" or "warning" or "error" or "critical", not "loud"'),
        ("wall_clock_breakdown", "x", 'true or false, not "x"'),
        ("wall_clock_breakdown", {}, "true or false, not {}"),
        ("dump_state", 1, "true or false, not 1"),
        ("prescale_gradients", "x", 'true or false, not "x"'),
        ("gradient_predivide_factor", "x", 'a number, not "x"'),
        ("flops_profiler", 5, "an object of settings, not 5"),
        ("comms_logger", 3, "an object of settings, not 3"),
        ("checkpoint", [1], "an object of settings, not [1]"),
    ],
)
def test_a_wrong_kind_of_deepspeed_setting_is_refused_by_its_key(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_config(SMALL | {"deepspeed": {key: value}})
    assert str(error.value) == f"config: deepspeed.{key}: expected {expected}"


def test_the_switch_of_deepspeeds_profiler_is_a_boolean() -> None:
    with pytest.raises(ConfigError, match='deepspeed.flops_profiler.enabled: expected true or false, not "maybe"'):
        build_config(SMALL | {"deepspeed": {"flops_profiler": {"enabled": "maybe"}}})
    assert build_config(SMALL | {"deepspeed": {"flops_profiler": {"enabled": True}, "communication_data_type": None}})


def test_an_operation_that_would_change_the_gradients_is_refused() -> None:
    with pytest.raises(ConfigError, match="deepspeed.gradient_allreduce_op: megagpt sets this key itself; remove it"):
        build_config(SMALL | {"deepspeed": {"gradient_allreduce_op": "sum"}})
