"""Learned absolute positions (GPT-2)."""

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.parallel.shard import TensorParallel, replicated_parameter


class LearnedPositions(nn.Module):
    """Adds one vector for each position to [batch, seq, hidden], or to this rank's part of the sequence."""

    def __init__(self, name: str, positions: int, width: int, tp: TensorParallel, std: float) -> None:
        super().__init__()
        self.tp = tp
        self.weight = replicated_parameter(f"{name}.weight", (positions, width), tp, std)

    def forward(self, x: Tensor, positions: Tensor | None = None, seen: int = 0) -> Tensor:
        """`positions`: of the whole sequence's tokens, [batch, seq]; without them they count from `seen`, the tokens
        before the first of x in generation."""
        part = x.shape[1]
        parts = self.tp.size if self.tp.sequence_parallel else 1
        start = seen + part * (self.tp.context.rank * parts + (self.tp.rank if parts > 1 else 0))
        if positions is not None:
            return x + F.embedding(positions.narrow(1, start, part), self.weight)
        # A narrow of the weight, not a lookup: its gradient is a plain sum over the batch, the same bits on every run.
        return x + self.weight.narrow(0, start, part)
