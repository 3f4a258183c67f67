"""Whether the boxes of a tensor cover it exactly once: no value missing, none written twice."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.format import MASTER, Manifest, TensorRecord


def box_problems(manifest: Manifest) -> Iterator[str]:
    """For each tensor whose boxes do not cover it exactly once, what is wrong with them first."""
    for name, record in manifest.tensors.items():
        problem = _box_problem(record, len(manifest.files))
        if problem is not None:
            yield f"{name}: {problem}"


def overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes of a vector or matrix that share elements; None where there are none. None of them may be empty.

    A line sweeps over the rows and holds the boxes that it cuts, in the order of their columns: as those are disjoint,
    a new one need be compared with its two neighbours alone, n log n comparisons where all pairs would be n^2.
    """
    spans = [_rows_and_columns(box) for box in boxes]
    # At one row boxes end (0) before others begin (1).
    events = sorted(event for i, (rows, _) in enumerate(spans) for event in ((rows[0], 1, i), (rows[1], 0, i)))
    cut: list[tuple[int, int, int]] = []
    """(first column, end, number) of the boxes under the line."""
    for _, begins, number in events:
        entry = (*spans[number][1], number)
        at = bisect_left(cut, entry)
        if not begins:
            del cut[at]
            continue
        for first, end, other in cut[max(at - 1, 0) : at + 1]:
            if first < entry[1] and entry[0] < end:
                return boxes[other], boxes[number]
        insort(cut, entry)
    return None


def _box_problem(record: TensorRecord, n_files: int) -> str | None:
    shape, boxes = record.shape, []
    if MASTER not in record.kinds:
        return f"its weight was not kept, only {', '.join(record.kinds) or 'nothing'}"
    if len(shape) not in (1, 2):
        return f"its shape is {shape}; expected a vector or a matrix"
    for file, offset, size in record.boxes:
        dims_agree = len(offset) == len(size) == len(shape)
        if not dims_agree or any(a < 0 or n < 1 or a + n > whole for a, n, whole in zip(offset, size, shape, strict=True)):
            return f"the box of size {size} at {offset} is not inside its shape {shape}"
        if not 0 <= file < n_files:
            return f"the box at {offset} is in file {file} of {n_files}"
        boxes.append(Box(tuple(offset), tuple(size)))
    shared = overlap(boxes)
    if shared is not None:
        texts = [f"{list(box.size)} at {list(box.offset)}" for box in shared]
        return f"its boxes of size {' and '.join(texts)} overlap"
    missing = math.prod(shape) - sum(box.numel for box in boxes)
    return f"{missing} of {math.prod(shape)} values are in no box; the checkpoint is not whole" if missing else None


def _rows_and_columns(box: Box) -> tuple[tuple[int, int], tuple[int, int]]:
    """[first, end) of each; a vector is a matrix of one row."""
    spans = [(start, start + length) for start, length in zip(box.offset, box.size, strict=True)]
    return (spans[0], spans[1]) if len(spans) == 2 else ((0, 1), spans[0])
