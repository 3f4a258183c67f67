"""Which configs the closed formulas cover. Does not import torch."""

from megagpt.config.schema import Config
from megagpt.errors import ConfigError


def require_all_trained(config: Config) -> None:
    """Raise ConfigError if some weights are not trained, or the model has a classification head."""
    if config.lora.rank is not None or config.training.freeze:
        key = "lora.rank" if config.lora.rank is not None else "training.freeze"
        raise ConfigError(f"{key}: the planner covers runs that train all weights; leave it out")
    if config.data.task in ("preference", "classification"):
        raise ConfigError(f'data.task: the planner does not cover "{config.data.task}"; leave it out')


def require_supported(config: Config) -> None:
    """Raise ConfigError for what the closed formulas do not cover."""
    require_all_trained(config)
    if config.model.encoder_layers:
        raise ConfigError(
            f"model.encoder_layers: {config.model.encoder_layers}; the planner covers models without an encoder; "
            "pretrain_t5.py --dry-run counts one rank"
        )


def is_supported(config: Config) -> bool:
    """Return whether the closed formulas cover a config."""
    try:
        require_supported(config)
    except ConfigError:
        return False
    return True
