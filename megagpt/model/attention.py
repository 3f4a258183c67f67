"""Causal self-attention; the heads are split over the tensor ranks."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt.config.schema import ModelConfig
from megagpt.model.dropout import AttentionDropout
from megagpt.model.forward_context import ForwardContext
from megagpt.model.kv_cache import KVCache
from megagpt.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megagpt.parallel.parallel_context import ParallelContext


def document_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Build the mask that limits each token to the earlier tokens of its own document.

    Document index of each token, [batch, seq] -> 0 or -inf, [batch, 1, seq, seq], in the dtype of the queries. The mask
    is built once for all layers of a chunk and stays in memory until the micro-batch's backward.
    """
    visible = (documents.unsqueeze(2) == documents.unsqueeze(1)).tril().unsqueeze(1)
    # Not a boolean mask: scaled_dot_product_attention would convert it in every layer and save each copy.
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


class CausalSelfAttention(nn.Module):
    """[batch, seq, hidden] -> [batch, seq, hidden] (this rank's positions under sequence or context parallelism).

    The rows of the qkv weight are ordered by head, each with its query, key and value (3 x head_dim), so a contiguous
    split of the rows is a split by heads.
    """

    def __init__(
        self,
        index: int,
        model: ModelConfig,
        parallel: ParallelContext,
        residual_std: float,
        recompute_core: bool,
    ) -> None:
        """`index`: layer number; `residual_std`: initial std of the output projection."""
        super().__init__()
        name = f"layers.{index}.attention"
        self.index = index
        self.heads = model.n_head // parallel.tp_size
        self.head_dim = model.head_dim
        self.context = parallel.context
        self.recompute_core = recompute_core
        self.qkv = ColumnParallelLinear(f"{name}.qkv", model.n_embd, 3 * model.n_embd, parallel, model.init_std)
        self.proj = RowParallelLinear(f"{name}.proj", model.n_embd, model.n_embd, parallel, residual_std)
        self.dropout = AttentionDropout(model.attn_pdrop, self.heads, parallel, index)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        qkv = self.qkv(x)  # [batch, seq, heads * 3 * head_dim]
        batch, seq, _ = qkv.shape
        qkv = self.context.heads_for_sequence(qkv.view(batch, seq, self.heads, 3 * self.head_dim))
        query, key, value = qkv.unflatten(3, (3, self.head_dim)).transpose(1, 2).unbind(3)  # [batch, heads, seq, head_dim]
        cache = ctx.caches.get(self.index)
        if cache is not None:
            out = _cached_attention(query, key, value, cache)
        elif self.recompute_core and torch.is_grad_enabled():
            out = checkpoint(self._core, query, key, value, ctx, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._core(query, key, value, ctx)
        # [batch, heads, seq, head_dim] -> [batch, seq, heads * head_dim]: this rank's positions, all of its heads
        return self.proj(self.context.sequence_for_heads(out.transpose(1, 2)).flatten(2))

    def core_flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of scores and weighted values for one token, averaged over the sequence, of all heads.

        The full square takes 4 x sequence_length x width; half of it is masked.
        """
        return 2 * sequence_length * self.proj.n_in

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of the unsharded layer for one token, averaged over the sequence."""
        return self.qkv.flops_per_token() + self.core_flops_per_token(sequence_length) + self.proj.flops_per_token()

    def _core(self, query: Tensor, key: Tensor, value: Tensor, ctx: ForwardContext) -> Tensor:
        if self.training and self.dropout.probability > 0:
            return cast(Tensor, self.dropout(query, key, value, ctx))
        mask = ctx.attention_mask
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)


def _cached_attention(query: Tensor, key: Tensor, value: Tensor, cache: KVCache) -> Tensor:
    is_prompt = cache.length == 0
    if not is_prompt and query.shape[2] > 1:
        raise ValueError("the cache accepts the full prompt first, then one token at a time")
    keys, values = cache.append(key, value)
    return F.scaled_dot_product_attention(query, keys, values, is_causal=is_prompt)
