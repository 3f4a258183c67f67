"""Flat ranges to boxes, against the plain way: number every element and look where it went."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.checkpoint.boxes import Box, pieces
from megagpt.parallel.shard import Shard


@given(st.data())
def test_the_boxes_of_any_cut_put_the_whole_together(data: st.DataObject) -> None:
    dim = data.draw(st.sampled_from([None, 0, 1]))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2 if dim == 1 else 1, max_size=2)))
    parts = data.draw(st.integers(1, 4)) if dim is not None else 1
    along = dim or 0
    if dim == 1:
        shape = (shape[0], shape[1] * parts)  # only the vocabulary, dim 0, is ever padded
    local = tuple(-(-n // parts) if d == along else n for d, n in enumerate(shape))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    padded = torch.full(tuple(n * parts if d == along else n for d, n in enumerate(local)), -1)
    padded[tuple(slice(0, n) for n in shape)] = whole
    rebuilt = torch.full(shape, -2)
    for part in range(parts):
        shard = Shard("w", shape, dim, part * local[along], 0.0, 0.0)
        flat = padded.narrow(along, part * local[along], local[along]).flatten()
        cut = data.draw(st.integers(0, len(flat)))
        for start, stop in ((0, cut), (cut, len(flat))):
            found = pieces(shard, local, start, stop)
            assert len(found) <= 3
            for piece in found:
                values = flat[start + piece.start :][: piece.box.numel].view(piece.box.size)
                rebuilt[piece.box.within(Box((0,) * len(shape), shape))] = values
    assert torch.equal(rebuilt, whole)


def test_intersection() -> None:
    assert Box((0, 2), (4, 4)).intersection(Box((2, 0), (9, 3))) == Box((2, 2), (2, 1))
    assert Box((0, 0), (2, 2)).intersection(Box((2, 0), (2, 2))) is None
