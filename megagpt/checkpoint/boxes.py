"""Where a rank's flat piece of a parameter lies in the whole: the arithmetic behind checkpoints of no layout.

ZeRO gives a rank a flat range of its tensor shard. A flat range of a matrix is at most three boxes (part of a row,
whole rows, part of a row); moved by the shard's offset they are boxes of the logical parameter, which any other
layout can cut anew.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.parallel.shard import Shard


@dataclass(frozen=True)
class Box:
    """A rectangular part of a logical tensor."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        total = 1
        for length in self.size:
            total *= length
        return total

    def intersection(self, other: "Box") -> "Box | None":
        """What two boxes of one tensor share."""
        start = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        stop = tuple(min(a + n, b + m) for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True))
        size = tuple(b - a for a, b in zip(start, stop, strict=True))
        return Box(start, size) if min(size) > 0 else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """The slices of a tensor that holds `outer` which give this box."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.offset, outer.offset, self.size, strict=True))


@dataclass(frozen=True)
class Piece:
    """A box of the logical tensor, and where its values stand in the rank's flat range."""

    box: Box
    start: int
    """First element, counted from the start of the range; the box's values follow in order."""


def pieces(shard: Shard, local_shape: tuple[int, ...], start: int, stop: int) -> list[Piece]:
    """The flat range [start, stop) of a rank's tensor of `local_shape` as boxes of the logical parameter.

    Padding rows of the vocabulary belong to no logical parameter and are left out.
    """
    found = []
    for local, position in _rows(local_shape, start, stop):
        offset, size = list(local.offset), list(local.size)
        if shard.dim is not None:
            offset[shard.dim] += shard.start
        size = [min(length, whole - begin) for length, whole, begin in zip(size, shard.shape, offset, strict=True)]
        if min(size) > 0:
            found.append(Piece(Box(tuple(offset), tuple(size)), position))
    return found


def _rows(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """The range as boxes of the local tensor, each with its position in the range."""
    if len(shape) == 1:
        yield Box((start,), (stop - start,)), 0
        return
    width, position = shape[1], start
    while position < stop:
        row, column = divmod(position, width)
        if column or stop - position < width:
            box = Box((row, column), (1, min(width - column, stop - position)))
        else:
            box = Box((row, 0), ((stop - position) // width, width))
        yield box, position - start
        position += box.numel
