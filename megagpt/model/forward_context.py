"""Inputs of a model: what a pipeline stage gets per micro-batch, and what each layer gets per forward."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megagpt.model.kv_cache import CachedRows, LayerCache
from megagpt.model.memory_cache import MemoryCache
from megagpt.model.rotary import RotaryTable


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward on all stages: the first reads tokens and positions, the last labels, all of them the rest."""

    tokens: Tensor
    """[batch, seq], int64; under context parallelism this rank's positions, [batch, seq / ranks]."""
    labels: Tensor
    """Shape of `tokens`; `IGNORED` at positions that do not count in the loss."""
    samples: Tensor | None = None
    """[batch], int64, number of each sample in the run. Dropout in training needs it: its masks belong to samples."""
    positions: Tensor | None = None
    """[batch, seq], int64; 0 to seq - 1 if absent."""
    documents: Tensor | None = None
    """[batch, seq], int64, index of each token's document within its sample, from 1: attention stays inside a document.
    If absent, a token attends to all earlier tokens."""
    references: Tensor | None = None
    """[batch, pairs], fp32, for preferences: log p(chosen) - log p(rejected) of the reference model for each pair of the
    sample; NaN beyond its last pair."""
    source: Tensor | None = None
    """Input of the encoder, [batch, encoder seq], int64; absent without an encoder."""
    source_lengths: Tensor | None = None
    """[batch], int64: tokens of each source; no position of encoder or decoder attends to those from there on."""


@dataclass(frozen=True)
class ForwardContext:
    """What every layer may need in one forward pass."""

    token_keys: Tensor | None = None
    """Key of each token of the full sequence for dropout masks, [batch, seq], int64; absent without dropout."""
    positions: Tensor | None = None
    """Position of each token of the full sequence, [batch, seq]; counted from 0 if absent."""
    attention_masks: Mapping[int | None, Tensor | BlockMask] = field(default_factory=dict)
    """Window -> mask that is added to the attention scores, [batch or 1, 1, seq, keys], or FlexAttention's mask; without one,
    plain causal attention."""
    rotary: RotaryTable | None = None
    """Cosines and sines of the positions of the full sequence, with rotary embeddings."""
    cached_rows: CachedRows | None = None
    """Where the tokens of this forward and earlier ones are in `caches`, in generation."""
    caches: Mapping[int, LayerCache] = field(default_factory=dict)
    """Keys and values of earlier tokens by layer, in generation."""
    added_scores: Tensor | None = None
    """In a model with an encoder: what self-attention adds to its scores, relative bias and mask, [batch or 1, heads or 1, seq,
    keys]."""
    memory: Tensor | None = None
    """Output of the encoder, [batch, encoder seq, hidden] (this rank's positions under sequence or context parallelism)."""
    memory_mask: Tensor | None = None
    """What cross-attention adds to its scores: a large negative number for padding, [batch, 1, 1, encoder seq]."""
    memory_caches: Mapping[int, MemoryCache] = field(default_factory=dict)
    """Keys and values of a decoder with cross-attention by layer, in generation."""
