"""GPT, cut into chunks: the part of the model that one pipeline stage runs.

A chunk of all layers is the whole model; the single process takes the same path as any layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt.config.schema import Config
from megagpt.model.attention import KVCache, document_mask
from megagpt.model.block import Block, residual_dropout
from megagpt.model.norm import LayerNorm
from megagpt.model.positions import LearnedPositions
from megagpt.parallel.embedding import VocabParallelEmbedding, VocabParallelLoss
from megagpt.parallel.random import initialize
from megagpt.parallel.shard import TensorParallel, mark_second_copy


@dataclass(frozen=True)
class MicroBatch:
    """What all stages know of one forward: the first reads tokens and positions, the last labels, all the rest."""

    tokens: Tensor
    """[batch, seq], int64; under context parallelism this rank's part of the positions, [batch, seq / ranks]"""
    labels: Tensor
    """As tokens; `IGNORED` where a position has no part in the loss"""
    seed: int = 0
    """Differs for every micro-batch of the run, whatever the layout."""
    positions: Tensor | None = None
    """[batch, seq], int64; 0 to seq - 1 if absent"""
    documents: Tensor | None = None
    """[batch, seq], int64, which of the sample's documents each token is of: attention stays within it. If absent, a
    token attends to all before it."""


class GPTChunk(nn.Module):
    """Layers `layers` of a decoder-only transformer (Radford et al., GPT-2), with the embeddings or the loss at its ends."""

    def __init__(self, config: Config, tp: TensorParallel, layers: range) -> None:
        super().__init__()
        model = config.model
        self.config, self.tp = config, tp
        self.is_first, self.is_last = layers.start == 0, layers.stop == model.n_layer
        if self.is_first:
            self.tokens = self._embedding(TOKEN_EMBEDDING)
            self.positions = LearnedPositions("embedding.position", model.n_positions, model.n_embd, tp, model.init_std)
        self.layers = nn.ModuleDict({str(index): Block(index, config, tp) for index in layers})
        if self.is_last:
            self.norm = LayerNorm("final_norm", model.n_embd, model.layer_norm_epsilon, tp)
            self.loss = VocabParallelLoss(self._output_weight(), tp, config.training.label_smoothing)

    def forward(self, x: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        """Hidden states of the layers before (None at the first chunk) to those after this chunk, or at the last
        chunk to the sum of the token losses (a scalar, fp32)."""
        hidden = self.hidden(micro_batch.tokens if x is None else x, micro_batch)
        return self.loss(hidden, micro_batch.labels) if self.is_last else hidden

    def hidden(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Token ids [batch, seq] at the first chunk, else hidden states, through this chunk's layers."""
        seed, documents = micro_batch.seed, micro_batch.documents
        if self.is_first:
            x = self.positions(self.tokens(x), micro_batch.positions)
            x = residual_dropout(x, self.config.model.embd_pdrop, self.training, self.tp, seed, "embedding")
        mask = None if documents is None else document_mask(documents, x.dtype)
        blocks, size = list(self.layers.values()), self.config.training.recompute_layers
        if self.config.training.recompute != "full" or not torch.is_grad_enabled():
            x = _through(blocks, x, seed, mask)
        else:
            for first in range(0, len(blocks), size):
                group = blocks[first : first + size]
                x = checkpoint(_through, group, x, seed, mask, use_reentrant=False, preserve_rng_state=False)
        return self.norm(x) if self.is_last else x

    def logits(self, tokens: Tensor, caches: dict[str, KVCache] | None = None) -> Tensor:
        """Scores of the next token, on a model of one chunk. [batch, seq] -> [batch, seq, vocab_size]"""
        x = self.positions(self.tokens(tokens), seen=next(iter(caches.values())).length if caches else 0)
        for index, block in self.layers.items():
            x = block(x, cache=caches[index] if caches else None)
        return self.loss.logits(self.norm(x))

    def _output_weight(self) -> nn.Parameter:
        if not self.config.model.tie_embeddings:
            return self._embedding("head.weight").weight
        if self.is_first:
            return self.tokens.weight
        weight = self._embedding(TOKEN_EMBEDDING).weight
        mark_second_copy(weight)
        return weight

    def _embedding(self, name: str) -> VocabParallelEmbedding:
        model = self.config.model
        return VocabParallelEmbedding(
            name, model.tokens_in_vocab, model.padded_vocab_size, model.n_embd, self.tp, model.init_std
        )


def _through(blocks: Sequence[nn.Module], x: Tensor, seed: int, mask: Tensor | None) -> Tensor:
    for block in blocks:
        x = block(x, seed, mask)
    return x


def build_chunk(config: Config, tp: TensorParallel, layers: range, device: torch.device | str = "cpu") -> GPTChunk:
    """A chunk with its initial weights, on `device`, in the precision of the config."""
    with torch.device(device):
        chunk = GPTChunk(config, tp, layers)
    for parameter in chunk.parameters():
        initialize(parameter, config.training.seed)
    return chunk.to(dtype=DTYPES[config.training.precision])


def share_tied_embedding(chunks: Sequence[GPTChunk]) -> None:
    """Where one rank has the first chunk and the last, their tied embedding is one parameter and not two copies."""
    first = next((chunk for chunk in chunks if chunk.is_first), None)
    last = next((chunk for chunk in chunks if chunk.is_last), None)
    if first is None or last is None or first is last or not first.config.model.tie_embeddings:
        return
    last.loss.weight = first.tokens.weight


TOKEN_EMBEDDING = "embedding.token.weight"
"""Name of the parameter that a tied output layer shares."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of parameters and activations under each `training.precision`."""
