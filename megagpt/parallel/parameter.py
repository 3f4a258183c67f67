"""Sharded parameters: how to create them, and the record that says which part of the full parameter a rank holds.

The record is stored on the parameter itself, so no second list of names and shapes exists. Initialisation, gradient
reduction, the gradient norm and checkpoints read it.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from megagpt.parallel.parallel_context import ParallelContext


@dataclass(frozen=True)
class Shard:
    """A rank's tensor within the full parameter, and how the parameter is initialised."""

    name: str
    """Parameter name, the same under every layout."""
    shape: tuple[int, ...]
    """Shape of the full parameter, without vocabulary padding."""
    dim: int | None
    """Dim that is split over the tensor ranks; None if every tensor rank holds the full parameter."""
    start: int
    """Offset of this rank's tensor along `dim`; its length is the tensor's."""
    std: float
    """Standard deviation of the initial values."""
    mean: float
    """Mean of the initial values: 1 for norm weights, else 0."""
    partial_gradient: bool = False
    """Each tensor rank computes a partial gradient; the engine sums them before the optimizer step."""
    init_dim: int = 0
    """Dim along which the initial values are drawn in blocks if `dim` is None: the one that other layouts split."""
    second_copy: bool = False
    """The last stage's copy of a tied embedding; gradient norm and checkpoints count only the first copy."""


def sharded_parameter(
    name: str,
    shape: tuple[int, ...],
    dim: int,
    parallel: ParallelContext,
    std: float,
    unpadded: int | None = None,
    mean: float = 0.0,
) -> nn.Parameter:
    """Create this tensor rank's shard of a parameter of `shape`, split along `dim`.

    `unpadded`: length along `dim` without padding, if entries from there on are padding.
    """
    length = shape[dim] // parallel.tp_size
    local_shape = (*shape[:dim], length, *shape[dim + 1 :])
    full_shape = (*shape[:dim], unpadded or shape[dim], *shape[dim + 1 :])
    parameter = nn.Parameter(torch.empty(local_shape))
    set_shard(parameter, Shard(name, full_shape, dim, parallel.tp_rank * length, std, mean))
    return parameter


def replicated_parameter(
    name: str,
    shape: tuple[int, ...],
    parallel: ParallelContext,
    std: float = 0.0,
    mean: float = 0.0,
    own_heads: bool = False,
    init_dim: int = 0,
) -> nn.Parameter:
    """Create a parameter that every tensor rank holds in full.

    Under sequence parallelism each tensor rank applies it to its own range of the sequence, so each computes a partial
    gradient; the same holds if each uses it for its own heads (`own_heads`).
    `init_dim`: the dim that other layouts split.
    """
    parameter = nn.Parameter(torch.empty(shape))
    partial = parallel.sequence_parallel or (own_heads and parallel.tp_size > 1)
    set_shard(parameter, Shard(name, shape, None, 0, std, mean, partial_gradient=partial, init_dim=init_dim))
    return parameter


def shard_of(parameter: nn.Parameter) -> Shard:
    """Return the parameter's shard record."""
    return cast(Shard, cast(Any, parameter).shard)


def set_shard(parameter: nn.Parameter, shard: Shard) -> None:
    """Attach a shard record to the parameter."""
    cast(Any, parameter).shard = shard


def mark_second_copy(parameter: nn.Parameter) -> None:
    """Mark the parameter as the last stage's copy of a tied embedding."""
    set_shard(parameter, replace(shard_of(parameter), second_copy=True))
