"""Context parallelism: ranks share each sequence, and every rank processes one range of its positions.

Only attention needs all positions. There an all-to-all gives each rank all positions of some of the heads, and a second
all-to-all reverses it (DeepSpeed Ulysses, Jacobs et al., arXiv 2309.14509).
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from megagpt.parallel.collectives import exchange


@dataclass(frozen=True)
class ContextParallel:
    """This rank's place among the ranks that share its sequences. The default is a single rank."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    def local_positions(self, x: Tensor) -> Tensor:
        """Return this rank's range of positions. [batch, seq, ...] -> [batch, seq / size, ...]"""
        length = x.shape[1] // self.size
        return x.narrow(1, self.rank * length, length)

    def heads_for_sequence(self, x: Tensor) -> Tensor:
        """Exchange all heads of some positions for some heads of all positions.

        [batch, seq / size, heads, width] -> [batch, seq, heads / size, width]
        """
        if self.group is None:
            return x
        batch, local_seq, heads, width = x.shape
        by_rank = x.view(batch, local_seq, self.size, heads // self.size, width).movedim(2, 0)
        exchanged = exchange(by_rank, self.group)
        return exchanged.movedim(0, 1).reshape(batch, self.size * local_seq, heads // self.size, width)

    def sequence_for_heads(self, x: Tensor) -> Tensor:
        """Reverse `heads_for_sequence`. [batch, seq, heads / size, width] -> [batch, seq / size, heads, width]"""
        if self.group is None:
            return x
        batch, seq, heads, width = x.shape
        by_rank = x.view(batch, self.size, seq // self.size, heads, width).movedim(1, 0)
        exchanged = exchange(by_rank, self.group)
        return exchanged.movedim(0, 2).reshape(batch, seq // self.size, self.size * heads, width)
