"""Consecutive layers of the encoder and of the decoder of `encoder_decoder.py`, with what stands at the ends of each stack."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from megagpt.config.schema import Config
from megagpt.model import fused
from megagpt.model.block import PreNormBlock, run_stack
from megagpt.model.dropout import ResidualDropout
from megagpt.model.ends import dropout_keys
from megagpt.model.forward_context import ForwardContext, MicroBatch
from megagpt.model.init_scheme import init_stds
from megagpt.model.memory_cache import MemoryCache
from megagpt.model.norm import build_add_norm, build_norm
from megagpt.model.place import Place
from megagpt.model.positions import build_positions
from megagpt.model.rotary import RotaryTable, rotary_table_of
from megagpt.model.score_bias import SharedBias
from megagpt.model.stack_attention import CrossAttention, DecoderSelfAttention, EncoderSelfAttention
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import mark_second_copy

ENCODER = "encoder."
"""Prefix of the names of the encoder's parameters; those of the decoder have none, as without an encoder."""
BIASES = {"encoder": "encoder.relative_bias.weight", "decoder": "decoder.relative_bias.weight"}
"""Names of the relative biases, which all layers of a stack share."""


class DecoderBlock(PreNormBlock):
    """Self-attention, cross-attention and MLP, each with a norm at its input."""

    def __init__(self, place: Place, config: Config, parallel: ParallelContext) -> None:
        super().__init__(place, config, parallel, DecoderSelfAttention)
        model, self_adds = config.model, not parallel.kernels.compiled
        recompute_core = config.training.recompute == "selective"
        self.cross_norm = build_add_norm(f"{place.name}.cross_norm", model, parallel)
        self.cross_attention = CrossAttention(place, model, parallel, init_stds(model).residual, recompute_core, self_adds)
        self.cross_dropout = ResidualDropout(model.resid_pdrop, parallel, *place.site, "cross-attention residual")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        branch = self.attention(self.attention_norm(x), ctx)
        x, normed = self.cross_norm(x, self.attention_dropout.branch(branch, self.attention.proj.pending_bias, ctx))
        branch = self.cross_attention(normed, ctx)
        x, normed = self.mlp_norm(x, self.cross_dropout.branch(branch, self.cross_attention.proj.pending_bias, ctx))
        branch = self.mlp(normed, ctx)
        return fused.add(self.kernels, x, self.mlp_dropout.branch(branch, self.mlp.down.pending_bias, ctx))

    def flops(self, source_length: int, sequence_length: int) -> int:
        """Forward FLOPs of the unsharded matrix products for one sample."""
        of_tokens = sequence_length * self.flops_per_token(sequence_length)
        return of_tokens + self.cross_attention.flops(source_length, sequence_length)


class _Stack(nn.Module):
    """Layers `layers` of `n_layers`, with the positions before the first and the norm after the last."""

    def __init__(self, name: str, config: Config, parallel: ParallelContext, layers: range, n_layers: int) -> None:
        """`name`: "encoder" or "decoder"."""
        super().__init__()
        model = config.model
        self.config = config
        self.parallel = parallel
        self.is_first = layers.start == 0
        self.is_last = layers.stop == n_layers
        self.prefix = ENCODER if name == "encoder" else ""
        if self.is_first:
            n_positions = model.source_length if name == "encoder" else model.n_positions
            self.positions = build_positions(f"{self.prefix}embedding.position", model, parallel, n_positions)
            self.dropout = ResidualDropout(model.embd_pdrop, parallel, f"{self.prefix}embedding")
        self.bias: SharedBias | None = None
        if model.position_embedding == "relative":
            self.bias = SharedBias(name, model, parallel, both_ways=name == "encoder")
            if not self.is_first:
                mark_second_copy(self.bias.weight)
        self.layers = nn.ModuleDict({str(index): self._block(Place(index, self.prefix)) for index in layers})
        if self.is_last:
            self.norm = build_norm(f"{self.prefix}final_norm", model, parallel)
            self.output_dropout = ResidualDropout(model.embd_pdrop, parallel, f"{self.prefix}output")

    def _block(self, place: Place) -> PreNormBlock:
        raise NotImplementedError

    def run(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Return the hidden states after these layers, for embedded tokens or the hidden states before them."""
        if self.is_first:
            x = self.dropout(self.positions(x, ctx), ctx)
        x = run_stack(list(self.layers.values()), x, ctx, self.config.training)
        return self.output_dropout(self.norm(x), ctx) if self.is_last else x

    def _scores(self, queries: int, keys: int, mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Return what self-attention adds to its scores. The queries are the last positions of the keys."""
        if self.bias is None:
            return mask
        bias = self.bias(queries, keys, like.device).to(like.dtype)
        return bias if mask is None else bias + mask

    def _rotary(self, first: int, stop: int, like: Tensor) -> RotaryTable | None:
        return rotary_table_of(self.config.model, torch.arange(first, stop, device=like.device), like.dtype)

    def _keys(self, micro_batch: MicroBatch, length: int) -> Tensor | None:
        return dropout_keys(self.config, micro_batch, length) if self.training else None


class EncoderStack(_Stack):
    """[batch, encoder seq, hidden] -> [batch, encoder seq, hidden]"""

    def __init__(self, config: Config, parallel: ParallelContext, layers: range) -> None:
        super().__init__("encoder", config, parallel, layers, config.model.encoder_layers)

    @property
    def blocks(self) -> list[PreNormBlock]:
        """The encoder's blocks of this chunk."""
        return [cast(PreNormBlock, block) for block in self.layers.values()]

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        assert micro_batch.source is not None
        length = micro_batch.source.shape[1] * self.parallel.context.size
        mask = padding_mask(micro_batch.source_lengths, length, x.dtype)
        ctx = ForwardContext(
            token_keys=self._keys(micro_batch, length),
            rotary=self._rotary(0, length, x),
            added_scores=self._scores(length, length, mask, x),
        )
        return self.run(x, ctx)

    def _block(self, place: Place) -> PreNormBlock:
        return PreNormBlock(place, self.config, self.parallel, EncoderSelfAttention)


class DecoderStack(_Stack):
    """[batch, seq, hidden] and the encoder's output [batch, encoder seq, hidden] -> [batch, seq, hidden]"""

    def __init__(self, config: Config, parallel: ParallelContext, layers: range) -> None:
        super().__init__("decoder", config, parallel, layers, config.model.n_layer)

    @property
    def blocks(self) -> list[DecoderBlock]:
        """The decoder's blocks of this chunk."""
        return [cast(DecoderBlock, block) for block in self.layers.values()]

    def forward(self, x: Tensor, memory: Tensor, micro_batch: MicroBatch) -> Tensor:
        assert micro_batch.source is not None
        length = micro_batch.tokens.shape[1] * self.parallel.context.size
        n_source = micro_batch.source.shape[1] * self.parallel.context.size
        ctx = ForwardContext(
            token_keys=self._keys(micro_batch, length),
            rotary=self._rotary(0, length, x),
            added_scores=self._scores(length, length, causal_mask(length, length, x), x),
            memory=memory,
            memory_mask=padding_mask(micro_batch.source_lengths, n_source, x.dtype),
        )
        return self.run(x, ctx)

    def continued(
        self, x: Tensor, first: int, memory: Tensor, source_lengths: Tensor | None, caches: Mapping[int, MemoryCache]
    ) -> Tensor:
        """Return the hidden states of new tokens from position `first` on, and store keys and values in `caches`."""
        n_new = x.shape[1]
        stop = first + n_new
        mask = causal_mask(n_new, stop, x) if n_new > 1 else None
        ctx = ForwardContext(
            positions=torch.arange(first, stop, device=x.device).expand(len(x), -1),
            rotary=self._rotary(first, stop, x),
            added_scores=self._scores(n_new, stop, mask, x),
            memory=memory,
            memory_mask=padding_mask(source_lengths, memory.shape[1], x.dtype),
            memory_caches=caches,
        )
        return self.run(x, ctx)

    def _block(self, place: Place) -> PreNormBlock:
        return DecoderBlock(place, self.config, self.parallel)


def padding_mask(lengths: Tensor | None, n_keys: int, dtype: torch.dtype) -> Tensor | None:
    """Return 0, or the lowest number of `dtype` for keys from each row's length on, [batch, 1, 1, keys]; None without lengths.

    Not -inf, which would give NaN in a row without any token.
    """
    if lengths is None:
        return None
    hidden = torch.arange(n_keys, device=lengths.device) >= lengths.unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill_(hidden, torch.finfo(dtype).min)
    return mask[:, None, None]


def causal_mask(n_queries: int, n_keys: int, like: Tensor) -> Tensor:
    """Return 0, or -inf for later keys, [1, 1, queries, keys]; the queries are the last positions of the keys."""
    mask = like.new_full((n_queries, n_keys), float("-inf")).triu_(n_keys - n_queries + 1)
    return mask[None, None]
