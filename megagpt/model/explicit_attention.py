"""Causal attention whose scores exist in memory, for what scaled_dot_product_attention cannot do: see `ExplicitAttention`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.model.dropout import WeightDropout
from megagpt.model.forward_context import ForwardContext
from megagpt.model.score_bias import BIASES, KeyVectors, Sinks, ValueVectors
from megagpt.parallel.parallel_context import ParallelContext

QUERY_BLOCK = 256
"""Queries whose attention weights are computed at a time. Keys after the block are masked, so it does not compute them."""


class ExplicitAttention(nn.Module):
    """Causal attention with capped or biased scores, with sinks, or with dropout of the attention weights.

    A cap limits the products of queries and keys; what depends on their distance is added afterwards.

    scaled_dot_product_attention has no cap and no sinks, would need biases of all positions in memory, and draws its dropout
    masks from the device's generator, which knows no heads and positions. So the weights are computed here, in memory that
    grows with the square of the sequence.
    """

    def __init__(self, model: ModelConfig, scale: float, parallel: ParallelContext, index: int) -> None:
        """`scale`: factor of the scores; `index`: layer number."""
        super().__init__()
        self.scale = scale
        self.head_size = model.head_size
        self.softcap = model.attention_softcap
        name, position = f"layers.{index}.attention", model.position_embedding
        self.bias = BIASES[position](name, model, parallel) if position in BIASES else None
        has_vectors = position == "relative_vectors"
        self.key_vectors = KeyVectors(f"{name}.relative_keys", model, parallel) if has_vectors else None
        self.value_vectors = ValueVectors(f"{name}.relative_values", model, parallel) if has_vectors else None
        self.sinks = Sinks(name, model, parallel) if model.attention_sinks else None
        self.uses_distances = has_vectors or self.bias is not None
        self.always_needed = self.uses_distances or self.sinks is not None or self.softcap is not None
        self.n_head = model.n_head
        self.dropout = WeightDropout(model, parallel, index, "attention weights")

    @property
    def is_needed(self) -> bool:
        """Whether scaled_dot_product_attention would give another result now."""
        return self.always_needed or self.needs_weights

    @property
    def needs_weights(self) -> bool:
        """Whether the result depends on the attention weights other than by their products with the values."""
        return self.value_vectors is not None or self.dropout.is_active

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, ctx: ForwardContext) -> Tensor:
        """Attend to the earlier positions; the queries are the last positions of the keys.

        query: [batch, heads, queries, head size]; key and value: [batch, kv heads, keys, head size]; mask: added to the
        scores, [batch or 1, 1, queries, keys], or None for plain causal attention.
        """
        n_queries, n_keys = query.shape[2], key.shape[2]
        key, value = _for_each_query_head(key, query), _for_each_query_head(value, query)
        bias = None if self.bias is None else self.bias(n_keys, query.device)
        sinks = None if self.sinks is None else self.sinks()
        outputs = []
        for start in range(0, n_queries, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, n_queries)
            visible = n_keys - n_queries + stop
            scaled = query[:, :, start:stop] * self.scale
            scores = scaled @ key[:, :, :visible].transpose(2, 3)
            if self.softcap is not None:
                scores = torch.tanh(scores / self.softcap) * self.softcap
            distances = _distances(n_keys - n_queries + start, visible, scores) if self.uses_distances else None
            if bias is not None and distances is not None:
                # The gradient of an embedding has the same bits on every run.
                scores = scores + F.embedding(distances.clamp(min=0), bias.t()).movedim(-1, 0).to(scores.dtype)
            if self.key_vectors is not None and distances is not None:
                scores = scores + self.key_vectors(scaled, distances)
            hidden = _causal_mask(scores) if mask is None else mask[:, :, start:stop, :visible]
            weights = self.dropout(_softmax(scores + hidden, sinks), start, n_keys, ctx)
            out = weights @ value[:, :, :visible]
            outputs.append(out if self.value_vectors is None else out + self.value_vectors(weights, distances))
        return torch.cat(outputs, 2)

    def flops_per_token(self) -> int:
        """Forward FLOPs for one token of all heads, beyond those of scores and weighted values."""
        if self.key_vectors is None:
            return 0
        return 2 * 2 * (self.key_vectors.last + 1) * self.n_head * self.head_size


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the attention weights of scores [batch, heads, queries, keys]; with sinks, [heads], they sum to less than 1."""
    if sinks is None:
        return F.softmax(scores, -1)
    sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return F.softmax(torch.cat((scores, sink), -1), -1)[..., :-1]


def _distances(first: int, n_keys: int, scores: Tensor) -> Tensor:
    """Return query position minus key position, [queries, keys]; `first`: position of the first query."""
    queries = torch.arange(first, first + scores.shape[2], device=scores.device)
    return queries.unsqueeze(1) - torch.arange(n_keys, device=scores.device)


def _causal_mask(scores: Tensor) -> Tensor:
    """Return 0, or -inf for later keys, [queries, keys]; the last query sees all keys."""
    queries, keys = scores.shape[2:]
    return scores.new_full((queries, keys), float("-inf")).triu_(keys - queries + 1)


def _for_each_query_head(x: Tensor, query: Tensor) -> Tensor:
    """Repeat each key or value head for the query heads of its group. [batch, kv heads, seq, size] -> [batch, heads, ...]"""
    n_repeats = query.shape[1] // x.shape[1]
    return x if n_repeats == 1 else x.repeat_interleave(n_repeats, 1)
