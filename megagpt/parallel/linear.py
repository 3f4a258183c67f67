"""Linear layers split over tensor ranks, which own their backward (Shoeybi et al., arXiv 1909.08053, sec. 3)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt.parallel.collectives import (
    all_gather_sequence,
    copy_to_ranks,
    reduce_from_ranks,
    reduce_scatter_sequence,
    reduce_scatter_to_sequence,
)
from megagpt.parallel.shard import TensorParallel, replicated_parameter, sharded_parameter
from megagpt.parallel.weight_gradients import WeightGradients, accumulate, accumulate_product


class _Linear(torch.autograd.Function):
    """y = x W^T + b, whose weight gradient is work for `WeightGradients`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, later: WeightGradients) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)  # a frozen weight has no use for it
        ctx.weight, ctx.bias, ctx.later = weight, bias, later
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        grad, (x,) = grads[0].detach(), ctx.saved_tensors
        grad_x = grad @ ctx.weight if ctx.needs_input_grad[0] else None
        _later(ctx, grad, lambda: x)
        return grad_x, None, None, None


class _GatheredLinear(torch.autograd.Function):
    """As `_Linear` on the ranks' parts of the sequence together, of which each rank keeps its own alone.

    The others' are gathered again for the weight gradient (Korthikanti et al., arXiv 2205.05198, section 4.2.2).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, later: WeightGradients, group: ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.weight, ctx.bias, ctx.later, ctx.group = weight, bias, later, group
        return F.linear(all_gather_sequence(x, group), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        grad, (x,), group = grads[0].detach(), ctx.saved_tensors, ctx.group
        grad_x = reduce_scatter_sequence(grad @ ctx.weight, group) if ctx.needs_input_grad[0] else None
        _later(ctx, grad, lambda: all_gather_sequence(x, group))
        return grad_x, None, None, None, None


def _later(ctx: Any, grad: Tensor, whole_input: Callable[[], Tensor]) -> None:
    """Hand over the work for the gradients of the weight and the bias, of what is not frozen."""
    weight, bias = ctx.weight, ctx.bias
    bias_trains = bias is not None and bias.requires_grad

    def job() -> None:
        if weight.requires_grad:
            accumulate_product(weight, grad.flatten(0, -2).t(), whole_input().detach().flatten(0, -2))
        if bias_trains:
            accumulate(bias, grad.flatten(0, -2).sum(0))

    if weight.requires_grad or bias_trains:
        ctx.later.add(job)


def linear(x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, later: WeightGradients) -> Tensor:
    """x W^T + b. [..., in] -> [..., out]; the gradients of W and b are handed to `later`."""
    return _Linear.apply(x, weight, bias, later)


class ColumnParallelLinear(nn.Module):
    """Each tensor rank computes a slice of the outputs.

    Input: replicated [batch, seq, in], or this rank's [batch, seq / ranks, in] under sequence parallelism.
    Output: [batch, seq, out / ranks].
    """

    def __init__(self, name: str, n_in: int, n_out: int, tp: TensorParallel, std: float) -> None:
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter(f"{name}.weight", (n_out, n_in), 0, tp, std)
        self.bias = sharded_parameter(f"{name}.bias", (n_out,), 0, tp, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        tp = self.tp
        if tp.sequence_parallel and tp.group is not None:
            return _GatheredLinear.apply(x, self.weight, self.bias, tp.weight_gradients, tp.group)
        return linear(copy_to_ranks(x, tp.group), self.weight, self.bias, tp.weight_gradients)


class RowParallelLinear(nn.Module):
    """Each tensor rank takes a slice of the inputs; the partial results are summed.

    Input: [batch, seq, in / ranks]. Output: replicated [batch, seq, out], or this rank's [batch, seq / ranks, out]
    under sequence parallelism.
    """

    def __init__(self, name: str, n_in: int, n_out: int, tp: TensorParallel, std: float) -> None:
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter(f"{name}.weight", (n_out, n_in), 1, tp, std)
        self.bias = replicated_parameter(f"{name}.bias", (n_out,), tp)  # added after the sum, so once

    def forward(self, x: Tensor) -> Tensor:
        leave = reduce_scatter_to_sequence if self.tp.sequence_parallel else reduce_from_ranks
        return leave(linear(x, self.weight, None, self.tp.weight_gradients), self.tp.group) + self.bias
