"""Queries, keys and values of self-attention, and their norms; the heads are split over the tensor ranks."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.model import fused
from megagpt.model.init_scheme import init_stds
from megagpt.model.norm import Norm
from megagpt.parallel.collectives import copy_to_ranks, reduce_from_ranks
from megagpt.parallel.linear import ColumnParallelLinear
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import replicated_parameter, sharded_parameter


class Heads(NamedTuple):
    """Queries [batch, seq, heads, head size]; keys and values [batch, seq, kv heads, head size]."""

    query: Tensor
    key: Tensor
    value: Tensor


class FusedQKV(nn.Module):
    """One matrix product, for as many key and value heads as query heads.

    The rows of the weight are ordered by head, each with its query, key and value, so a contiguous split of the rows is a
    split by heads.
    """

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.head_size = model.head_size
        self.kernels = parallel.kernels
        n_out = 3 * model.n_head * model.head_size
        self.qkv = ColumnParallelLinear(f"{name}.qkv", model.n_embd, n_out, parallel, init_stds(model).hidden, model.qkv_bias)
        self.norm = build_qk_norm(name, model, parallel, kv_replicated=False)

    def forward(self, x: Tensor) -> Heads:
        query, key, value = fused.split_heads(self.kernels, self.qkv(x), 3, self.head_size)
        return self.norm(Heads(query, key, value))

    def flops_per_token(self) -> int:
        """Forward FLOPs of the unsharded matrix product for one token."""
        return self.qkv.flops_per_token()


class GroupedQKV(nn.Module):
    """Fewer key and value heads than query heads: each serves a group of consecutive heads (arXiv 2305.13245).

    If they cannot be split over the tensor ranks, every rank computes all of them and uses those of its own heads.
    """

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.head_size = model.head_size
        width, std, bias = model.n_embd, init_stds(model).hidden, model.qkv_bias
        replicated = model.kv_heads % parallel.tp_size != 0
        self.q = ColumnParallelLinear(f"{name}.q", width, model.n_head * model.head_size, parallel, std, bias)
        n_out = 2 * model.kv_heads * model.head_size
        self.kv = ColumnParallelLinear(f"{name}.kv", width, n_out, parallel, std, bias, parts=2, replicated=replicated)
        self.norm = build_qk_norm(name, model, parallel, replicated)
        self.own_kv_heads = _kv_heads_of_rank(model, parallel) if replicated else None

    def forward(self, x: Tensor) -> Heads:
        query, key, value = self.norm(Heads(self.queries(x), *self._all_keys_and_values(x)))
        return Heads(query, *self._of_own_heads(key, value))

    def queries(self, x: Tensor) -> Tensor:
        """Return the queries without their norm. [batch, seq, hidden] -> [batch, seq, heads, head size]"""
        return cast(Tensor, self.q(x)).unflatten(-1, (-1, self.head_size))

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values without their norm. [batch, seq, hidden] -> [batch, seq, kv heads, head size]"""
        return self._of_own_heads(*self._all_keys_and_values(x))

    def _all_keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.kv(x).unflatten(-1, (2, -1, self.head_size)).unbind(-3)
        return key, value

    def _of_own_heads(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.own_kv_heads is None:
            return key, value
        return key[:, :, self.own_kv_heads], value[:, :, self.own_kv_heads]

    def flops_per_token(self) -> int:
        """Forward FLOPs of the unsharded matrix products for one token."""
        return self.q.flops_per_token() + self.kv.flops_per_token()


class NoQKNorm(nn.Module):
    """Leave queries and keys as they are."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext, kv_replicated: bool) -> None:
        super().__init__()

    def forward(self, heads: Heads) -> Heads:
        return heads


class HeadNorm(nn.Module):
    """Normalise each head of queries and keys; all heads share one weight (Qwen3)."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext, kv_replicated: bool) -> None:
        super().__init__()
        self.query = Norm(f"{name}.query_norm", model, model.head_size, parallel, own_heads=True)
        self.key = Norm(f"{name}.key_norm", model, model.head_size, parallel, own_heads=True)

    def forward(self, heads: Heads) -> Heads:
        return Heads(self.query(heads.query), self.key(heads.key), heads.value)


class WidthNorm(nn.Module):
    """RMSNorm of queries and keys over all heads together (OLMo 2); the mean square is summed over the tensor ranks."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext, kv_replicated: bool) -> None:
        super().__init__()
        self.epsilon = model.layer_norm_epsilon
        self.group = parallel.tp_group
        self.kv_replicated = kv_replicated
        self.query_width, self.key_width = model.n_head * model.head_size, model.kv_heads * model.head_size
        self.query_weight = sharded_parameter(f"{name}.query_norm.weight", (self.query_width,), 0, parallel, 0.0, mean=1.0)
        if kv_replicated:
            self.key_weight = replicated_parameter(
                f"{name}.key_norm.weight", (self.key_width,), parallel, mean=1.0, own_heads=True
            )
        else:
            self.key_weight = sharded_parameter(f"{name}.key_norm.weight", (self.key_width,), 0, parallel, 0.0, mean=1.0)

    def forward(self, heads: Heads) -> Heads:
        query = self._normalise(heads.query, self.query_weight, self.query_width, sharded=True)
        key = self._normalise(heads.key, self.key_weight, self.key_width, sharded=not self.kv_replicated)
        return Heads(query, key, heads.value)

    def _normalise(self, x: Tensor, weight: Tensor, width: int, sharded: bool) -> Tensor:
        values = x.float()
        total = values.square().sum((-2, -1), keepdim=True)
        if sharded:  # each rank's output depends on the total, so the total's gradient is summed over the ranks, too
            total = copy_to_ranks(reduce_from_ranks(total, self.group), self.group)
        normalised = values * torch.rsqrt(total / width + self.epsilon)
        return (normalised * weight.view(x.shape[-2:])).to(x.dtype)


QK_NORMS = {"none": NoQKNorm, "head": HeadNorm, "width": WidthNorm}


def build_qk_norm(name: str, model: ModelConfig, parallel: ParallelContext, kv_replicated: bool) -> nn.Module:
    """Return the norm of queries and keys. `kv_replicated`: every tensor rank computes all keys."""
    return QK_NORMS[model.qk_norm](name, model, parallel, kv_replicated)


def build_qkv(name: str, model: ModelConfig, parallel: ParallelContext) -> FusedQKV | GroupedQKV:
    """Return the projection to queries, keys and values that the config describes."""
    return (FusedQKV if model.kv_heads == model.n_head else GroupedQKV)(name, model, parallel)


def _kv_heads_of_rank(model: ModelConfig, parallel: ParallelContext) -> list[int]:
    """Return the key and value heads that this rank's heads use: as few as possible, each for as many heads."""
    heads, group = model.n_head // parallel.tp_size, model.n_head // model.kv_heads
    by_head = [(parallel.tp_rank * heads + head) // group for head in range(heads)]
    distinct = sorted(set(by_head))
    return distinct if by_head == [kv for kv in distinct for _ in range(heads // len(distinct))] else by_head
