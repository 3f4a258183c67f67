"""Self-attention; the heads are split over the tensor ranks."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from megagpt.config.schema import ModelConfig
from megagpt.model import fused
from megagpt.model.explicit_attention import ExplicitAttention
from megagpt.model.flex_attention import attend
from megagpt.model.forward_context import ForwardContext
from megagpt.model.place import Place
from megagpt.model.qkv import Heads, build_qkv
from megagpt.parallel.linear import RowParallelLinear
from megagpt.parallel.parallel_context import ParallelContext


def attention_mask(
    documents: Tensor | None, window: int | None, length: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Build the mask that limits each token to the earlier tokens of its own document and of its window.

    documents: document index of each token, [batch, seq], or None; window: number of last tokens, or None.
    Returns 0 or -inf, [batch or 1, 1, seq, seq], in the dtype of the queries; None if all earlier tokens are visible.
    The mask is built once for all layers of a chunk and stays in memory until the micro-batch's backward.
    """
    if window is not None and window >= length:
        window = None
    if documents is None and window is None:
        return None
    visible = torch.ones(1, length, length, dtype=torch.bool, device=device)
    if documents is not None:
        visible = documents.unsqueeze(2) == documents.unsqueeze(1)
    visible = visible.tril()
    if window is not None:
        visible = visible.triu(1 - window)
    visible = visible.unsqueeze(1)
    # Not a boolean mask: scaled_dot_product_attention would convert it in every layer and save each copy.
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))


def output_projection(
    name: str, model: ModelConfig, parallel: ParallelContext, residual_std: float, add_bias: bool
) -> RowParallelLinear:
    """Return the layer behind the heads of an attention, [batch, seq, heads * head size] -> [batch, seq, hidden]."""
    n_in, bias = model.n_head * model.head_size, model.attention_bias
    return RowParallelLinear(f"{name}.proj", n_in, model.n_embd, parallel, residual_std, bias, add_bias)


def run_core(core: Callable[..., Tensor], recompute: bool, *args: Any) -> Tensor:
    """Return core(*args); with `recompute` the backward computes it again, so nothing but the arguments is saved."""
    if not recompute or not torch.is_grad_enabled():
        return core(*args)
    return cast(Tensor, checkpoint(core, *args, use_reentrant=False, preserve_rng_state=False))


class SelfAttention(nn.Module):
    """[batch, seq, hidden] -> [batch, seq, hidden] (this rank's positions under sequence or context parallelism).

    A subclass says which positions attend to which.
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
        name = f"{place.name}.attention"
        self.index = place.index
        self.context = parallel.context
        self.kernels = parallel.kernels
        self.recompute_core = recompute_core
        self.interleaved_rotary = model.rotary.interleaved
        self.scale = model.attention_scale or model.head_size**-0.5
        self.qkv = build_qkv(name, model, parallel)
        self.proj = output_projection(name, model, parallel, residual_std, add_bias)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        heads = self._all_positions(self.qkv(x))
        query, key, value = (tensor.transpose(1, 2) for tensor in heads)  # [batch, heads, seq, head size]
        if ctx.rotary is not None:
            query, key = (fused.rotate(self.kernels, tensor, ctx.rotary, self.interleaved_rotary) for tensor in (query, key))
        key, value = self._with_earlier(key, value, ctx)
        out = run_core(self._core, self.recompute_core, query, key, value, ctx)
        # [batch, heads, seq, head size] -> [batch, seq, heads * head size]: this rank's positions, all of its heads
        return self.proj(self.context.sequence_for_heads(out.transpose(1, 2)).flatten(2))

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of the unsharded layer for one token, averaged over the sequence."""
        raise NotImplementedError

    def hidden_core_flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of scores and weighted values that masks save for one token, averaged over the sequence."""
        raise NotImplementedError

    def _core(self, query: Tensor, key: Tensor, value: Tensor, ctx: ForwardContext) -> Tensor:
        """Return the weighted values, [batch, heads, queries, head size]."""
        raise NotImplementedError

    def _with_earlier(self, key: Tensor, value: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """Return keys and values with those of earlier tokens, in generation."""
        raise NotImplementedError

    def _all_positions(self, heads: Heads) -> Heads:
        """Exchange the heads of this rank's positions for some heads of all positions, under context parallelism."""
        if self.context.size == 1:
            return heads
        query, key, value = heads
        n_kv = key.shape[2]
        if n_kv % self.context.size:  # too few to split: each query head gets a copy of its keys and values
            key, value = (tensor.repeat_interleave(query.shape[2] // n_kv, 2) for tensor in (key, value))
            n_kv = query.shape[2]
        by_group = torch.cat((query.unflatten(2, (n_kv, -1)), key.unsqueeze(3), value.unsqueeze(3)), 3)
        exchanged = self.context.heads_for_sequence(by_group.flatten(3)).unflatten(3, by_group.shape[3:])
        query, key, value = exchanged.split((query.shape[2] // n_kv, 1, 1), 3)
        return Heads(query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3))


class CausalSelfAttention(SelfAttention):
    """Self-attention of a decoder-only model: each token attends to the earlier ones, of its window and its document."""

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
        self.window = model.window_of(place.index)
        self.explicit = ExplicitAttention(model, self.scale, parallel, place.index)

    def core_flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of scores and weighted values for one token, averaged over the sequence, of all heads.

        Token i sees i + 1 tokens, at most its window: in the mean half of a full sequence, and of a window all but the part
        that is cut off at the start of the sequence.
        """
        unmasked = self.unmasked_core_flops_per_token(sequence_length)
        return unmasked - unmasked * min(self.window or sequence_length, sequence_length) // (2 * sequence_length)

    def hidden_core_flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of scores and weighted values that masks save for one token, averaged over the sequence."""
        return self.unmasked_core_flops_per_token(sequence_length) - self.core_flops_per_token(sequence_length)

    def unmasked_core_flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of scores and weighted values if each token saw an entire sequence, or its entire window."""
        return 4 * min(self.window or sequence_length, sequence_length) * self.proj.n_in

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of the unsharded layer for one token, averaged over the sequence."""
        projections = self.qkv.flops_per_token() + self.proj.flops_per_token()
        return projections + self.core_flops_per_token(sequence_length) + self.explicit.flops_per_token()

    def _core(self, query: Tensor, key: Tensor, value: Tensor, ctx: ForwardContext) -> Tensor:
        mask = ctx.attention_masks.get(self.window)
        if isinstance(mask, BlockMask):
            return attend(self.explicit, query, key, value, mask)
        if self.explicit.is_needed:
            return cast(Tensor, self.explicit(query, key, value, mask, ctx))
        is_causal = mask is None and query.shape[2] > 1  # a single query is the last position and sees all keys
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=is_causal, scale=self.scale, enable_gqa=grouped
        )

    def _with_earlier(self, key: Tensor, value: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        cache = ctx.caches.get(self.index)
        if cache is None:
            return key, value
        assert ctx.cached_rows is not None
        return cache.append(key, value, ctx.cached_rows, self.window)
