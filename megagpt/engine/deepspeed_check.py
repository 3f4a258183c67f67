"""DeepSpeed's own check of the config section `deepspeed`, with our key in the message.

The rules in `megagpt/config/rules.py` know the top-level keys; DeepSpeed knows what is below them.
"""

from collections.abc import Iterator
from typing import Any

import deepspeed
from pydantic import ValidationError

from megagpt.config.schema import Config
from megagpt.engine.deepspeed_config import deepspeed_config
from megagpt.errors import ConfigError, MegagptError


def check_section(config: Config, dp_cp_size: int) -> None:
    """Raise ConfigError, with the key, if DeepSpeed refuses a setting of the section `deepspeed`."""
    if _refusal(config, config.deepspeed, dp_cp_size) is None:
        return
    for path, setting in _single_settings(config.deepspeed):
        error = _refusal(config, setting, dp_cp_size)
        if error is not None:
            raise ConfigError(_message(path, error)) from error
    error = _refusal(config, config.deepspeed, dp_cp_size)
    assert error is not None
    raise ConfigError(f"deepspeed: DeepSpeed refuses these settings together: {_first_line(error)}") from error


def explain_refusal(config: Config, error: Exception) -> Exception:
    """Return what to raise for an error of `deepspeed.initialize`: a ConfigError if a setting of the user may be the cause."""
    if isinstance(error, MegagptError) or not config.deepspeed:
        return error
    keys = ", ".join(f"deepspeed.{key}" for key in config.deepspeed)
    return ConfigError(f"DeepSpeed does not start with the settings of {keys}: {type(error).__name__}: {_first_line(error)}")


def _single_settings(section: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield each leaf of `section` as a section of its own, with the path to it."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            for inner, setting in _single_settings(value, (*path, key)):
                yield inner, {key: setting}
        else:
            yield (*path, key), {key: value}


def _refusal(config: Config, section: dict[str, Any], dp_cp_size: int) -> Exception | None:
    """Return DeepSpeed's error for a config with another section `deepspeed`, or None."""
    try:
        deepspeed.DeepSpeedConfig(deepspeed_config(config.model_copy(update={"deepspeed": section}), dp_cp_size))
    except Exception as error:  # DeepSpeed has no common class for them
        return error
    return None


def _message(path: tuple[str, ...], error: Exception) -> str:
    key = ".".join(("deepspeed", *path))
    if isinstance(error, ValidationError):
        details = error.errors()[0]
        if details["type"] == "extra_forbidden":
            return f"{key}: DeepSpeed has no such key"
        return f"{key}: {details['msg'][:1].lower()}{details['msg'][1:]}, not {details['input']!r:.60}"
    return f"{key}: DeepSpeed refuses the value: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
