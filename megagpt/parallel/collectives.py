"""Collectives of tensor, sequence and context parallelism, as autograd pairs.

Each pair is one communication in the forward and its transpose in the backward (Shoeybi et al., arXiv 1909.08053,
section 3; Korthikanti et al., arXiv 2205.05198, section 4.2.2). With group None (one rank) every function is the identity.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed these two functions and warns about each use of the old names.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


Pending = Callable[[], Tensor]
"""A collective that runs: a call waits for it and returns its result."""


def all_reduce(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the group, in place if x is contiguous. Shape in = shape out."""
    return x if group is None else start_all_reduce(x, group)()


def all_gather_sequence(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Gather the sequence ranges of all ranks. [batch, seq / ranks, hidden] -> [batch, seq, hidden]"""
    return x if group is None else start_all_gather_sequence(x, group)()


def reduce_scatter_sequence(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the group; each rank keeps its sequence range. [batch, seq, hidden] -> [batch, seq / ranks, hidden]"""
    return x if group is None else start_reduce_scatter_sequence(x, group)()


def start_all_reduce(x: Tensor, group: ProcessGroup) -> Pending:
    """Start the sum of `all_reduce`."""
    x = x.contiguous()
    work = dist.all_reduce(x, group=group, async_op=True)

    def result() -> Tensor:
        work.wait()
        return x

    return result


def start_all_gather_sequence(x: Tensor, group: ProcessGroup) -> Pending:
    """Start the exchange of `all_gather_sequence`."""
    ranks, (batch, local_seq, hidden) = group.size(), x.shape
    x = x.contiguous()
    gathered = x.new_empty(ranks * batch, local_seq, hidden)
    work = all_gather_into(gathered, x, group=group, async_op=True)

    def result() -> Tensor:
        work.wait()
        return gathered.view(ranks, batch, local_seq, hidden).transpose(0, 1).reshape(batch, ranks * local_seq, hidden)

    return result


def start_reduce_scatter_sequence(x: Tensor, group: ProcessGroup) -> Pending:
    """Start the sum of `reduce_scatter_sequence`."""
    ranks, (batch, seq, hidden) = group.size(), x.shape
    by_rank = x.view(batch, ranks, seq // ranks, hidden).transpose(0, 1).contiguous()
    out = x.new_empty(batch, seq // ranks, hidden)
    work = reduce_scatter_into(out, by_rank.view(ranks * batch, seq // ranks, hidden), group=group, async_op=True)

    def result() -> Tensor:
        work.wait()
        return out

    return result


def all_to_all(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Send slice r of the first dim to rank r; the result holds the slices of all ranks in rank order. Shape in = shape out."""
    if group is None:
        return x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_sequence(grads[0].contiguous(), ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_sequence(x.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_sequence(grads[0], ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_to_all(grads[0], ctx.group), None


def copy_to_ranks(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Forward: identity. Backward: sum of the ranks' gradients."""
    return x if group is None else _Copy.apply(x, group)


def reduce_from_ranks(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Forward: sum of the ranks' partial results. Backward: identity."""
    return x if group is None else _Reduce.apply(x, group)


def gather_sequence(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Forward: all-gather along the sequence. Backward: reduce-scatter along the sequence."""
    return x if group is None else _Gather.apply(x, group)


def reduce_scatter_to_sequence(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Forward: reduce-scatter along the sequence. Backward: all-gather along the sequence."""
    return x if group is None else _ReduceScatter.apply(x, group)


def exchange(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Forward: all-to-all over the first dim. Backward: the reverse all-to-all."""
    return x if group is None else _Exchange.apply(x, group)
