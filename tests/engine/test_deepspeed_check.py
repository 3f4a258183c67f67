"""A wrong setting in the config section `deepspeed` is one sentence with its key."""

from pathlib import Path

import pytest
from support.pool import Pool
from support.runs import Tree, corpus, open_trainer, tiny_config

from megagpt.config import Config
from megagpt.engine.deepspeed_check import check_section, explain_refusal
from megagpt.errors import ConfigError

REFUSED: list[tuple[Tree, str]] = [
    ({"fp16": {"loss_scale": "x"}}, "deepspeed.fp16.loss_scale: value error, fp16.loss_scale must be a number, not 'x'"),
    ({"fp16": {"nonsense": 1}}, "deepspeed.fp16.nonsense: DeepSpeed has no such key"),
    ({"zero_optimization": {"nonsense": 1}}, "deepspeed.zero_optimization.nonsense: DeepSpeed has no such key"),
    (
        {"zero_optimization": {"contiguous_gradients": False, "reduce_bucket_size": "x"}},
        "deepspeed.zero_optimization.reduce_bucket_size: input should be a valid integer",
    ),
    ({"comms_logger": {"enabled": "x"}}, "deepspeed.comms_logger.enabled: input should be a valid boolean"),
    ({"timers": {"throughput": {"enabled": "x"}}}, "deepspeed.timers.throughput.enabled: input should be a valid boolean"),
    ({"csv_monitor": {"enabled": "z"}}, "deepspeed.csv_monitor.enabled: input should be a valid boolean"),
    ({"compile": {"deepcompile": "x"}}, "deepspeed.compile.deepcompile: input should be a valid boolean"),
    ({"checkpoint": {"tag_validation": "x"}}, "deepspeed.checkpoint.tag_validation: DeepSpeed refuses the value: "),
    ({"tensorboard": {"enabled": 7}, "dump_state": False}, "deepspeed.tensorboard.enabled: input should be a valid boolean"),
]


@pytest.mark.parametrize(("section", "message"), REFUSED)
def test_a_setting_that_deepspeed_refuses_is_named(section: Tree, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_section(tiny_config(deepspeed=section), dp_cp_size=1)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", [{}, {"zero_optimization": {"reduce_bucket_size": 7}}, {"wall_clock_breakdown": True}])
def test_settings_that_deepspeed_accepts_pass(section: Tree) -> None:
    check_section(tiny_config(deepspeed=section), dp_cp_size=1)


def build(config: Config) -> str:
    """Return the error of the engine's construction."""
    try:
        open_trainer(config)
    except ConfigError as error:
        return str(error)
    return "no error"


def test_the_engine_checks_the_section(ranks: Pool, tmp_path: Path) -> None:
    config = tiny_config(data={"train": corpus(tmp_path)}, deepspeed={"comms_logger": {"enabled": "x"}})
    assert [message.split(": ")[0] for message in ranks.run(2, build, config)] == ["deepspeed.comms_logger.enabled"] * 2


def test_an_error_of_deepspeeds_start_names_the_users_settings() -> None:
    config = tiny_config(deepspeed={"tensorboard": {"enabled": True}})
    error = explain_refusal(config, ImportError("No module named 'tensorboard'"))
    assert str(error) == (
        "DeepSpeed does not start with the settings of deepspeed.tensorboard: ImportError: No module named 'tensorboard'"
    )
    bug = ValueError("a bug")
    assert explain_refusal(tiny_config(), bug) is bug
