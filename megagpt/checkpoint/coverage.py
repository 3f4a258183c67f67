"""Check that the boxes of each tensor cover it exactly once: no value is missing, and none is saved twice."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.format import MASTER, Manifest, TensorRecord

_Span = tuple[int, int]
"""First index and end of an interval."""


def box_problems(manifest: Manifest) -> Iterator[str]:
    """Yield the first problem of each tensor whose boxes do not cover it exactly once, or that is larger than its files.

    Check it before memory for a box is allocated: a manifest can claim boxes of any size.
    """
    sound = True
    for name, record in manifest.tensors.items():
        problem = _box_problem(record, len(manifest.files))
        if problem is not None:
            sound = False
            yield f"{name}: {problem}"
    if sound:
        yield from _size_problems(manifest)


def _size_problems(manifest: Manifest) -> Iterator[str]:
    """Yield the files that are too small for the boxes that the manifest says are in them; boxes are in fp32."""
    needed = [0] * len(manifest.files)
    for record in manifest.tensors.values():
        for file, _, size in record.boxes:
            needed[file] += 4 * len(record.kinds) * math.prod(size)
    for file_record, n_bytes in zip(manifest.files, needed, strict=True):
        if n_bytes > file_record.bytes:
            yield f"{file_record.name} has {file_record.bytes} bytes, but its boxes need {n_bytes}"


def overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Return two boxes of one tensor that share elements, or None. No box may be empty."""
    if not boxes:
        return None
    if len(boxes[0].size) <= 2:
        return _overlap_by_sweep(boxes)
    return _overlap_by_splitting(boxes)


def _box_problem(record: TensorRecord, n_files: int) -> str | None:
    shape, boxes = record.shape, []
    if MASTER not in record.kinds:
        return f"its weight was not saved, only {', '.join(record.kinds) or 'nothing'}"
    if not shape:
        return f"its shape is {shape}; expected at least one dim"
    for file, offset, size in record.boxes:
        same_dims = len(offset) == len(size) == len(shape)
        if not same_dims or any(a < 0 or n < 1 or a + n > length for a, n, length in zip(offset, size, shape, strict=True)):
            return f"the box of size {size} at {offset} is not inside its shape {shape}"
        if not 0 <= file < n_files:
            return f"the box at {offset} is in file {file} of {n_files}"
        boxes.append(Box(tuple(offset), tuple(size)))
    pair = overlap(boxes)
    if pair is not None:
        texts = [f"{list(box.size)} at {list(box.offset)}" for box in pair]
        return f"its boxes of size {' and '.join(texts)} overlap"
    total = math.prod(shape)
    missing = total - sum(box.numel for box in boxes)
    return f"{missing} of {total} values are in no box; the checkpoint is incomplete" if missing else None


def _overlap_by_sweep(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Find an overlap in one or two dims.

    A line sweeps over the rows. The boxes under the line are sorted by column. They are disjoint, so a new box needs to be
    compared with its two neighbours only: n log n comparisons, where comparing all pairs needs n^2.
    """
    spans = [_row_and_column_spans(box) for box in boxes]
    # At the same row, boxes end (0) before others start (1).
    events = sorted(event for i, (rows, _) in enumerate(spans) for event in ((rows[0], 1, i), (rows[1], 0, i)))
    active: list[tuple[int, int, int]] = []  # (first column, end, box number) of the boxes under the line
    for _, starts, number in events:
        entry = (*spans[number][1], number)
        index = bisect_left(active, entry)
        if not starts:
            del active[index]
            continue
        for first, end, other in active[max(index - 1, 0) : index + 1]:
            if first < entry[1] and entry[0] < end:
                return boxes[other], boxes[number]
        insort(active, entry)
    return None


def _row_and_column_spans(box: Box) -> tuple[_Span, _Span]:
    """Return the rows and the columns of a box; a vector is a matrix with one row."""
    spans = [(start, start + length) for start, length in zip(box.offset, box.size, strict=True)]
    return (spans[0], spans[1]) if len(spans) == 2 else ((0, 1), spans[0])


def _overlap_by_splitting(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Find an overlap in any number of dims.

    Cuts along one dim after the other split the boxes into groups that cannot overlap each other. Boxes that come from
    slices and flat ranges, as all layouts write them, can be split down to single boxes, so that sorting takes most of
    the time. Only a group that no cut splits is compared pair by pair.
    """
    n_dims = len(boxes[0].size)
    pending = [(list(boxes), 0, 0)]  # (group, dim to cut along, dims tried in vain since the group was formed)
    while pending:
        group, dim, n_tried = pending.pop()
        if len(group) < 2:
            continue
        group.sort(key=lambda box: box.offset[dim])
        if n_tried == n_dims:
            pair = _overlap_by_pairs(group, dim)
            if pair is not None:
                return pair
            continue
        subgroups = _split(group, dim)
        n_tried = n_tried + 1 if len(subgroups) == 1 else 1
        pending += [(subgroup, (dim + 1) % n_dims, n_tried) for subgroup in subgroups]
    return None


def _split(boxes: list[Box], dim: int) -> list[list[Box]]:
    """Split boxes, sorted by their start in `dim`, wherever a plane across `dim` meets none of them."""
    groups: list[list[Box]] = []
    end = 0
    for box in boxes:
        start = box.offset[dim]
        if not groups or start >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, start + box.size[dim])
    return groups


def _overlap_by_pairs(boxes: list[Box], dim: int) -> tuple[Box, Box] | None:
    """Compare each box with the later ones that start before its end; `boxes` are sorted by their start in `dim`."""
    for first, box in enumerate(boxes):
        end = box.offset[dim] + box.size[dim]
        for second in range(first + 1, len(boxes)):
            if boxes[second].offset[dim] >= end:
                break
            if box.intersection(boxes[second]) is not None:
                return box, boxes[second]
    return None
