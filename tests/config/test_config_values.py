"""Values that look like numbers and are none, and DeepSpeed's short forms that would hide a key of ours."""

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
def test_infinity_and_nan_are_refused_where_a_number_is_wanted(key: str, tree: Any, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        build_config(SMALL | tree(value))


@pytest.mark.parametrize("section, value", [("fp16", True), ("zero_optimization", 3)])
def test_a_short_form_of_deepspeed_cannot_carry_a_key_of_ours(section: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"deepspeed.{section}: expected an object of settings, not {value}"):
        build_config(SMALL | {"deepspeed": {section: value}})
    assert build_config(SMALL | {"deepspeed": {section: {}}})
