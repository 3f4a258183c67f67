"""Frozen weights, selected by patterns of parameter names, which are the same under every layout."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from megagpt.config.schema import Config
from megagpt.engine.optimizer import Group, group_of, set_group
from megagpt.errors import ConfigError
from megagpt.model.adapters import linear_layers
from megagpt.model.ends import CLASSIFIER
from megagpt.model.meta_model import meta_model, parameter_names
from megagpt.parallel.adapter import is_adapter, layer_name
from megagpt.parallel.parameter import shard_of


def freeze(chunks: Iterable[nn.Module], config: Config) -> None:
    """Turn off the gradients of the weights that are not trained, in this rank's chunks; see `trained_names`."""
    if not has_frozen_weights(config):
        return
    trained = trained_names(config)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.requires_grad_(shard_of(parameter).name in trained)
        chunk.register_forward_hook(_start_backward)


def check_patterns(config: Config) -> None:
    """Raise ConfigError if a pattern of weights in the config matches none, or if no weight is left to train."""
    check_scales(config)
    if has_frozen_weights(config):
        trained_names(config)


def check_scales(config: Config) -> None:
    """Raise ConfigError if a pattern of optimizer.learning_rate_scales matches no weight."""
    scales = config.optimizer.learning_rate_scales
    if scales:
        require_matches("optimizer.learning_rate_scales", scales, parameter_names(meta_model(config)))


def has_frozen_weights(config: Config) -> bool:
    """Whether some weights are not trained."""
    return bool(config.training.freeze) or config.lora.rank is not None


def trained_names(config: Config) -> set[str]:
    """Return the names of the trained weights: those that no pattern of `training.freeze` selects; with LoRA, of these the
    adapters and a classification head.

    Raises ConfigError if a pattern matches no weight or layer of the model, or if no weight is left to train.
    """
    model = meta_model(config)
    names = parameter_names(model)
    require_matches("training.freeze", config.training.freeze, names)
    trained = {name for name in names if not _matches(name, config.training.freeze)}
    if config.lora.rank is not None:
        layers = [layer_name(layer) for layer in linear_layers(model)]
        require_matches("lora.targets", config.lora.targets, layers, "linear layer")
        trained = {name for name in trained if is_adapter(name) or name == CLASSIFIER}
    if not trained:
        raise ConfigError("training.freeze: every weight is frozen; leave at least one to train")
    return trained


def add_placeholder_parameters(model: nn.Module, groups: Iterable[Group]) -> None:
    """Give a rank without a trained parameter in one of `groups` a parameter of one element.

    All stages then have the same number of parameter groups in their optimizers. DeepSpeed sums the gradient norm group by
    group over all stages, so a missing group would deadlock.
    """
    present = {group_of(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for number, group in enumerate(groups):
        if group not in present:
            placeholder = nn.Parameter(next(model.parameters()).new_zeros((1, 1) if group.matrix else (1,)))
            set_group(placeholder, group)
            model.register_parameter(f"placeholder_{number}", placeholder)


def require_matches(key: str, patterns: Iterable[str], names: list[str], what: str = "weight") -> None:
    """Raise ConfigError if a pattern of the config's `key` matches none of the model's names. `what`: what is named."""
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in names):
            (nearest,) = difflib.get_close_matches(pattern, _suggestions(names), n=1, cutoff=0.0)
            raise ConfigError(f"{key}: {pattern!r} matches no {what} of this model; the nearest is {nearest!r}")


def _suggestions(names: list[str]) -> list[str]:
    """Return each name, and a pattern for each prefix of the names."""
    prefixes = (name.split(".")[:depth] for name in names for depth in range(1, name.count(".") + 1))
    return [*names, *dict.fromkeys(".".join([*prefix, "*"]) for prefix in prefixes)]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _start_backward(chunk: nn.Module, args: Any, out: Any) -> None:
    """A fully frozen first chunk has no graph. The plan still runs its backward, so give its outputs one."""
    for tensor in out if isinstance(out, tuple) else (out,):
        if torch.is_grad_enabled() and not tensor.requires_grad:
            tensor.requires_grad_()
