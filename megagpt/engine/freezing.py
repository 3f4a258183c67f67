"""Frozen weights, selected by patterns of parameter names, which are the same under every layout."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.config.schema import Config
from megagpt.engine.optimizer import Group, group_of, set_group
from megagpt.errors import ConfigError
from megagpt.model.meta_model import meta_model, parameter_names
from megagpt.parallel.parameter import shard_of


def freeze(chunks: Iterable[nn.Module], config: Config) -> None:
    """Turn off the gradients of the weights that `training.freeze` selects, in this rank's chunks.

    Raises ConfigError if a pattern matches no weight of the model, or if no weight is left to train.
    """
    patterns = config.training.freeze
    if not patterns:
        return
    _check(patterns, parameter_names(meta_model(config)))
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.requires_grad_(not _matches(shard_of(parameter).name, patterns))
        chunk.register_forward_hook(_start_backward)


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


def require_matches(key: str, patterns: Iterable[str], names: list[str]) -> None:
    """Raise ConfigError if a pattern of the config's `key` matches none of the model's parameter names."""
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in names):
            (nearest,) = difflib.get_close_matches(pattern, _suggestions(names), n=1, cutoff=0.0)
            raise ConfigError(f"{key}: {pattern!r} matches no weight of this model; the nearest is {nearest!r}")


def _check(patterns: list[str], names: list[str]) -> None:
    require_matches("training.freeze", patterns, names)
    if all(_matches(name, patterns) for name in names):
        raise ConfigError("training.freeze: every weight is frozen; leave at least one to train")


def _suggestions(names: list[str]) -> list[str]:
    """Return each name, and a pattern for each prefix of the names."""
    prefixes = (name.split(".")[:depth] for name in names for depth in range(1, name.count(".") + 1))
    return [*names, *dict.fromkeys(".".join([*prefix, "*"]) for prefix in prefixes)]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _start_backward(chunk: nn.Module, args: Any, out: Tensor) -> Tensor:
    """A fully frozen first chunk has no graph. The plan still runs its backward, so give its output one."""
    return out if out.requires_grad or not torch.is_grad_enabled() else out.requires_grad_()
