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

    @property
    def is_deferring(self) -> bool:
        """Whether jobs are collected for later."""
        return self._jobs is not None

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


def accumulate_scaled(parameter: nn.Parameter, gradient: Tensor, scale: Tensor) -> None:
    """Add `gradient` times a scalar to `parameter.grad`. `gradient` may be overwritten."""
    if parameter.grad is not None and parameter.grad.dtype == gradient.dtype:
        parameter.grad.addcmul_(gradient, scale)
    else:
        accumulate(parameter, gradient.mul_(scale))


def accumulate_product(parameter: nn.Parameter, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `parameter.grad`, without a temporary tensor where the product can do that.

    A parameter with more than two dims counts as a matrix whose rows are its leading dims.
    """
    if parameter.grad is not None:
        add_product(parameter.grad.flatten(0, -2), left, right)
    else:
        parameter.grad = product(left, right, gradient_dtype(parameter)).view(parameter.shape)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, without a temporary tensor where the product can do that."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _writes_fp32(left, total.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `left @ right` in `dtype`; not rounded to the dtype of the factors before, where the product can do that."""
    if _writes_fp32(left, dtype):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(dtype)


def _writes_fp32(factor: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch has a product of two such factors that accumulates and writes in fp32: on CUDA only."""
    return factor.is_cuda and factor.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32


def gradient_dtype(parameter: nn.Parameter) -> torch.dtype:
    """Return the dtype that gradients of `parameter` are accumulated in."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype
