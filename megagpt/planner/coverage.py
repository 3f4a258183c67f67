"""Which configs the planner covers. Does not import torch."""

from megagpt.config.schema import Config
from megagpt.errors import ConfigError


def require_supported(config: Config) -> None:
    """Raise ConfigError if some weights are not trained, or the model has a classification head."""
    if config.lora.rank is not None or config.training.freeze:
        key = "lora.rank" if config.lora.rank is not None else "training.freeze"
        raise ConfigError(f"{key}: the planner covers runs that train all weights; leave it out")
    if config.data.task in ("preference", "classification"):
        raise ConfigError(f'data.task: the planner does not cover "{config.data.task}"; leave it out')


def is_supported(config: Config) -> bool:
    """Return whether the planner covers a config."""
    try:
        require_supported(config)
    except ConfigError:
        return False
    return True
