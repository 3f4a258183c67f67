"""Causal attention whose scores exist in memory, for what scaled_dot_product_attention cannot do: see `ExplicitAttention`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.model.dropout import site_keys
from megagpt.model.dropout_masks import keep_mask
from megagpt.model.forward_context import ForwardContext
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.seeding import stable_seed

QUERY_BLOCK = 256
"""Queries whose attention weights are computed at a time. Keys after the block are masked, so it does not compute them."""


class ExplicitAttention(nn.Module):
    """Causal attention with capped scores or with dropout of the attention weights.

    scaled_dot_product_attention has no cap, and draws its dropout masks from the device's generator, which knows no heads
    and positions. So the weights are computed here, in memory that grows with the square of the sequence.
    """

    def __init__(self, model: ModelConfig, scale: float, parallel: ParallelContext, index: int) -> None:
        """`scale`: factor of the scores; `index`: layer number."""
        super().__init__()
        self.scale = scale
        self.softcap = model.attention_softcap
        self.probability = model.attn_pdrop
        self.site_key = stable_seed("dropout", index, "attention weights")
        heads = model.n_head // parallel.tp_size  # of this tensor rank; the context ranks divide them
        self.first_head = parallel.tp_rank * heads + parallel.context.rank * (heads // parallel.context.size)

    @property
    def is_needed(self) -> bool:
        """Whether scaled_dot_product_attention would give another result now."""
        return self.softcap is not None or (self.training and self.probability > 0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, ctx: ForwardContext) -> Tensor:
        """Attend to the earlier positions; the queries are the last positions of the keys.

        query: [batch, heads, queries, head size]; key and value: [batch, kv heads, keys, head size]; mask: added to the
        scores, [batch or 1, 1, queries, keys], or None for plain causal attention.
        """
        n_queries, n_keys = query.shape[2], key.shape[2]
        key, value = _for_each_query_head(key, query), _for_each_query_head(value, query)
        outputs = []
        for start in range(0, n_queries, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, n_queries)
            visible = n_keys - n_queries + stop
            scores = (query[:, :, start:stop] * self.scale) @ key[:, :, :visible].transpose(2, 3)
            if self.softcap is not None:
                scores = torch.tanh(scores / self.softcap) * self.softcap
            hidden = _causal_mask(scores) if mask is None else mask[:, :, start:stop, :visible]
            weights = self._drop(F.softmax(scores + hidden, -1), start, n_keys, ctx)
            outputs.append(weights @ value[:, :, :visible])
        return torch.cat(outputs, 2)

    def _drop(self, weights: Tensor, start: int, n_keys: int, ctx: ForwardContext) -> Tensor:
        """Drop weights [batch, heads, queries, keys] of the queries from `start` on."""
        if not self.training or self.probability == 0:
            return weights
        heads, queries, keys = weights.shape[1:]
        # A column of the mask is a pair of a head and a key position.
        head_numbers = torch.arange(self.first_head, self.first_head + heads, dtype=torch.int32, device=weights.device)
        columns = head_numbers.view(heads, 1, 1) * n_keys + torch.arange(keys, dtype=torch.int32, device=weights.device)
        rows = site_keys(ctx, self.site_key)[:, None, start : start + queries, None]
        return weights * keep_mask(rows, columns, self.probability) * (1 / (1 - self.probability))


def _causal_mask(scores: Tensor) -> Tensor:
    """Return 0, or -inf for later keys, [queries, keys]; the last query sees all keys."""
    queries, keys = scores.shape[2:]
    return scores.new_full((queries, keys), float("-inf")).triu_(keys - queries + 1)


def _for_each_query_head(x: Tensor, query: Tensor) -> Tensor:
    """Repeat each key or value head for the query heads of its group. [batch, kv heads, seq, size] -> [batch, heads, ...]"""
    n_repeats = query.shape[1] // x.shape[1]
    return x if n_repeats == 1 else x.repeat_interleave(n_repeats, 1)
