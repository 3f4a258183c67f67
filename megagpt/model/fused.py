"""The memory-bound work of a block, each as one function forward and one backward when kernels are compiled.

Every operation has an eager form, which torch differentiates, and a compiled form, whose backward is computed from the same
plain function. Gradients of biases and norm weights are summed in fp32 in the backward that reads the gradient anyway.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megagpt.model import rotary
from megagpt.model.dropout_masks import keep_mask
from megagpt.model.rotary import RotaryTable
from megagpt.parallel.deferred_gradients import accumulate
from megagpt.parallel.kernels import Kernels, column_sum
from megagpt.parallel.linear import anchor

NormFunction = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
"""(x, weight, bias, epsilon) -> normalised x."""
Activation = Callable[[Tensor], Tensor]


class NormOf(NamedTuple):
    """A norm over the last dim, with its parameters."""

    function: NormFunction
    weight: Tensor
    bias: Tensor | None
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias, self.epsilon)

    def detached(self) -> "NormOf":
        """Return the norm with parameters that autograd does not follow."""
        return self._replace(weight=self.weight.detach(), bias=_detached(self.bias))


class Branch(NamedTuple):
    """What is added to the residual stream: drop(x + bias)."""

    x: Tensor
    """[batch, seq, hidden]"""
    bias: Tensor | None
    """[hidden]"""
    keys: Tensor | None
    """Keys of the dropout masks, [batch, seq]; None for no dropout."""
    probability: float
    """Of being dropped."""

    def __call__(self) -> Tensor:
        return drop(self.x if self.bias is None else self.x + self.bias, self.keys, self.probability)

    def detached(self) -> "Branch":
        """Return the branch with a bias that autograd does not follow."""
        return self._replace(bias=_detached(self.bias))


def drop(x: Tensor, keys: Tensor | None, probability: float, first: int = 0) -> Tensor:
    """Return x with dropped channels. x: [batch, seq, hidden]; keys: of the masks, [batch, seq], or None for no dropout.

    `first`: number of the first channel.
    """
    if keys is None:
        return x
    columns = torch.arange(first, first + x.shape[-1], dtype=torch.int32, device=x.device)
    return x * keep_mask(keys.unsqueeze(2), columns, probability) * (1 / (1 - probability))


def norm(kernels: Kernels, x: Tensor, norm: NormOf) -> Tensor:
    """Return the norm of x."""
    return _Norm.apply(x, anchor(norm.weight, x), kernels, norm) if kernels.compiled else norm(x)


def add_norm(kernels: Kernels, x: Tensor, branch: Branch, norm: NormOf) -> tuple[Tensor, Tensor]:
    """Return the sum of x and the branch, and its norm. [batch, seq, hidden]"""
    if not kernels.compiled:
        total = x + branch()
        return total, norm(total)
    return _AddNorm.apply(x, branch.x, anchor(norm.weight, x, branch.x), kernels, branch, norm)


def add(kernels: Kernels, x: Tensor, branch: Branch) -> Tensor:
    """Return the sum of x and the branch. [batch, seq, hidden]"""
    if not kernels.compiled:
        return x + branch()
    start = x if branch.bias is None else anchor(branch.bias, x, branch.x)
    return _Add.apply(x, branch.x, start, kernels, branch)


def activate(kernels: Kernels, function: Activation, x: Tensor, bias: nn.Parameter | None) -> Tensor:
    """Return function(x + bias)."""
    if not kernels.compiled:
        return function(x if bias is None else x + bias.flatten())
    return _Activate.apply(x, x if bias is None else anchor(bias, x), kernels, function, bias)


def split_heads(kernels: Kernels, x: Tensor, parts: int, head_size: int) -> tuple[Tensor, ...]:
    """Split [batch, seq, heads * parts * head size] into `parts` tensors [batch, seq, heads, head size]."""
    return _SplitHeads.apply(x, kernels, parts, head_size) if kernels.compiled else _split_heads(x, parts, head_size)


def rotate(kernels: Kernels, x: Tensor, table: RotaryTable, interleaved: bool) -> Tensor:
    """Return the rotated heads. x: [batch, heads, seq, head size]; arguments as in `rotary.rotate`."""
    return _Rotate.apply(x, *table, kernels, interleaved) if kernels.compiled else rotary.rotate(x, table, interleaved)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, kernels: Kernels, norm: NormOf) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kernels, ctx.norm = kernels, norm
        return kernels.run(_norm, x, norm.detached())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), norm = ctx.saved_tensors, ctx.norm
        grad_x, grad_weight, grad_bias = ctx.kernels.run(_norm_backward, grads[0], x, norm.detached())
        _add_gradient(norm.weight, grad_weight)
        _add_gradient(norm.bias, grad_bias)
        return grad_x, None, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch_x: Tensor, start: Tensor, kernels: Kernels, branch: Branch, norm: NormOf
    ) -> tuple[Tensor, Tensor]:
        total, normed = kernels.run(_add_norm, x, branch.detached()._replace(x=branch_x), norm.detached())
        ctx.save_for_backward(total, branch.keys)
        ctx.kernels, ctx.bias, ctx.probability, ctx.norm = kernels, branch.bias, branch.probability, norm
        return total, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (total, keys), norm = ctx.saved_tensors, ctx.norm
        grad, grad_weight, grad_bias, grad_branch, grad_branch_bias = ctx.kernels.run(
            _add_norm_backward, *grads, total, norm.detached(), keys, ctx.probability, ctx.bias is not None
        )
        _add_gradient(norm.weight, grad_weight)
        _add_gradient(norm.bias, grad_bias)
        _add_gradient(ctx.bias, grad_branch_bias)
        return grad, grad if grad_branch is None else grad_branch, None, None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch_x: Tensor, start: Tensor, kernels: Kernels, branch: Branch) -> Tensor:
        ctx.save_for_backward(branch.keys)
        ctx.kernels, ctx.bias, ctx.probability = kernels, branch.bias, branch.probability
        return kernels.run(_add, x, branch.detached()._replace(x=branch_x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (keys,), grad, grad_branch = ctx.saved_tensors, grads[0], None
        if keys is not None or ctx.bias is not None:
            grad_branch, grad_bias = ctx.kernels.run(_branch_gradients, grad, keys, ctx.probability, ctx.bias is not None)
            _add_gradient(ctx.bias, grad_bias)
        return grad, grad if grad_branch is None else grad_branch, None, None, None


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, kernels: Kernels, function: Activation, bias: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kernels, ctx.function, ctx.bias = kernels, function, bias
        return kernels.run(_activate, x, _detached(bias), function)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = ctx.kernels.run(_activate_backward, grads[0], x, _detached(ctx.bias), ctx.function)
        if ctx.bias is not None and ctx.bias.requires_grad:
            # Not in the same function: inductor would compute the activation's backward a second time for the sum.
            _add_gradient(ctx.bias, ctx.kernels.run(column_sum, grad_x))
        return grad_x, None, None, None, None


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels, parts: int, head_size: int) -> tuple[Tensor, ...]:
        ctx.kernels = kernels
        return _split_heads(x, parts, head_size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.kernels.run(_join_heads, *grads), None, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor, kernels: Kernels, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        ctx.kernels, ctx.interleaved = kernels, interleaved
        return kernels.run(rotary.rotate, x, (cosine, sine), interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors  # the transpose of a rotation turns by the opposite angle
        return ctx.kernels.run(_rotate_back, grads[0], cosine, sine, ctx.interleaved), None, None, None, None


def _rotate_back(grad: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    return rotary.rotate(grad, (cosine, -sine), interleaved)


def _norm(x: Tensor, norm: NormOf) -> Tensor:
    return _in_fp32(norm)(x.float()).to(x.dtype)


def _norm_backward(grad: Tensor, x: Tensor, norm: NormOf) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, and of weight and bias in fp32."""
    grad_x, grad_weight, grad_bias = _norm_gradients(grad.float(), x.float(), _in_fp32(norm))
    return grad_x.to(x.dtype), grad_weight, grad_bias


def _norm_gradients(grad: Tensor, x: Tensor, norm: NormOf) -> tuple[Tensor, Tensor, Tensor | None]:
    if norm.bias is None:
        _, pull_back = _vjp(lambda x, weight: norm._replace(weight=weight)(x), x, norm.weight)
        grad_x, grad_weight = pull_back(grad)
        return grad_x, grad_weight, None
    _, pull_back = _vjp(lambda x, weight, bias: norm._replace(weight=weight, bias=bias)(x), x, norm.weight, norm.bias)
    grad_x, grad_weight, grad_bias = pull_back(grad)
    return grad_x, grad_weight, grad_bias


def _add(x: Tensor, branch: Branch) -> Tensor:
    return x + branch()


def _branch_gradients(
    grad: Tensor, keys: Tensor | None, probability: float, has_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradient of a branch, None if it is `grad` itself, and that of its bias in fp32."""
    grad_branch = drop(grad, keys, probability)
    return None if keys is None else grad_branch, column_sum(grad_branch) if has_bias else None


def _add_norm(x: Tensor, branch: Branch, norm: NormOf) -> tuple[Tensor, Tensor]:
    total = x + branch()
    return total, _norm(total, norm)


def _add_norm_backward(
    grad_total: Tensor,
    grad_normed: Tensor,
    total: Tensor,
    norm: NormOf,
    keys: Tensor | None,
    probability: float,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the sum, norm weight, norm bias, branch (None: that of the sum) and the branch's bias."""
    grad, grad_weight, grad_bias = _norm_gradients(grad_normed.float(), total.float(), _in_fp32(norm))
    grad = (grad + grad_total.float()).to(total.dtype)
    return grad, grad_weight, grad_bias, *_branch_gradients(grad, keys, probability, has_bias)


def _activate(x: Tensor, bias: Tensor | None, function: Activation) -> Tensor:
    return function(_plus(x, bias)).to(x.dtype)


def _activate_backward(grad: Tensor, x: Tensor, bias: Tensor | None, function: Activation) -> Tensor:
    _, pull_back = _vjp(function, _plus(x, bias))
    (grad_x,) = pull_back(grad.float())
    return grad_x.to(x.dtype)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.float() if bias is None else x.float() + bias.float().flatten()


def _split_heads(x: Tensor, parts: int, head_size: int) -> tuple[Tensor, ...]:
    return x.unflatten(-1, (-1, parts, head_size)).unbind(-2)


def _join_heads(*heads: Tensor) -> Tensor:
    return torch.stack(heads, -2).flatten(-3)


def _vjp(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Return function(*inputs), and the function from a gradient of it to the gradients of the inputs."""
    return torch.func.vjp(function, *inputs)  # type: ignore[return-value]


def _in_fp32(norm: NormOf) -> NormOf:
    return norm._replace(weight=norm.weight.float(), bias=None if norm.bias is None else norm.bias.float())


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def _add_gradient(parameter: Any, gradient: Tensor | None) -> None:
    if parameter is not None and gradient is not None and parameter.requires_grad:
        accumulate(parameter, gradient.view(parameter.shape))
