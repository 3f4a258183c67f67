"""Weight gradients that can wait.

A layer that owns its backward computes the gradient of its input there, and hands the work for its weight's
gradient to a `WeightGradients`: done at once in a whole backward (B), or parked until the schedule says W
(the split of Qi et al., arXiv 2401.10241). Either way nothing runs twice and the sum goes straight into
`parameter.grad`, without a temporary for every micro-batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Job = Callable[[], None]


class WeightGradients:
    """Runs weight-gradient work as it comes, or parks it for later."""

    def __init__(self) -> None:
        self._parking: list[Job] | None = None

    def add(self, job: Job) -> None:
        """Do the work, now or later as the schedule has it."""
        if self._parking is None:
            job()
        else:
            self._parking.append(job)

    @contextmanager
    def parked(self) -> Iterator[list[Job]]:
        """Within this block work is not done but collected in the list that it yields."""
        jobs: list[Job] = []
        self._parking = jobs
        try:
            yield jobs
        finally:
            self._parking = None


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """`parameter.grad += gradient`, in the gradient's own type (fp32 even where the parameter is bf16)."""
    if parameter.grad is None:
        parameter.grad = gradient.to(gradient_dtype(parameter))
    else:
        parameter.grad.add_(gradient)


def accumulate_product(parameter: nn.Parameter, left: Tensor, right: Tensor) -> None:
    """`parameter.grad += left @ right`, without a temporary where the types allow."""
    if parameter.grad is not None and parameter.grad.dtype == left.dtype:
        parameter.grad.addmm_(left, right)
    else:
        accumulate(parameter, left @ right)


def gradient_dtype(parameter: nn.Parameter) -> torch.dtype:
    """The type that gradients are summed in."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype
