"""Examples of different lengths packed into samples of one length: best-fit decreasing, a heuristic for bin packing.

The longest examples come first, and each goes into the sample with the least free space that it fits in. No example is
divided (Ding et al., arXiv 2404.10830).
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Packing(NamedTuple):
    """Which examples a sample holds."""

    examples: npt.NDArray[np.int64]
    """Indices of the examples, sample by sample."""
    ends: npt.NDArray[np.int64]
    """Number of examples up to and including each sample."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.ends)

    def of_sample(self, sample: int) -> npt.NDArray[np.int64]:
        """Return the examples of a sample."""
        return self.examples[self.ends[sample - 1] if sample else 0 : self.ends[sample]]


def pack(lengths: npt.NDArray[np.int64], capacity: int) -> Packing:
    """Pack examples of `lengths` tokens into samples of `capacity` tokens; those that are longer are left out.

    The result depends on the arguments only.
    """
    by_length = np.argsort(-lengths, kind="stable")
    by_length = by_length[lengths[by_length] <= capacity]
    spaces: list[int] = []  # free spaces of started samples, ascending, each once
    with_space: dict[int, list[int]] = {}
    sample_of = np.empty(len(by_length), np.int64)
    n_samples = 0
    for position, length in enumerate(lengths[by_length].tolist()):
        found = bisect_left(spaces, length)
        if found == len(spaces):
            sample, space = n_samples, capacity
            n_samples += 1
        else:
            space = spaces[found]
            sample = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[found]
        sample_of[position] = sample
        space -= length
        if space > 0:
            if space not in with_space:
                insort(spaces, space)
            with_space.setdefault(space, []).append(sample)
    by_sample = np.argsort(sample_of, kind="stable")
    return Packing(by_length[by_sample], np.cumsum(np.bincount(sample_of, minlength=n_samples)))
