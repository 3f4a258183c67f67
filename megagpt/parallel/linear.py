"""Tensor-parallel linear layers, which own their backward (Shoeybi et al., arXiv 1909.08053, section 3)."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt.parallel.collectives import (
    all_gather_sequence,
    reduce_from_ranks,
    reduce_scatter_to_sequence,
    start_all_gather_sequence,
    start_all_reduce,
    start_reduce_scatter_sequence,
)
from megagpt.parallel.deferred_gradients import accumulate, accumulate_product
from megagpt.parallel.kernels import column_sum
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import replicated_parameter, sharded_parameter
from megagpt.parallel.products import PlainProducts, Products

PLAIN = PlainProducts()
"""Products of layers that do not follow `ParallelContext.products`."""


class _Linear(torch.autograd.Function):
    """Compute y = x W^T + b; the weight gradient goes to the `DeferredGradients` queue.

    With a group, the input is the same on all its ranks, so its gradient is summed over them, while the weight gradient
    is computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        parallel: ParallelContext,
        group: ProcessGroup | None,
        products: Products,
    ) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)  # a frozen weight does not need it
        ctx.weight, ctx.bias, ctx.parallel, ctx.group, ctx.products = weight, bias, parallel, group, products
        return products.output(x, _matrix(weight), _vector(bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (x,), grad_x = grads[0].detach(), ctx.saved_tensors, None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.products.input_gradient(grad, _matrix(ctx.weight))
        pending = None if grad_x is None or ctx.group is None else start_all_reduce(grad_x, ctx.group)
        _defer_weight_gradient(ctx, grad, lambda: x)
        return grad_x if pending is None else pending(), None, None, None, None, None, None


class _GatheredLinear(torch.autograd.Function):
    """Column-parallel linear under sequence parallelism: all-gathers the input and saves only the local sequence range.

    The backward gathers the input again for the weight gradient (Korthikanti et al., arXiv 2205.05198, section 4.2.2),
    while the input gradient is computed; that is summed and scattered while the weight gradient is computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        parallel: ParallelContext,
        group: ProcessGroup,
        products: Products,
    ) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.weight, ctx.bias, ctx.parallel, ctx.group, ctx.products = weight, bias, parallel, group, products
        return products.output(all_gather_sequence(x, group), _matrix(weight), _vector(bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (x,), group = grads[0].detach(), ctx.saved_tensors, ctx.group
        pending_x, pending_grad = None, None
        if ctx.weight.requires_grad and not ctx.parallel.deferred_gradients.is_deferring:
            pending_x = start_all_gather_sequence(x, group)
        if ctx.needs_input_grad[0]:
            pending_grad = start_reduce_scatter_sequence(ctx.products.input_gradient(grad, _matrix(ctx.weight)), group)
        _defer_weight_gradient(ctx, grad, pending_x or (lambda: all_gather_sequence(x, group)))
        return None if pending_grad is None else pending_grad(), None, None, None, None, None, None


def _defer_weight_gradient(ctx: Any, grad: Tensor, full_input: Callable[[], Tensor]) -> None:
    """Queue the gradients of weight and bias, unless they are frozen.

    `grad`: [..., out]; `full_input`: returns the layer's input, [..., in], when the job runs.
    """
    weight, bias, kernels = ctx.weight, ctx.bias, ctx.parallel.kernels
    bias_needs_grad = bias is not None and bias.requires_grad

    def job() -> None:
        if weight.requires_grad:
            accumulate_product(weight, grad.flatten(0, -2).t(), full_input().detach().flatten(0, -2))
        if bias_needs_grad:
            accumulate(bias, kernels.run(column_sum, grad).view(bias.shape))

    if weight.requires_grad or bias_needs_grad:
        ctx.parallel.deferred_gradients.add(job)


def _matrix(weight: Tensor) -> Tensor:
    """Return a weight [..., out, in] as a matrix; its leading dims are parts that are computed together."""
    return weight.flatten(0, -2)


def _vector(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.flatten()


def linear(
    x: Tensor,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    parallel: ParallelContext,
    replicated_over: ProcessGroup | None = None,
    products: Products = PLAIN,
) -> Tensor:
    """Return x W^T + b, [..., in] -> [..., out]. The gradients of W and b go to the queue of `parallel`.

    `replicated_over`: ranks that have the same x and different W; the gradient of x is summed over them.
    """
    if not torch.is_grad_enabled():  # the function around it takes longer than a small product
        return products.output(x, _matrix(weight), _vector(bias))
    return _Linear.apply(x, anchor(weight, x), weight, bias, parallel, replicated_over, products)


def anchor(parameter: Tensor, *inputs: Tensor) -> Tensor:
    """Return an input that makes autograd run a backward: the parameter, but only if no other input needs a gradient.

    The function returns no gradient for it. As an input in every case, DeepSpeed's hooks of the parameter would run in
    each micro-batch.
    """
    return inputs[0] if any(x.requires_grad for x in inputs) else parameter


class Adapter(Protocol):
    """A module that adds to the output of a linear layer."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return what is added to the output, for the layer's input x."""

    def flops_per_token(self) -> int:
        """Forward FLOPs of the unsharded module for one token."""


class _ParallelLinear(nn.Module):
    """What both kinds of linear layer report."""

    bias: nn.Parameter | None
    add_bias: bool
    adapter: Adapter | None
    """What is added to the output: a low-rank adapter, or nothing."""

    def __init__(self, n_in: int, n_out: int, parallel: ParallelContext) -> None:
        super().__init__()
        self.n_in = n_in
        self.n_out = n_out
        self.parallel = parallel
        self.adapter = None

    def _adapted(self, out: Tensor, x: Tensor) -> Tensor:
        """Return the output with that of the adapter, if there is one."""
        return out if self.adapter is None else out + self.adapter(x)

    @property
    def pending_bias(self) -> nn.Parameter | None:
        """The bias, if the output is without it: the function that gets the output adds it, and computes its gradient."""
        return None if self.add_bias else self.bias

    def flops_per_token(self) -> int:
        """Forward FLOPs of the unsharded layer for one token (a multiply-add counts as 2)."""
        return 2 * self.n_in * self.n_out + (0 if self.adapter is None else self.adapter.flops_per_token())

    def extra_repr(self) -> str:
        """Show the unsharded sizes in `print(model)`."""
        return f"in={self.n_in}, out={self.n_out}, tensor ranks={self.parallel.tp_size}"


class ColumnParallelLinear(_ParallelLinear):
    """Linear layer whose outputs are split over the tensor ranks.

    Input: replicated [batch, seq, in], or this rank's [batch, seq / ranks, in] under sequence parallelism.
    Output: [batch, seq, out / ranks]. With several parts, the output is this rank's range of each part, one after the other.
    """

    def __init__(
        self,
        name: str,
        n_in: int,
        n_out: int,
        parallel: ParallelContext,
        std: float,
        bias: bool = True,
        parts: int = 1,
        replicated: bool = False,
        add_bias: bool = True,
    ) -> None:
        """`n_out`: outputs of all parts and ranks.

        `replicated`: every tensor rank computes all outputs, from which it uses those of its own heads.
        `add_bias`: False leaves it to the function that gets the output; see `pending_bias`.
        """
        super().__init__(n_in, n_out, parallel)
        leading = (parts,) if parts > 1 else ()
        length = n_out // parts

        def create(kind: str, shape: tuple[int, ...], std: float) -> nn.Parameter:
            if replicated:
                full = (*leading, *shape)
                return replicated_parameter(f"{name}.{kind}", full, parallel, std, own_heads=True, init_dim=len(leading))
            return sharded_parameter(f"{name}.{kind}", (*leading, *shape), len(leading), parallel, std)

        self.weight = create("weight", (length, n_in), std)
        self.bias = create("bias", (length,), 0.0) if bias else None
        self.add_bias = add_bias

    def forward(self, x: Tensor) -> Tensor:
        parallel, bias = self.parallel, self.bias if self.add_bias else None
        if parallel.sequence_parallel and parallel.tp_group is not None:
            out = _GatheredLinear.apply(
                x, anchor(self.weight, x), self.weight, bias, parallel, parallel.tp_group, parallel.products
            )
        else:
            out = linear(x, self.weight, bias, parallel, parallel.tp_group, parallel.products)
        return self._adapted(out, x)


class RowParallelLinear(_ParallelLinear):
    """Linear layer whose inputs are split over the tensor ranks; the partial results are summed.

    Input: [batch, seq, in / ranks]. Output: replicated [batch, seq, out], or this rank's [batch, seq / ranks, out]
    under sequence parallelism.
    """

    def __init__(
        self,
        name: str,
        n_in: int,
        n_out: int,
        parallel: ParallelContext,
        std: float,
        bias: bool = True,
        add_bias: bool = True,
    ) -> None:
        """`add_bias`: False leaves it to the function that gets the output; see `pending_bias`."""
        super().__init__(n_in, n_out, parallel)
        self.add_bias = add_bias
        self.weight = sharded_parameter(f"{name}.weight", (n_out, n_in), 1, parallel, std)
        # Added once, after the sum.
        self.bias = replicated_parameter(f"{name}.bias", (n_out,), parallel) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        reduce = reduce_scatter_to_sequence if self.parallel.sequence_parallel else reduce_from_ranks
        partial = linear(x, self.weight, None, self.parallel, products=self.parallel.products)
        out = reduce(partial, self.parallel.tp_group)
        return self._adapted(out if self.bias is None or not self.add_bias else out + self.bias, x)
