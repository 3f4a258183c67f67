"""The config that DeepSpeed gets. Every key that megagpt writes there is one that the user cannot set."""

from itertools import product
from typing import Any

import pytest

from megagpt.config import Config, build_config
from megagpt.config.rules import OWNED_BY_MEGAGPT, flat_keys
from megagpt.engine.deepspeed_config import deepspeed_config
from megagpt.errors import ConfigError

USER_SETTINGS = {"zero_optimization": {"reduce_bucket_size": 7}, "fp16": {"initial_scale_power": 8}}


def config_with(stage: int = 1, precision: str = "fp32", offload: bool = False, deepspeed: Any = None) -> Config:
    zero: dict[str, Any] = {"stage": stage}
    if offload and stage > 0:
        zero["offload_optimizer"] = "cpu"
    if offload and stage == 3:
        zero["offload_param"] = "cpu"
    return build_config(
        {
            "model": {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 16},
            "training": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 16, "precision": precision},
            "zero": zero,
            "deepspeed": deepspeed or {},
        }
    )


CASES = list(product((0, 1, 2, 3), ("fp32", "bf16", "fp16"), (False, True)))


@pytest.mark.parametrize("stage, precision, offload", CASES)
def test_every_key_that_megagpt_writes_is_owned(stage: int, precision: str, offload: bool) -> None:
    written = list(flat_keys(deepspeed_config(config_with(stage, precision, offload), dp_cp_size=2)))
    assert written
    for key in written:
        assert any(key == owned or key.startswith(f"{owned}.") for owned in OWNED_BY_MEGAGPT), key


@pytest.mark.parametrize("stage, precision, offload", CASES)
def test_a_key_that_megagpt_writes_is_an_error_in_the_users_config(stage: int, precision: str, offload: bool) -> None:
    for key in flat_keys(deepspeed_config(config_with(stage, precision, offload), dp_cp_size=2)):
        section, _, name = key.partition(".")
        setting: Any = 1
        for part in reversed(name.split(".") if name else []):
            setting = {part: setting}
        with pytest.raises(ConfigError, match=f"deepspeed.{key}: megagpt sets this key itself; "):
            config_with(deepspeed={section: setting})


@pytest.mark.parametrize("stage, precision, offload", CASES)
def test_the_users_other_settings_reach_deepspeed_unchanged(stage: int, precision: str, offload: bool) -> None:
    written = deepspeed_config(config_with(stage, precision, offload, USER_SETTINGS), dp_cp_size=2)
    assert written["zero_optimization"]["reduce_bucket_size"] == 7
    assert written["fp16"]["initial_scale_power"] == 8


def test_the_values_come_from_the_config() -> None:
    written = deepspeed_config(config_with(stage=3, precision="bf16", offload=True), dp_cp_size=2)
    assert written["zero_optimization"]["stage"] == 3
    assert written["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert written["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert written["bf16"] == {"enabled": True}
    assert written["train_micro_batch_size_per_gpu"] == 8
    assert written["gradient_clipping"] == 1.0
