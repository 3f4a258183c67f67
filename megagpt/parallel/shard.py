"""A rank's parameter and its place in the whole: what initialisation, the gradient norm and checkpoints read.

The record travels on the parameter itself, so that nothing keeps a second list of names and shapes.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megagpt.parallel.context import ContextParallel
from megagpt.parallel.weight_gradients import WeightGradients


@dataclass(frozen=True)
class Shard:
    """Where a rank's tensor stands in the logical parameter, and how that parameter begins."""

    name: str
    """Logical name, the same under every layout."""
    shape: tuple[int, ...]
    """Shape of the whole parameter, without the padding of the vocabulary."""
    dim: int | None
    """Dim that is split over tensor ranks; None if every rank holds all of it."""
    start: int
    """Where this rank's part begins along `dim`; its length is the tensor's."""
    std: float
    """Standard deviation of the initial values."""
    mean: float
    """Mean of the initial values: 1 for the gain of a norm, else 0."""


@dataclass(frozen=True)
class TensorParallel:
    """What a layer needs to know of the ranks that share its matrices."""

    weight_gradients: WeightGradients
    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False
    context: ContextParallel = field(default_factory=ContextParallel)
    """Who shares the sequences; no ranks of other parts of a matrix."""


def sharded_parameter(
    name: str, shape: tuple[int, ...], dim: int, tp: TensorParallel, std: float, kept: int | None = None
) -> nn.Parameter:
    """This tensor rank's part of a parameter of `shape` split along `dim`; rows from `kept` on are padding."""
    part = shape[dim] // tp.size
    local = (*shape[:dim], part, *shape[dim + 1 :])
    whole = (*shape[:dim], kept or shape[dim], *shape[dim + 1 :])
    parameter = nn.Parameter(torch.empty(local))
    _mark(parameter, Shard(name, whole, dim, tp.rank * part, std, 0.0))
    if tp.size > 1:
        cast(Any, parameter).model_parallel = True  # DeepSpeed counts the others once in the gradient norm
    return parameter


def replicated_parameter(
    name: str, shape: tuple[int, ...], tp: TensorParallel, std: float = 0.0, mean: float = 0.0
) -> nn.Parameter:
    """A parameter that every tensor rank holds whole.

    Under sequence parallelism it works on this rank's part of the sequence, so that its gradient is a part, to be
    summed over the tensor ranks.
    """
    parameter = nn.Parameter(torch.empty(shape))
    _mark(parameter, Shard(name, shape, None, 0, std, mean))
    cast(Any, parameter).partial_gradient = tp.sequence_parallel
    return parameter


def shard_of(parameter: nn.Parameter) -> Shard:
    """The record that the parameter carries."""
    return cast(Any, parameter).shard


def has_partial_gradient(parameter: nn.Parameter) -> bool:
    """Whether the gradient is to be summed over the tensor ranks before the optimizer sees it."""
    return getattr(parameter, "partial_gradient", False)


def mark_second_copy(parameter: nn.Parameter) -> None:
    """The last stage's copy of a tied embedding: the gradient norm and checkpoints count the first alone."""
    cast(Any, parameter).ds_pipe_replicated = True


def is_second_copy(parameter: nn.Parameter) -> bool:
    """Whether another stage holds the copy of this parameter that counts."""
    return getattr(parameter, "ds_pipe_replicated", False)


def _mark(parameter: nn.Parameter, shard: Shard) -> None:
    cast(Any, parameter).shard = shard
