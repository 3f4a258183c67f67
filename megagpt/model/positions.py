"""Learned absolute positions (GPT-2)."""

from torch import Tensor, nn

from megagpt.parallel.shard import TensorParallel, replicated_parameter


class LearnedPositions(nn.Module):
    """Adds one vector for each position to [batch, seq, hidden], or to this rank's part of the sequence."""

    def __init__(self, name: str, positions: int, width: int, tp: TensorParallel, std: float) -> None:
        super().__init__()
        self.tp = tp
        self.weight = replicated_parameter(f"{name}.weight", (positions, width), tp, std)

    def forward(self, x: Tensor, seen: int = 0) -> Tensor:
        """`seen`: tokens before the first of x, in generation."""
        part = x.shape[1]
        start = seen + (self.tp.rank * part if self.tp.sequence_parallel else 0)
        # A narrow of the weight, not a lookup: its gradient is a plain sum over the batch, the same bits on every run.
        return x + self.weight.narrow(0, start, part)
