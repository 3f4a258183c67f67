"""GPT, cut into chunks: a chunk is the part of the model that one pipeline stage runs.

A chunk with all layers is the entire model, so a single process runs the same code as any layout.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from megagpt.config.schema import Config
from megagpt.model.adapters import add_adapters
from megagpt.model.attention import CausalSelfAttention, attention_mask
from megagpt.model.block import Block, PreNormBlock, build_block, run_blocks, run_stack
from megagpt.model.dropout import ResidualDropout
from megagpt.model.ends import TOKEN_EMBEDDING, build_embedding, build_output, dropout_keys, scaled_output
from megagpt.model.flex_attention import block_mask, runs_flex_attention
from megagpt.model.forward_context import ForwardContext, MicroBatch
from megagpt.model.kv_cache import CachedRows, LayerCache, cached_mask
from megagpt.model.norm import build_norm
from megagpt.model.objectives import build_objective
from megagpt.model.positions import build_positions
from megagpt.model.rotary import RotaryTable, rotary_table_of
from megagpt.parallel.parallel_context import ParallelContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of stored weights."""


def activation_dtype(config: Config) -> torch.dtype:
    """Return the dtype of parameters and activations."""
    return DTYPES[config.training.weight_precision]


class GPTChunk(nn.Module):
    """Layers `layers` of a decoder-only transformer (GPT-2, Radford et al. 2019).

    The first chunk also holds the embeddings, the last chunk the final norm, the output layer and the loss.
    """

    def __init__(self, config: Config, parallel: ParallelContext, layers: range) -> None:
        super().__init__()
        model = config.model
        self.config = config
        self.parallel = parallel
        self.is_first = layers.start == 0
        self.is_last = layers.stop == model.n_layer
        if self.is_first:
            self.tokens = build_embedding(TOKEN_EMBEDDING, config, parallel)
            self.positions = build_positions("embedding.position", model, parallel)
            self.dropout = ResidualDropout(model.embd_pdrop, parallel, "embedding")
        self.layers = nn.ModuleDict({str(index): build_block(index, config, parallel) for index in layers})
        add_adapters(self.layers, config.lora)
        if self.is_last:
            self.objective = build_objective(config)
            self.norm = build_norm("final_norm", model, parallel)
            head_pdrop = model.clf_pdrop if config.data.classes else 0.0
            self.head_dropout = ResidualDropout(head_pdrop, parallel, "head")
            self.loss = build_output(config, parallel, self.tokens if self.is_first else None)

    def forward(self, x: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        """Run this chunk.

        x: hidden states of the previous chunk, [batch, seq, hidden]; None on the first chunk.
        Returns hidden states, or on the last chunk the sum of the losses (fp32 scalar).
        """
        hidden = self.hidden(micro_batch.tokens if x is None else x, micro_batch)
        return self.objective(self.loss, hidden, micro_batch) if self.is_last else hidden

    @property
    def blocks(self) -> list[PreNormBlock | Block]:
        """The transformer blocks of this chunk."""
        return [cast(PreNormBlock | Block, block) for block in self.layers.values()]

    @property
    def _attentions(self) -> list[CausalSelfAttention]:
        return [cast(CausalSelfAttention, block.attention) for block in self.blocks]

    def layer_flops(self) -> list[int]:
        """Return the forward FLOPs of each layer for one sample."""
        length = self.config.model.n_positions
        return [length * block.flops_per_token(length) for block in self.blocks]

    def embedding_flops(self) -> int:
        """Return the forward FLOPs of the embeddings for one sample."""
        return self.config.model.n_positions * self.positions.flops_per_token()

    def hidden_core_flops(self) -> int:
        """Return the forward FLOPs of one sample that the masks of attention save."""
        length = self.config.model.n_positions
        return sum(length * block.attention.hidden_core_flops_per_token(length) for block in self.blocks)

    def hidden(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Run this chunk without the loss. x: token ids [batch, seq] on the first chunk, else hidden states."""
        ctx = self._context(micro_batch, x.device)
        if self.is_first:
            x = self.dropout(self._embed(x, ctx), ctx)
        x = run_stack(self.blocks, x, ctx, self.config.training)
        return self.head_dropout(self._output(x), ctx) if self.is_last else x

    def _output(self, x: Tensor) -> Tensor:
        """Return the input of the output layer."""
        return scaled_output(self.norm(x), self.config.model)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return next-token logits, for a model in one chunk. [batch, seq] -> [batch, seq, vocab_size]"""
        return self.loss.full_logits(self._hidden_of(tokens))

    def logits_at(self, tokens: Tensor, where: Tensor) -> Tensor:
        """Return the logits at the positions where `where` [batch, seq] is true. [batch, seq] -> [positions, vocab_size]"""
        return self.loss.full_logits(self._hidden_of(tokens)[where])

    def _hidden_of(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        ctx = ForwardContext(
            rotary=self._rotary_table(torch.arange(length, device=tokens.device)),
            attention_masks=self._masks(None, length, tokens.device),
        )
        return self._final_hidden(tokens, ctx)

    def next_token_logits(self, tokens: Tensor, rows: CachedRows, caches: Mapping[int, LayerCache]) -> Tensor:
        """Return the logits after the last token of each row, and store its keys and values. For a model in one chunk.

        tokens: the new tokens of each row, [rows, new], aligned at the end, -> [rows, vocab_size].
        """
        dtype = activation_dtype(self.config)
        windows = dict.fromkeys(attention.window for attention in self._attentions)
        masks = {window: mask for window in windows if (mask := cached_mask(rows, window, dtype)) is not None}
        ctx = ForwardContext(
            positions=rows.positions,
            rotary=self._rotary_table(rows.positions),
            attention_masks=masks,
            cached_rows=rows,
            caches=caches,
        )
        return self.loss.full_logits(self._final_hidden(tokens, ctx)[:, -1])

    def _final_hidden(self, tokens: Tensor, ctx: ForwardContext) -> Tensor:
        """Return the input of the output layer, in evaluation. [batch, seq] -> [batch, seq, hidden]"""
        return self._output(run_blocks(self.blocks, self._embed(tokens, ctx), ctx))

    def _embed(self, tokens: Tensor, ctx: ForwardContext) -> Tensor:
        x = self.tokens(tokens)
        if self.config.model.embedding_scale != 1:
            x = x * self.config.model.embedding_scale
        return self.positions(x, ctx)

    def _context(self, micro_batch: MicroBatch, device: torch.device) -> ForwardContext:
        """Return what the layers of this chunk need for one micro-batch."""
        length = micro_batch.tokens.shape[1] * self.parallel.context.size
        positions = micro_batch.positions
        if positions is None:
            positions = torch.arange(length, device=device)
        return ForwardContext(
            token_keys=dropout_keys(self.config, micro_batch, length) if self.training else None,
            positions=micro_batch.positions,
            attention_masks=self._masks(micro_batch.documents, length, device),
            rotary=self._rotary_table(positions),
        )

    def _masks(self, documents: Tensor | None, length: int, device: torch.device) -> dict[int | None, Tensor | BlockMask]:
        """Return the attention masks of this chunk's layers by window; layers with plain causal attention need none."""
        explicit = self._attentions[0].explicit  # the layers differ by their windows only
        flex = self.config.training.flex_attention and runs_flex_attention(explicit, device)
        masks: dict[int | None, Tensor | BlockMask] = {}
        for window in dict.fromkeys(attention.window for attention in self._attentions):
            mask: Tensor | BlockMask | None
            if flex and (explicit.is_needed or documents is not None or (window is not None and window < length)):
                mask = block_mask(documents, window, length, device)
            else:
                mask = attention_mask(documents, window, length, activation_dtype(self.config), device)
            if mask is not None:
                masks[window] = mask
        return masks

    def _rotary_table(self, positions: Tensor) -> RotaryTable | None:
        return rotary_table_of(self.config.model, positions, activation_dtype(self.config))
