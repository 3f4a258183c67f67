"""Weights that stay as they are: chosen by patterns of logical names, the same under every layout."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.config.schema import Config
from megagpt.errors import ConfigError
from megagpt.model.gpt import GPTChunk
from megagpt.parallel.shard import TensorParallel, shard_of
from megagpt.parallel.weight_gradients import WeightGradients


def freeze(chunks: Iterable[nn.Module], config: Config) -> None:
    """Turn off the gradients of what `training.freeze` names, in this rank's chunks.

    Raises ConfigError for a pattern without a match anywhere in the model, and where nothing is left to train.
    """
    patterns = config.training.freeze
    if not patterns:
        return
    _check(patterns, parameter_names(config))
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.requires_grad_(not _matches(shard_of(parameter).name, patterns))
        chunk.register_forward_hook(_begin_backward)


def fill_groups(model: nn.Module) -> None:
    """Give a rank that trains no matrix, or no vector, one number of that kind which never changes.

    All stages then have the same groups of parameters in their optimizers, for each of which DeepSpeed asks all stages
    for their part of the gradient norm.
    """
    trained = [parameter.dim() for parameter in model.parameters() if parameter.requires_grad]
    for name, missing, shape in (
        ("idle_matrix", not any(dims > 1 for dims in trained), (1, 1)),
        ("idle_vector", not any(dims <= 1 for dims in trained), (1,)),
    ):
        if missing:
            model.register_parameter(name, nn.Parameter(next(model.parameters()).new_zeros(shape)))


def parameter_names(config: Config) -> list[str]:
    """Logical names of the whole model's parameters, in its order; no weight is made."""
    with torch.device("meta"):
        model = GPTChunk(config, TensorParallel(WeightGradients()), range(config.model.n_layer))
    return [shard_of(parameter).name for parameter in model.parameters()]


def _check(patterns: list[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in names):
            (near,) = difflib.get_close_matches(pattern, _known(names), n=1, cutoff=0.0)
            raise ConfigError(f"training.freeze: {pattern!r} is no weight of this model; the nearest is {near!r}")
    if all(_matches(name, patterns) for name in names):
        raise ConfigError("training.freeze: every weight is frozen; leave at least one to train")


def _known(names: list[str]) -> list[str]:
    """Each name, and each pattern for all that begins with a part of one."""
    parts = (name.split(".")[:depth] for name in names for depth in range(1, name.count(".") + 1))
    return [*names, *dict.fromkeys(".".join([*part, "*"]) for part in parts)]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _begin_backward(chunk: nn.Module, args: Any, out: Tensor) -> Tensor:
    """A first chunk that is frozen whole has no graph; its backward, which the plan asks for all the same, ends at once."""
    return out if out.requires_grad or not torch.is_grad_enabled() else out.requires_grad_()
