"""Overlap and coverage of boxes, compared with counting elements and with comparing all pairs."""

import math
import random
import time
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megagpt.checkpoint.boxes import Box, boxes_of_range
from megagpt.checkpoint.coverage import box_problems, overlap
from megagpt.checkpoint.format import FileRecord, Manifest, TensorRecord
from megagpt.parallel.parameter import Shard

PINWHEEL = [Box((0, 0), (1, 2)), Box((0, 2), (2, 1)), Box((2, 1), (1, 2)), Box((1, 0), (2, 1)), Box((1, 1), (1, 1))]
"""Five boxes that tile a 3 x 3 matrix and that no cut separates."""


@st.composite
def small_boxes(draw: st.DrawFn) -> list[Box]:
    """Random boxes of one tensor with 1 to 4 dims."""
    n_dims = draw(st.integers(1, 4))
    side = st.tuples(st.integers(0, 12 if n_dims < 3 else 5), st.integers(1, 4))
    drawn = draw(st.lists(st.lists(side, min_size=n_dims, max_size=n_dims), max_size=12))
    return [Box(tuple(a for a, _ in sides), tuple(n for _, n in sides)) for sides in drawn]


def layout_boxes(shape: tuple[int, ...], dim: int, n_shards: int, n_ranges: int) -> list[Box]:
    """The boxes of a tensor that `n_shards` tensor ranks split along `dim`, and ZeRO ranks then in flat ranges."""
    local = tuple(n // n_shards if d == dim else n for d, n in enumerate(shape))
    n_elements = math.prod(local)
    edges = [n_elements * i // n_ranges for i in range(n_ranges + 1)]
    return [
        piece.box
        for number in range(n_shards)
        for start, stop in pairwise(edges)
        for piece in boxes_of_range(Shard("w", shape, dim, number * local[dim], 0.0, 0.0), local, start, stop)
    ]


def count_elements(boxes: list[Box], shape: tuple[int, ...]) -> np.ndarray:
    """How many boxes contain each element."""
    count = np.zeros(shape, int)
    for box in boxes:
        count[box.within(Box.full(shape))] += 1
    return count


def problems(boxes: list[Box], shape: tuple[int, ...], n_bytes: int = 2**62) -> list[str]:
    """The problems of a manifest with one tensor, in a file of `n_bytes`."""
    file = FileRecord(name="rank_00000.safetensors", bytes=n_bytes, sha256="", node="n")
    record = TensorRecord(shape=list(shape), kinds=["master"], boxes=[(0, list(box.offset), list(box.size)) for box in boxes])
    return list(box_problems(Manifest(step=0, config={}, state={}, tensors={"w": record}, files=[file])))


@settings(max_examples=800, deadline=None)
@given(small_boxes())
@example([Box((0, *box.offset), (3, *box.size)) for box in PINWHEEL])
@example([Box((0, *box.offset), (3, *box.size)) for box in PINWHEEL] + [Box((2, 2, 1), (2, 1, 1))])
def test_an_overlap_is_found_exactly_if_comparing_all_pairs_finds_one(drawn: list[Box]) -> None:
    expected = any(a.intersection(b) is not None for a, b in combinations(drawn, 2))
    pair = overlap(drawn)
    assert (pair is not None) == expected
    if pair is not None:
        assert pair[0].intersection(pair[1]) is not None


@settings(deadline=None)
@given(st.data())
def test_boxes_of_a_layout_pass_and_a_changed_box_does_not(data: st.DataObject) -> None:
    n_dims = data.draw(st.integers(1, 4))
    dim = data.draw(st.integers(0, n_dims - 1))
    n_shards = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.integers(1, 4)) * (n_shards if d == dim else 1) for d in range(n_dims))
    boxes = layout_boxes(shape, dim, n_shards, data.draw(st.integers(1, 5)))
    assert (count_elements(boxes, shape) == 1).all()
    assert problems(boxes, shape) == []
    changed = data.draw(st.integers(0, len(boxes) - 1))
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    boxes[changed] = Box(offset, tuple(data.draw(st.integers(1, n - a)) for a, n in zip(offset, shape, strict=True)))
    count = count_elements(boxes, shape)
    result = problems(boxes, shape)
    assert (result == []) == (count == 1).all()
    if (count > 1).any():
        assert "overlap" in result[0]
    elif (count == 0).any():
        assert f"w: {(count == 0).sum()} of {count.size} values are in no box" in result[0]


@pytest.mark.parametrize(
    ("boxes", "shape", "problem"),
    [
        ([Box((), ())], (), "w: its shape is []; expected at least one dim"),
        ([Box((0, 0), (2, 2))], (2, 2, 2), "is not inside its shape"),
        ([Box((0, 0, 0), (2, 2, 3))], (2, 2, 2), "is not inside its shape"),
        ([Box((0, 0, 0), (2, 2, 1))], (2, 2, 2), "w: 4 of 8 values are in no box"),
        ([Box((0, 0, 0), (2, 2, 2)), Box((1, 1, 1), (1, 1, 1))], (2, 2, 2), "its boxes of size [2, 2, 2] at [0, 0, 0] and"),
    ],
)
def test_a_problem_is_named_with_the_tensor(boxes: list[Box], shape: tuple[int, ...], problem: str) -> None:
    [text] = problems(boxes, shape)
    assert problem in text


@pytest.mark.parametrize("shape", [(4096, 4096), (64, 512, 512)])
def test_the_boxes_of_many_ranks_are_checked_in_seconds(shape: tuple[int, ...]) -> None:
    """8 tensor ranks x 1024 ZeRO ranks; comparing all pairs of the 3-D tensor's 24,000 boxes would take minutes."""
    boxes = layout_boxes(shape, len(shape) - 1, 8, 1021)
    assert len(boxes) > 20_000
    random.Random(0).shuffle(boxes)
    start = time.monotonic()
    assert overlap(boxes) is None
    assert overlap([*boxes, Box(tuple(n - 1 for n in shape), (1,) * len(shape))]) is not None
    assert time.monotonic() - start < 20


def test_a_grid_of_equal_cubes_does_not_overlap_until_one_is_larger() -> None:
    cubes = [Box((3 * a, 3 * b, 3 * c), (3, 3, 3)) for a, b, c in product(range(6), repeat=3)]
    assert overlap(cubes) is None
    cubes[50] = Box(cubes[50].offset, (3, 3, 4))
    pair = overlap(cubes)
    assert pair is not None and cubes[50] in pair


def test_boxes_that_do_not_fit_in_their_file_are_a_problem() -> None:
    boxes = [Box((0, 0), (3, 5)), Box((3, 0), (2, 5))]
    assert problems(boxes, (5, 5), n_bytes=4 * 25) == []
    assert problems(boxes, (5, 5), n_bytes=4 * 25 - 1) == ["rank_00000.safetensors has 99 bytes, but its boxes need 100"]
