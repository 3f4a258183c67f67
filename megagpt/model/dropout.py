"""Dropout whose masks depend on the token and the position in the model only; see `dropout_masks`.

Recomputation makes the same masks without a saved random state.
"""

import torch
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.model.dropout_masks import keep_mask
from megagpt.model.forward_context import ForwardContext
from megagpt.model.fused import Branch, drop
from megagpt.model.score_bias import own_heads
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.seeding import stable_seed


class ResidualDropout(nn.Module):
    """Dropout on the residual stream, [batch, seq, hidden], or on this rank's positions."""

    def __init__(self, probability: float, parallel: ParallelContext, *site: int | str) -> None:
        """`site`: layer and position in the layer."""
        super().__init__()
        self.probability = probability
        self.site_key = stable_seed("dropout", *site)
        self.range_index = parallel.range_index

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return drop(x, self.keys(ctx, x.shape[1]), self.probability)

    def branch(self, x: Tensor, bias: nn.Parameter | None, ctx: ForwardContext) -> Branch:
        """Return the residual branch x + bias, [batch, seq, hidden], with this dropout."""
        return Branch(x, bias, self.keys(ctx, x.shape[1]), self.probability)

    def keys(self, ctx: ForwardContext, length: int) -> Tensor | None:
        """Return the keys of the masks of this rank's `length` positions, [batch, seq]; None if nothing is dropped."""
        if not self.training or self.probability == 0:
            return None
        return site_keys(ctx, self.site_key).narrow(1, self.range_index * length, length)


class ChannelDropout(nn.Module):
    """Dropout of channels that are split over the tensor ranks, [batch, seq, channels / ranks], of all positions of a context
    rank."""

    def __init__(self, probability: float, channels: int, parallel: ParallelContext, *site: int | str) -> None:
        """`channels`: of all tensor ranks; `site`: layer and position in the layer."""
        super().__init__()
        self.probability = probability
        self.first = parallel.tp_rank * (channels // parallel.tp_size)
        self.site_key = stable_seed("dropout", *site)
        self.context_rank = parallel.context.rank

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        keys = site_keys(ctx, self.site_key).narrow(1, self.context_rank * x.shape[1], x.shape[1])
        return drop(x, keys, self.probability, self.first)


class WeightDropout(nn.Module):
    """Dropout of attention weights, [batch, heads, queries, keys]."""

    def __init__(self, model: ModelConfig, parallel: ParallelContext, *site: int | str) -> None:
        """`site`: layer and position in the layer."""
        super().__init__()
        self.probability = model.attn_pdrop
        self.site_key = stable_seed("dropout", *site)
        self.first_head = own_heads(model, parallel).start

    @property
    def is_active(self) -> bool:
        """Whether something is dropped now."""
        return self.training and self.probability > 0

    def forward(self, weights: Tensor, start: int, n_keys: int, ctx: ForwardContext) -> Tensor:
        """Drop weights of the queries from `start` on; `n_keys`: keys of the full sequence."""
        if not self.is_active:
            return weights
        heads, queries, keys = weights.shape[1:]
        # A column of the mask is a pair of a head and a key position.
        head_numbers = torch.arange(self.first_head, self.first_head + heads, dtype=torch.int32, device=weights.device)
        columns = head_numbers.view(heads, 1, 1) * n_keys + torch.arange(keys, dtype=torch.int32, device=weights.device)
        rows = site_keys(ctx, self.site_key)[:, None, start : start + queries, None]
        return weights * keep_mask(rows, columns, self.probability) * (1 / (1 - self.probability))


def site_keys(ctx: ForwardContext, site_key: int) -> Tensor:
    """Return the row keys of a site, [batch, seq]. Raises ValueError if the micro-batch has no sample numbers."""
    if ctx.token_keys is None:
        raise ValueError("dropout in training needs MicroBatch.samples")
    return ctx.token_keys ^ site_key
