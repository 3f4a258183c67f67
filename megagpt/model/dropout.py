"""Dropout whose masks depend on the micro-batch and the position in the model, not on earlier random draws.

Each use seeds the generator first, so a second forward (recomputation) draws the same mask without a saved random state.
"""

import torch
from torch import Tensor, nn

from megagpt.model.forward_context import ForwardContext
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.seeding import seed_dropout


class ResidualDropout(nn.Module):
    """Dropout on the residual stream, [batch, seq, hidden].

    Tensor ranks draw the same mask if each holds the full sequence, and different masks under sequence parallelism.
    """

    def __init__(self, probability: float, parallel: ParallelContext, *site: int | str) -> None:
        """`site`: layer and position in the layer, part of the seed."""
        super().__init__()
        self.probability = probability
        self.site = site
        self.ranks = (parallel.tp_rank if parallel.sequence_parallel else 0, parallel.context.rank)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        seed_dropout(x.device, ctx.seed, *self.site, *self.ranks)
        # Not F.dropout: on a CPU it saves the mask in the dtype of x; this one saves one byte per element.
        return torch.native_dropout(x, self.probability, True)[0]


class AttentionDropout(nn.Module):
    """Dropout of the attention weights, which scaled_dot_product_attention applies itself."""

    def __init__(self, probability: float, parallel: ParallelContext, index: int) -> None:
        """`index`: layer number. Every rank holds different heads, so each draws different masks."""
        super().__init__()
        self.probability = probability
        self.site = (index, "attention", parallel.tp_rank, parallel.context.rank)

    def prepare(self, device: torch.device, ctx: ForwardContext) -> float:
        """Seed the generator and return the dropout probability; 0 outside of training."""
        if not self.training or self.probability == 0:
            return 0.0
        seed_dropout(device, ctx.seed, *self.site)
        return self.probability
