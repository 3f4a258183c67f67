"""Dropout whose masks depend on the token and the position in the model only; see `dropout_masks`.

Recomputation makes the same masks without a saved random state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.model.dropout_masks import keep_mask
from megagpt.model.forward_context import ForwardContext
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.seeding import stable_seed

QUERY_BLOCK = 256
"""Queries whose attention weights are computed at a time. Keys after the block are masked, so it does not compute them."""


class ResidualDropout(nn.Module):
    """Dropout on the residual stream, [batch, seq, hidden], or on this rank's positions."""

    def __init__(self, probability: float, parallel: ParallelContext, *site: int | str) -> None:
        """`site`: layer and position in the layer."""
        super().__init__()
        self.probability = probability
        self.site_key = stable_seed("dropout", *site)
        self.range_index = parallel.range_index

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        length, hidden = x.shape[1:]
        keys = _site_keys(ctx, self.site_key).narrow(1, self.range_index * length, length)
        columns = torch.arange(hidden, dtype=torch.int32, device=x.device)
        return x * keep_mask(keys.unsqueeze(2), columns, self.probability) * (1 / (1 - self.probability))


class AttentionDropout(nn.Module):
    """Causal attention with dropout of the attention weights.

    scaled_dot_product_attention draws its masks from the device's generator, which knows no heads and positions. So the
    weights are computed here, in memory that grows with the square of the sequence.
    """

    def __init__(self, probability: float, heads: int, parallel: ParallelContext, index: int) -> None:
        """`heads`: heads of this tensor rank, which the context ranks divide; `index`: layer number."""
        super().__init__()
        self.probability = probability
        self.site_key = stable_seed("dropout", index, "attention weights")
        self.first_head = parallel.tp_rank * heads + parallel.context.rank * (heads // parallel.context.size)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, ctx: ForwardContext) -> Tensor:
        """Attend from all positions to the earlier ones. All shapes: [batch, heads, seq, head_dim]."""
        keys = _site_keys(ctx, self.site_key)
        heads, length, head_dim = query.shape[1:]
        # A column of the mask is a pair of a head and a key position.
        head_numbers = torch.arange(self.first_head, self.first_head + heads, dtype=torch.int32, device=query.device)
        columns = head_numbers.view(heads, 1, 1) * length + torch.arange(length, dtype=torch.int32, device=query.device)
        outputs = []
        for start in range(0, length, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, length)
            scores = (query[:, :, start:stop] * head_dim**-0.5) @ key[:, :, :stop].transpose(2, 3)
            weights = F.softmax(scores + _block_mask(scores, start, ctx.attention_mask), -1)
            keep = keep_mask(keys[:, None, start:stop, None], columns[..., :stop], self.probability)
            outputs.append((weights * keep) @ value[:, :, :stop])
        return torch.cat(outputs, 2) * (1 / (1 - self.probability))


def _site_keys(ctx: ForwardContext, site_key: int) -> Tensor:
    """Return the row keys of a site, [batch, seq]. Raises ValueError if the micro-batch has no sample numbers."""
    if ctx.token_keys is None:
        raise ValueError("dropout in training needs MicroBatch.samples")
    return ctx.token_keys ^ site_key


def _block_mask(scores: Tensor, start: int, mask: Tensor | None) -> Tensor:
    """Return what is added to the scores of a block of queries, [batch, heads, queries, keys]: 0, or -inf if invisible."""
    queries, keys = scores.shape[2:]
    if mask is not None:
        return mask[:, :, start : start + queries, :keys]
    return scores.new_full((queries, keys), float("-inf")).triu_(start + 1)
