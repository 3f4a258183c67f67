"""Flat ranges converted to boxes, compared with numbering every element and checking where it ends up."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.checkpoint.boxes import Box, boxes_of_range
from megagpt.parallel.parameter import Shard


@given(st.data())
def test_boxes_of_all_ranks_rebuild_a_tensor_of_any_number_of_dims(data: st.DataObject) -> None:
    n_dims = data.draw(st.integers(1, 4))
    dim = data.draw(st.sampled_from([None, *range(n_dims)]))
    shape = tuple(data.draw(st.lists(st.integers(1, 9 if n_dims < 3 else 4), min_size=n_dims, max_size=n_dims)))
    n_shards = data.draw(st.integers(1, 4)) if dim is not None else 1
    split_dim = dim or 0
    if split_dim > 0:  # only the vocabulary, dim 0, is ever padded
        shape = tuple(n * n_shards if d == split_dim else n for d, n in enumerate(shape))
    local = tuple(-(-n // n_shards) if d == split_dim else n for d, n in enumerate(shape))
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    padded = torch.full(tuple(n * n_shards if d == split_dim else n for d, n in enumerate(local)), -1)
    padded[tuple(slice(0, n) for n in shape)] = full
    rebuilt = torch.full(shape, -2)
    for number in range(n_shards):
        shard = Shard("w", shape, dim, number * local[split_dim], 0.0, 0.0)
        flat = padded.narrow(split_dim, number * local[split_dim], local[split_dim]).flatten()
        cut = data.draw(st.integers(0, len(flat)))
        for start, stop in ((0, cut), (cut, len(flat))):
            pieces = boxes_of_range(shard, local, start, stop)
            assert len(pieces) <= 2 * n_dims - 1
            for piece in pieces:
                values = flat[start + piece.start :][: piece.box.numel].view(piece.box.size)
                rebuilt[piece.box.within(Box.full(shape))] = values
    assert torch.equal(rebuilt, full)


@given(st.data())
def test_boxes_of_a_range_contain_exactly_its_elements_once(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    n_elements = math.prod(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, n_elements), st.integers(0, n_elements))))
    count = torch.zeros(shape, dtype=torch.int64)
    position = 0
    for piece in boxes_of_range(Shard("w", shape, None, 0, 0.0, 0.0), shape, start, stop):
        assert piece.start == position
        position += piece.box.numel
        count[piece.box.within(Box.full(shape))] += 1
    expected = torch.zeros(n_elements, dtype=torch.int64)
    expected[start:stop] = 1
    assert torch.equal(count.flatten(), expected)


@pytest.mark.parametrize(
    ("shape", "start", "stop", "boxes"),
    [
        ((10,), 2, 7, [((2,), (5,))]),
        ((4, 5), 3, 17, [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]),
        ((4, 5), 5, 15, [((1, 0), (2, 5))]),
        (
            (3, 4, 5),
            7,
            53,
            [
                ((0, 1, 2), (1, 1, 3)),
                ((0, 2, 0), (1, 2, 5)),
                ((1, 0, 0), (1, 4, 5)),
                ((2, 0, 0), (1, 2, 5)),
                ((2, 2, 0), (1, 1, 3)),
            ],
        ),
    ],
)
def test_a_range_is_split_into_the_largest_boxes(
    shape: tuple[int, ...], start: int, stop: int, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    pieces = boxes_of_range(Shard("w", shape, None, 0, 0.0, 0.0), shape, start, stop)
    assert [(piece.box.offset, piece.box.size) for piece in pieces] == boxes


def test_padding_of_another_dim_than_the_first_is_refused() -> None:
    with pytest.raises(AssertionError, match="w: dim 1 is padded; only dim 0 can be"):
        boxes_of_range(Shard("w", (4, 5), 1, 3, 0.0, 0.0), (4, 3), 0, 12)


def test_the_intersection_of_two_boxes_is_what_both_contain() -> None:
    assert Box((0, 2), (4, 4)).intersection(Box((2, 0), (9, 3))) == Box((2, 2), (2, 1))
    assert Box((0, 0), (2, 2)).intersection(Box((2, 0), (2, 2))) is None
    assert Box((0, 0, 1), (2, 2, 2)).intersection(Box((1, 0, 0), (2, 1, 2))) == Box((1, 0, 1), (1, 1, 1))
