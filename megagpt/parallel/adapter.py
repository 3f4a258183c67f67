"""Low-rank adapters of linear layers (LoRA, Hu et al., arXiv 2106.09685): y = x W^T + scale * (x A^T) B^T, with W frozen.

A starts with random values and B with zeros, so that the first forward is that of the layer alone. Between A and B there are
only `rank` numbers per token, so that what the tensor ranks exchange for an adapter is small.
"""

import torch
from torch import Tensor, nn

from megagpt.parallel.collectives import gather_sequence, reduce_from_ranks, reduce_scatter_to_sequence
from megagpt.parallel.linear import ColumnParallelLinear, RowParallelLinear, linear
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import replicated_parameter, shard_of, sharded_parameter

A_SUFFIX, B_SUFFIX = ".lora_a", ".lora_b"
"""Ends of the parameter names; what stands before is the name of the layer."""


def is_adapter(name: str) -> bool:
    """Return whether a parameter name is that of an adapter."""
    return name.endswith((A_SUFFIX, B_SUFFIX))


def layer_name(layer: ColumnParallelLinear | RowParallelLinear) -> str:
    """Return the name of a linear layer, such as layers.0.mlp.up: that of its weight without the last part."""
    return shard_of(layer.weight).name.removesuffix(".weight")


class _Adapter(nn.Module):
    """What both kinds of adapter report."""

    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, layer: ColumnParallelLinear | RowParallelLinear, rank: int, scale: float) -> None:
        super().__init__()
        self.parallel: ParallelContext = layer.parallel
        self.scale = scale
        self._flops_per_token = 2 * rank * (layer.n_in + layer.n_out)

    def flops_per_token(self) -> int:
        """Forward FLOPs of the unsharded adapter for one token."""
        return self._flops_per_token


class ColumnAdapter(_Adapter):
    """Adapter of a column-parallel layer: A is on every tensor rank, B is split as the layer's weight is.

    Each rank computes a part of the gradient of x A^T, so that is summed over the ranks before A's gradient is computed.
    """

    def __init__(self, layer: ColumnParallelLinear, rank: int, scale: float) -> None:
        super().__init__(layer, rank, scale)
        parallel, name, weight = layer.parallel, layer_name(layer), shard_of(layer.weight)
        self.a = replicated_parameter(name + A_SUFFIX, (rank, layer.n_in), parallel, layer.n_in**-0.5)
        shape = (*weight.shape[:-1], rank)
        if weight.dim is None:
            self.b = replicated_parameter(name + B_SUFFIX, shape, parallel, own_heads=True, init_dim=weight.init_dim)
        else:
            self.b = sharded_parameter(name + B_SUFFIX, shape, weight.dim, parallel, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: the layer's input. Returns what is added to the layer's output."""
        group = self.parallel.tp_group
        low = linear(x, self.a, None, self.parallel)
        if self.parallel.sequence_parallel and group is not None:
            return linear(gather_sequence(low, group), self.b, None, self.parallel) * self.scale
        return linear(low, self.b, None, self.parallel, replicated_over=group) * self.scale


class RowAdapter(_Adapter):
    """Adapter of a row-parallel layer: A is split as the layer's weight is, B is on every tensor rank."""

    def __init__(self, layer: RowParallelLinear, rank: int, scale: float) -> None:
        super().__init__(layer, rank, scale)
        parallel, name = layer.parallel, layer_name(layer)
        self.a = sharded_parameter(name + A_SUFFIX, (rank, layer.n_in), 1, parallel, layer.n_in**-0.5)
        self.b = replicated_parameter(name + B_SUFFIX, (layer.n_out, rank), parallel)

    def forward(self, x: Tensor) -> Tensor:
        """x: the layer's input. Returns what is added to the layer's output."""
        reduce = reduce_scatter_to_sequence if self.parallel.sequence_parallel else reduce_from_ranks
        low = reduce(linear(x, self.a, None, self.parallel), self.parallel.tp_group)
        return linear(low, self.b, None, self.parallel) * self.scale


def add_adapter(layer: ColumnParallelLinear | RowParallelLinear, rank: int, scale: float) -> None:
    """Give a linear layer an adapter."""
    layer.adapter = (
        RowAdapter(layer, rank, scale) if isinstance(layer, RowParallelLinear) else ColumnAdapter(layer, rank, scale)
    )


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the weight of a layer without an adapter that computes the same. weight [..., out, in], a [rank, in]."""
    return weight + scale * torch.matmul(b, a)
