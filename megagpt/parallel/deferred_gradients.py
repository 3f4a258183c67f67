"""Weight gradients that can be computed later than input gradients.

A layer that owns its backward computes its input gradient there and hands the weight gradient to a `DeferredGradients`
queue. The queue runs it immediately (full backward, B) or when the schedule says so (weight backward, W; the split of
Qi et al., arXiv 2401.10241). Nothing is computed twice, and each result is added to `parameter.grad` in place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

GradientJob = Callable[[], None]
"""Computes one weight gradient and adds it to `.grad`. Call it under `torch.no_grad()`, as a backward does."""


class DeferredGradients:
    """Runs weight-gradient jobs immediately, or collects them for later."""

    def __init__(self) -> None:
        self._jobs: list[GradientJob] | None = None

    def add(self, job: GradientJob) -> None:
        """Run `job` now, or store it inside a `deferring` block."""
        if self._jobs is None:
            job()
        else:
            self._jobs.append(job)

    @contextmanager
    def deferring(self) -> Iterator[list[GradientJob]]:
        """Collect the jobs of this block in the yielded list instead of running them."""
        jobs: list[GradientJob] = []
        self._jobs = jobs
        try:
            yield jobs
        finally:
            self._jobs = None


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add `gradient` to `parameter.grad`, in the gradient's own dtype (fp32 even if the parameter is bf16)."""
    if parameter.grad is None:
        parameter.grad = gradient.to(gradient_dtype(parameter))
    else:
        parameter.grad.add_(gradient)


def accumulate_product(parameter: nn.Parameter, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `parameter.grad`, without a temporary tensor if the dtypes allow it.

    A parameter with more than two dims counts as a matrix whose rows are its leading dims.
    """
    if parameter.grad is not None and parameter.grad.dtype == left.dtype:
        parameter.grad.flatten(0, -2).addmm_(left, right)
    else:
        accumulate(parameter, (left @ right).view(parameter.shape))


def gradient_dtype(parameter: nn.Parameter) -> torch.dtype:
    """Return the dtype that gradients of `parameter` are accumulated in."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype
