"""Position embeddings that are added to the token embeddings. Rotary ones act in attention: see `rotary.py`."""

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.model.forward_context import ForwardContext
from megagpt.model.init_scheme import init_stds
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import replicated_parameter


class LearnedPositions(nn.Module):
    """Add one learned vector per position to [batch, seq, hidden], or to this rank's positions."""

    def __init__(self, name: str, positions: int, width: int, parallel: ParallelContext, std: float) -> None:
        super().__init__()
        self.weight = replicated_parameter(f"{name}.weight", (positions, width), parallel, std)
        self.range_index = parallel.range_index

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        length = x.shape[1]
        start = length * self.range_index
        if ctx.positions is not None:
            return x + F.embedding(ctx.positions.narrow(1, start, length), self.weight)
        # A slice, not a lookup: its gradient is a plain sum over the batch, with the same bits on every run.
        return x + self.weight.narrow(0, start, length)

    def flops_per_token(self) -> int:
        """Forward FLOPs for one token: one addition per element."""
        return self.weight.shape[1]


class NoPositions(nn.Module):
    """Add nothing: positions act in attention, or not at all."""

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return x

    def flops_per_token(self) -> int:
        """Forward FLOPs for one token."""
        return 0


def build_positions(
    name: str, model: ModelConfig, parallel: ParallelContext, n_positions: int | None = None
) -> LearnedPositions | NoPositions:
    """Return the embedding that is added to the token embeddings. `n_positions`: model.n_positions by default."""
    if model.position_embedding != "learned":
        return NoPositions()
    return LearnedPositions(name, n_positions or model.n_positions, model.n_embd, parallel, init_stds(model).embedding)
