"""Infinity and NaN are refused, and so are DeepSpeed's short forms, which would set a key that megagpt sets."""

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
    with pytest.raises(ConfigError, match=rf"deepspeed.{section}: expected an object of settings, not {value}"):
        build_config(SMALL | {"deepspeed": {section: value}})
    assert build_config(SMALL | {"deepspeed": {section: {}}})
