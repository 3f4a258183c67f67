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


def document_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores so that a token sees its own document's earlier tokens alone.

    Number of each token's document, [batch, seq] -> 0 or -inf, [batch, 1, seq, seq] in the queries' `dtype`. Its
    batch x seq^2 numbers are made once for all layers of a chunk, and kept until the micro-batch's backward.
    """
    seen = (documents.unsqueeze(2) == documents.unsqueeze(1)).tril().unsqueeze(1)
    # Not the booleans: scaled_dot_product_attention would turn them into these numbers anew in every layer, and keep each.
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


class CausalSelfAttention(nn.Module):
    """[batch, seq, hidden] -> [batch, seq, hidden] (a part of the sequence under sequence or context parallelism).

    The rows of the qkv weight stand head by head, each with its query, key and value (3 x head), so that a
    contiguous split of them is a split by heads.
    """

    def __init__(self, name: str, model: ModelConfig, tp: TensorParallel, residual_std: float, recompute_core: bool) -> None:
        super().__init__()
        self.qkv = ColumnParallelLinear(f"{name}.qkv", model.n_embd, 3 * model.n_embd, tp, model.init_std)
        self.proj = RowParallelLinear(f"{name}.proj", model.n_embd, model.n_embd, tp, residual_std)
        self.heads, self.head_width, self.dropout = model.n_head // tp.size, model.head_width, model.attn_pdrop
        self.recompute_core, self.context = recompute_core, tp.context

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """`mask`: of `document_mask`, over the whole sequence; all earlier tokens are seen without one."""
        qkv = self.qkv(x)  # [batch, seq, heads * 3 * head]
        batch, seq, _ = qkv.shape
        qkv = self.context.heads_for_sequence(qkv.view(batch, seq, self.heads, 3 * self.head_width))
        query, key, value = qkv.unflatten(3, (3, self.head_width)).transpose(1, 2).unbind(3)
        if cache is not None:
            return self.proj(self._join(self._cached(query, key, value, cache)))
        if self.recompute_core and torch.is_grad_enabled():
            # The block sets the dropout seed before this call; saving the state here serves the second forward.
            out = checkpoint(self._core, query, key, value, mask, use_reentrant=False, preserve_rng_state=self._dropout() > 0)
        else:
            out = self._core(query, key, value, mask)
        return self.proj(self._join(out))

    def _core(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, dropout_p=self._dropout())

    def _cached(self, query: Tensor, key: Tensor, value: Tensor, cache: KVCache) -> Tensor:
        first = cache.length == 0
        keys, values = cache.append(key, value)
        if not first and query.shape[2] > 1:
            raise ValueError("a cache takes its prompt at once, then one token at a time")
        return F.scaled_dot_product_attention(query, keys, values, is_causal=first)

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _join(self, out: Tensor) -> Tensor:
        """[batch, heads, seq, head] -> [batch, seq, heads * head], of this rank's positions and all of its heads"""
        return self.context.sequence_for_heads(out.transpose(1, 2)).flatten(2)
