"""Convert a rank's flat range of a parameter to boxes of the full parameter.

ZeRO gives each rank a flat range of its tensor shard. A flat range of a matrix consists of at most three boxes: part of a
row, full rows, part of a row. A flat range of an n-dimensional tensor consists of at most 2n - 1 boxes. Shifted by the
shard's offset they are boxes of the full parameter, which any other layout can slice again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.parallel.parameter import Shard


@dataclass(frozen=True)
class Box:
    """A rectangular region of a tensor with one or more dims."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def full(cls, shape: tuple[int, ...]) -> "Box":
        """Return the box of an entire tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    def intersection(self, other: "Box") -> "Box | None":
        """Return the region that two boxes of one tensor share, or None if they do not overlap."""
        start = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        stop = tuple(min(a + n, b + m) for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True))
        size = tuple(b - a for a, b in zip(start, stop, strict=True))
        return Box(start, size) if min(size) > 0 else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Return the slices that select this box in a tensor that holds `outer`."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.offset, outer.offset, self.size, strict=True))


@dataclass(frozen=True)
class Piece:
    """A box of the full parameter, and the position of its values in the rank's flat range."""

    box: Box
    start: int
    """Position of the first value, counted from the start of the range; the other values follow in order."""


def boxes_of_range(shard: Shard, local_shape: tuple[int, ...], start: int, stop: int) -> list[Piece]:
    """Return the flat range [start, stop) of a rank's tensor of `local_shape` as boxes of the full parameter.

    Vocabulary padding is not part of the full parameter and is left out. Only dim 0 can be padded: on another dim the
    values of a box would not be contiguous in the range.
    """
    result = []
    for local, position in _local_boxes(local_shape, start, stop):
        offset = list(local.offset)
        if shard.dim is not None:
            offset[shard.dim] += shard.start
        size = tuple(min(n, length - first) for n, length, first in zip(local.size, shard.shape, offset, strict=True))
        if min(size) > 0:
            assert size[1:] == local.size[1:], f"{shard.name}: dim {shard.dim} is padded; only dim 0 can be"
            result.append(Piece(Box(tuple(offset), size), position))
    return result


def _local_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """Yield the flat range as boxes of the local tensor, each with its position in the range."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    position = start
    while position < stop:
        # The outermost dim along which a full slice starts here and ends within the range. Dim n - 1 always qualifies.
        dim = next(d for d, stride in enumerate(strides) if position % stride == 0 and stop - position >= stride)
        offset = tuple(position // stride % length for stride, length in zip(strides, shape, strict=True))
        count = min(shape[dim] - offset[dim], (stop - position) // strides[dim])
        box = Box(offset, (1,) * dim + (count,) + shape[dim + 1 :])
        yield box, position - start
        position += box.numel
