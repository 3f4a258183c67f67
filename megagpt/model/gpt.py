"""GPT, cut into chunks: a chunk is the part of the model that one pipeline stage runs.

A chunk with all layers is the entire model, so a single process runs the same code as any layout.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from megagpt.config.schema import Config
from megagpt.model.adapters import add_adapters
from megagpt.model.attention import attention_mask
from megagpt.model.block import Block, PreNormBlock, build_block
from megagpt.model.dropout import ResidualDropout
from megagpt.model.dropout_masks import token_keys
from megagpt.model.flex_attention import block_mask, runs_flex_attention
from megagpt.model.forward_context import ForwardContext, MicroBatch
from megagpt.model.init_scheme import init_stds
from megagpt.model.kv_cache import CachedRows, LayerCache, cached_mask
from megagpt.model.norm import build_norm
from megagpt.model.objectives import build_objective
from megagpt.model.positions import build_positions
from megagpt.model.rotary import RotaryTable, rotary_frequencies, rotary_table
from megagpt.parallel.embedding import VocabParallelEmbedding, VocabParallelLoss
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import mark_second_copy
from megagpt.parallel.seeding import initialize, stable_seed

TOKEN_EMBEDDING = "embedding.token.weight"
"""Name of the parameter that a tied output layer shares."""
CLASSIFIER = "classifier.weight"
"""Name of the classification head."""
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
            self.tokens = self._embedding(TOKEN_EMBEDDING)
            self.positions = build_positions("embedding.position", model, parallel)
            self.dropout = ResidualDropout(model.embd_pdrop, parallel, "embedding")
        self.layers = nn.ModuleDict({str(index): build_block(index, config, parallel) for index in layers})
        add_adapters(self.layers, config.lora)
        if self.is_last:
            self.objective = build_objective(config)
            self.norm = build_norm("final_norm", model, parallel)
            head_pdrop = model.clf_pdrop if config.data.classes else 0.0
            self.head_dropout = ResidualDropout(head_pdrop, parallel, "head")
            self.loss = VocabParallelLoss(
                self._output_weight(),
                parallel,
                config.training.label_smoothing,
                softcap=model.logit_softcap,
                z_loss=config.training.z_loss,
                chunk_mib=config.training.loss_chunk_mib,
            )

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

    def hidden(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Run this chunk without the loss. x: token ids [batch, seq] on the first chunk, else hidden states."""
        ctx = self._context(micro_batch, x.device)
        if self.is_first:
            x = self.dropout(self._embed(x, ctx), ctx)
        if self.config.training.recompute == "full" and torch.is_grad_enabled():
            x = _run_recomputed(self.blocks, x, ctx, self.config.training.recompute_layers)
        else:
            x = _run(self.blocks, x, ctx)
        return self.head_dropout(self._output(x), ctx) if self.is_last else x

    def _output(self, x: Tensor) -> Tensor:
        """Return the input of the output layer."""
        growth = self.config.model.width_growth
        return self.norm(x) if growth == 1 else self.norm(x) / growth  # muP: smaller logits for larger widths

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
        windows = dict.fromkeys(block.attention.window for block in self.blocks)
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
        return self._output(_run(self.blocks, self._embed(tokens, ctx), ctx))

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
            token_keys=self._token_keys(micro_batch, length),
            positions=micro_batch.positions,
            attention_masks=self._masks(micro_batch.documents, length, device),
            rotary=self._rotary_table(positions),
        )

    def _token_keys(self, micro_batch: MicroBatch, length: int) -> Tensor | None:
        """Return the keys of the dropout masks of all positions, [batch, seq]; None if this forward has no dropout."""
        model = self.config.model
        probabilities = (model.embd_pdrop, model.attn_pdrop, model.resid_pdrop, model.clf_pdrop)
        if not self.training or micro_batch.samples is None or not any(probabilities):
            return None
        return token_keys(stable_seed(self.config.training.seed, "dropout"), micro_batch.samples, length)

    def _masks(self, documents: Tensor | None, length: int, device: torch.device) -> dict[int | None, Tensor | BlockMask]:
        """Return the attention masks of this chunk's layers by window; layers with plain causal attention need none."""
        explicit = self.blocks[0].attention.explicit  # the layers differ by their windows only
        flex = self.config.training.flex_attention and runs_flex_attention(explicit, device)
        masks: dict[int | None, Tensor | BlockMask] = {}
        for window in dict.fromkeys(block.attention.window for block in self.blocks):
            mask: Tensor | BlockMask | None
            if flex and (explicit.is_needed or documents is not None or (window is not None and window < length)):
                mask = block_mask(documents, window, length, device)
            else:
                mask = attention_mask(documents, window, length, activation_dtype(self.config), device)
            if mask is not None:
                masks[window] = mask
        return masks

    def _rotary_table(self, positions: Tensor) -> RotaryTable | None:
        """Return the cosines and sines of `positions`, [seq] or [batch, seq]; None without rotary embeddings."""
        model = self.config.model
        if model.position_embedding != "rotary":
            return None
        frequencies, amplitude = rotary_frequencies(model.rotary, model.head_size)
        return rotary_table(frequencies, amplitude, positions, activation_dtype(self.config))

    def _output_weight(self) -> nn.Parameter:
        if self.config.data.classes:
            return self._embedding(CLASSIFIER, len(self.config.data.classes)).weight
        if not self.config.model.tie_embeddings:
            return self._embedding("head.weight").weight
        if self.is_first:
            return self.tokens.weight
        weight = self._embedding(TOKEN_EMBEDDING).weight
        mark_second_copy(weight)
        return weight

    def _embedding(self, name: str, entries: int | None = None) -> VocabParallelEmbedding:
        """`entries`: tokens in the vocabulary, or classes."""
        model = self.config.model
        entries = entries or model.tokens_in_vocab
        padded = -(-entries // model.vocab_multiple) * model.vocab_multiple
        return VocabParallelEmbedding(name, entries, padded, model.n_embd, self.parallel, init_stds(model).embedding)


def _run(blocks: Sequence[PreNormBlock | Block], x: Tensor, ctx: ForwardContext) -> Tensor:
    for block in blocks:
        x = block(x, ctx)
    return x


def _run_recomputed(blocks: Sequence[PreNormBlock | Block], x: Tensor, ctx: ForwardContext, group_size: int) -> Tensor:
    """Save only the input of each group of blocks; the backward runs the group again. Dropout has no RNG state to save."""
    for first in range(0, len(blocks), group_size):
        group = blocks[first : first + group_size]
        x = checkpoint(_run, group, x, ctx, use_reentrant=False, preserve_rng_state=False)
    return x


def build_chunk(config: Config, parallel: ParallelContext, layers: range, device: torch.device | str = "cpu") -> GPTChunk:
    """Build a chunk with its initial weights on `device`, in the precision of the config."""
    with torch.device(device):
        chunk = GPTChunk(config, parallel, layers)
    for parameter in chunk.parameters():
        initialize(parameter, config.training.seed)
    return chunk.to(dtype=activation_dtype(config))


def share_tied_embedding(chunks: Sequence[GPTChunk]) -> None:
    """If this rank has both the first and the last chunk, make their tied embedding one parameter instead of two copies."""
    first = next((chunk for chunk in chunks if chunk.is_first), None)
    last = next((chunk for chunk in chunks if chunk.is_last), None)
    if first is None or last is None or first is last or not first.config.model.tie_embeddings:
        return
    last.loss.weight = first.tokens.weight
