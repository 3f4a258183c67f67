"""Causal self-attention, heads split over tensor ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt.config.schema import ModelConfig
from megagpt.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megagpt.parallel.shard import TensorParallel


class KVCache:
    """Keys and values of the tokens seen so far, for generation. Each [batch, heads, seen, head]."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens seen."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [batch, heads, new, head]; returns all so far."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
        self.keys, self.values = keys, values
        return keys, values


class CausalSelfAttention(nn.Module):
    """[batch, seq, hidden] -> [batch, seq, hidden] (a part of the sequence under sequence parallelism).

    The rows of the qkv weight stand head by head, each with its query, key and value (3 x head), so that a
    contiguous split of them is a split by heads.
    """

    def __init__(self, name: str, model: ModelConfig, tp: TensorParallel, residual_std: float, recompute_core: bool) -> None:
        super().__init__()
        self.qkv = ColumnParallelLinear(f"{name}.qkv", model.n_embd, 3 * model.n_embd, tp, model.init_std)
        self.proj = RowParallelLinear(f"{name}.proj", model.n_embd, model.n_embd, tp, residual_std)
        self.heads, self.head_width, self.dropout = model.n_head // tp.size, model.head_width, model.attn_pdrop
        self.recompute_core = recompute_core

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        qkv = self.qkv(x)  # [batch, seq, heads * 3 * head]
        batch, seq, _ = qkv.shape
        query, key, value = qkv.view(batch, seq, self.heads, 3, self.head_width).transpose(1, 2).unbind(3)
        if cache is not None:
            return self.proj(self._join(self._cached(query, key, value, cache)))
        if self.recompute_core and torch.is_grad_enabled():
            # The block sets the dropout seed before this call; saving the state here serves the second forward.
            out = checkpoint(self._core, query, key, value, use_reentrant=False, preserve_rng_state=self._dropout() > 0)
        else:
            out = self._core(query, key, value)
        return self.proj(self._join(out))

    def _core(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=self._dropout())

    def _cached(self, query: Tensor, key: Tensor, value: Tensor, cache: KVCache) -> Tensor:
        first = cache.length == 0
        keys, values = cache.append(key, value)
        if not first and query.shape[2] > 1:
            raise ValueError("a cache takes its prompt at once, then one token at a time")
        return F.scaled_dot_product_attention(query, keys, values, is_causal=first)

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _join(self, out: Tensor) -> Tensor:
        """[batch, heads, seq, head] -> [batch, seq, heads * head]"""
        return out.transpose(1, 2).flatten(2)
