"""Attention of a model with an encoder: self-attention in both stacks, and cross-attention of the decoder to the encoder.

Relative bias and masks are the same in all layers of a stack, so the stack makes them once (`ForwardContext.added_scores`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.model.attention import SelfAttention, output_projection, run_core
from megagpt.model.dropout import WeightDropout
from megagpt.model.forward_context import ForwardContext
from megagpt.model.memory_cache import Pair
from megagpt.model.place import Place
from megagpt.model.qkv import GroupedQKV
from megagpt.parallel.parallel_context import ParallelContext


class WeightedValues(nn.Module):
    """softmax(scores + added) values, with dropout of the weights."""

    def __init__(self, scale: float, model: ModelConfig, parallel: ParallelContext, *site: int | str) -> None:
        """`scale`: factor of the scores; `site`: of the dropout masks."""
        super().__init__()
        self.scale = scale
        self.dropout = WeightDropout(model, parallel, *site)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, ctx: ForwardContext) -> Tensor:
        """`added`: [batch or 1, heads or 1, queries, keys], or None. The other shapes as in scaled_dot_product_attention."""
        if not self.dropout.is_active:
            grouped = key.shape[1] != query.shape[1]
            return F.scaled_dot_product_attention(query, key, value, added, scale=self.scale, enable_gqa=grouped)
        n_repeats = query.shape[1] // key.shape[1]
        if n_repeats > 1:
            key, value = key.repeat_interleave(n_repeats, 1), value.repeat_interleave(n_repeats, 1)
        scores = (query * self.scale) @ key.transpose(2, 3)
        weights = F.softmax(scores if added is None else scores + added, -1)
        return self.dropout(weights, 0, key.shape[2], ctx) @ value


class StackSelfAttention(SelfAttention):
    """Self-attention of the encoder or of the decoder."""

    def __init__(
        self,
        place: Place,
        model: ModelConfig,
        parallel: ParallelContext,
        residual_std: float,
        recompute_core: bool,
        add_bias: bool = True,
    ) -> None:
        super().__init__(place, model, parallel, residual_std, recompute_core, add_bias)
        self.values = WeightedValues(self.scale, model, parallel, *place.site, "attention weights")

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of the unsharded layer for one token, averaged over the sequence."""
        projections = self.qkv.flops_per_token() + self.proj.flops_per_token()
        full = 4 * sequence_length * self.proj.n_in
        return projections + full - self.hidden_core_flops_per_token(sequence_length)

    def _core(self, query: Tensor, key: Tensor, value: Tensor, ctx: ForwardContext) -> Tensor:
        out: Tensor = self.values(query, key, value, ctx.added_scores, ctx)
        return out


class EncoderSelfAttention(StackSelfAttention):
    """Each token attends to all tokens of the source."""

    def hidden_core_flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of scores and weighted values that masks save: none."""
        return 0

    def _with_earlier(self, key: Tensor, value: Tensor, ctx: ForwardContext) -> Pair:
        return key, value


class DecoderSelfAttention(StackSelfAttention):
    """Each token attends to itself and to earlier tokens."""

    def hidden_core_flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of scores and weighted values that the causal mask saves for one token: half of a sequence."""
        return 2 * sequence_length * self.proj.n_in

    def _with_earlier(self, key: Tensor, value: Tensor, ctx: ForwardContext) -> Pair:
        cache = ctx.memory_caches.get(self.index)
        return (key, value) if cache is None else cache.append(key, value)


class CrossAttention(nn.Module):
    """Queries of the decoder, keys and values of the encoder's output.

    [batch, seq, hidden] -> [batch, seq, hidden] (this rank's positions under sequence or context parallelism).
    """

    def __init__(
        self,
        place: Place,
        model: ModelConfig,
        parallel: ParallelContext,
        residual_std: float,
        recompute_core: bool,
        add_bias: bool = True,
    ) -> None:
        """`residual_std`: initial std of the output projection.

        `add_bias`: False leaves the output's bias to the residual addition.
        """
        super().__init__()
        name = f"{place.name}.cross_attention"
        self.index = place.index
        self.context = parallel.context
        self.n_heads = model.n_head // parallel.tp_size
        self.recompute_core = recompute_core
        self.qkv = GroupedQKV(name, model, parallel)
        self.proj = output_projection(name, model, parallel, residual_std, add_bias)
        scale = model.attention_scale or model.head_size**-0.5
        self.values = WeightedValues(scale, model, parallel, *place.site, "cross-attention weights")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        query = self.context.heads_for_sequence(self.qkv.queries(x)).transpose(1, 2)
        key, value = self._keys_and_values(ctx)
        out = run_core(self.values, self.recompute_core, query, key, value, ctx.memory_mask, ctx)
        return self.proj(self.context.sequence_for_heads(out.transpose(1, 2)).flatten(2))

    def flops(self, source_length: int, sequence_length: int) -> int:
        """Forward FLOPs of the unsharded layer for one sample: a source and the decoder's tokens."""
        of_tokens = self.qkv.q.flops_per_token() + self.proj.flops_per_token() + 4 * source_length * self.proj.n_in
        return of_tokens * sequence_length + self.qkv.kv.flops_per_token() * source_length

    def _keys_and_values(self, ctx: ForwardContext) -> Pair:
        """Return the keys and values of the encoder's output, [batch, heads, encoder seq, head size]."""
        cache = ctx.memory_caches.get(self.index)
        if cache is not None and cache.source is not None:
            return cache.source
        assert ctx.memory is not None, "the decoder's stages get the encoder's output"
        key, value = self._all_positions(*self.qkv.keys_and_values(ctx.memory))
        pair = key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            cache.source = pair
        return pair

    def _all_positions(self, key: Tensor, value: Tensor) -> Pair:
        """Exchange the heads of this rank's positions for some heads of all positions, under context parallelism."""
        if self.context.size == 1:
            return key, value
        if key.shape[2] % self.context.size:  # too few to split: each query head gets a copy of its keys and values
            n_repeats = self.n_heads // key.shape[2]
            key, value = key.repeat_interleave(n_repeats, 2), value.repeat_interleave(n_repeats, 2)
        key, value = self.context.heads_for_sequence(torch.cat((key, value), -1)).chunk(2, -1)
        return key, value
