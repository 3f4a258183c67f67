"""Context parallelism: ranks share the sequences of a micro-batch, and each works on its part of the positions.

Only attention needs other positions. There an all-to-all gives every rank all positions of its share of the heads, and
another brings the result back (Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509).
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from megagpt.parallel.collectives import exchange


@dataclass(frozen=True)
class ContextParallel:
    """What a layer needs to know of the ranks that share its sequences."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    def part(self, x: Tensor) -> Tensor:
        """This rank's part of the positions. [batch, seq, ...] -> [batch, seq / ranks, ...]"""
        part = x.shape[1] // self.size
        return x.narrow(1, self.rank * part, part)

    def heads_for_sequence(self, x: Tensor) -> Tensor:
        """All heads of some positions to some heads of all positions.

        [batch, seq / ranks, heads, width] -> [batch, seq, heads / ranks, width]
        """
        if self.group is None:
            return x
        batch, part, heads, width = x.shape
        by_rank = x.view(batch, part, self.size, heads // self.size, width).movedim(2, 0)
        got = exchange(by_rank, self.group)
        return got.movedim(0, 1).reshape(batch, self.size * part, heads // self.size, width)

    def sequence_for_heads(self, x: Tensor) -> Tensor:
        """The way back. [batch, seq, heads / ranks, width] -> [batch, seq / ranks, heads, width]"""
        if self.group is None:
            return x
        batch, seq, heads, width = x.shape
        by_rank = x.view(batch, self.size, seq // self.size, heads, width).movedim(1, 0)
        got = exchange(by_rank, self.group)
        return got.movedim(0, 2).reshape(batch, seq // self.size, self.size * heads, width)
