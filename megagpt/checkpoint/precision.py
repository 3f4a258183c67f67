"""Weights of a checkpoint, which are fp32, in another dtype."""

import torch
from torch import Tensor

from megagpt.errors import CheckpointError

_BLOCK = 1 << 20
"""Number of values compared at a time."""


def to_dtype(values: Tensor, dtype: torch.dtype, label: str) -> Tensor:
    """Return `values` in `dtype`. Raises CheckpointError, with `label` in front, if a value is too large for it."""
    converted = values.to(dtype)
    too_large = _count_too_large(values, converted)
    if too_large:
        raise CheckpointError(
            f"{label}: {too_large} of {values.numel()} values are too large for {dtype}, whose largest value is "
            f"{torch.finfo(dtype).max:g}; export with another --dtype"
        )
    return converted


def _count_too_large(values: Tensor, converted: Tensor) -> int:
    """Return the number of values that were finite and are infinite after the conversion."""
    blocks = zip(values.flatten().split(_BLOCK), converted.flatten().split(_BLOCK), strict=True)
    return sum(int((after.isinf() & before.isfinite()).sum()) for before, after in blocks)
