"""Memory-bound functions between matrix products: plain torch code that runs eagerly or is compiled by torch.compile.

A compiled function reads and writes each tensor about once. The eager form of the same function is the reference. No
collective stands inside a compiled function, and none of them has a backward of its own: the autograd functions that call
them do.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from megagpt.output import warn

P = ParamSpec("P")
R = TypeVar("R")
SHAPES_PER_FUNCTION = 64
"""Compiled variants of one function; beyond that torch runs it eagerly."""


class Kernels:
    """Runs functions eagerly, or compiled for each shape that they are called with."""

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        """Whether functions are compiled. False after a compilation has failed, or from the start."""
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return function(*args). A function that cannot be compiled runs eagerly from then on, as all others do.

        `function` must be defined at the top level of a module, because each new function object is compiled again.
        """
        if not self.compiled:
            return function(*args, **kwargs)
        compiled = self._compiled.get(function)
        if compiled is None:
            compiled = self._compiled[function] = _compile(function)
        try:
            return compiled(*args, **kwargs)
        except compile_errors() as error:
            self.compiled = False
            reason = str(error).strip().splitlines()[0][:200]
            warn(f"training.compile: {function.__name__} cannot be compiled, so the run continues without it, slower: {reason}")
            return function(*args, **kwargs)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES_PER_FUNCTION)
    return torch.compile(function, dynamic=False, fullgraph=True)


def compile_errors() -> tuple[type[Exception], ...]:
    """Return the errors of a compilation, which torch imports late. Errors of the compiled function itself are others."""
    import torch._dynamo.exc
    import torch._inductor.exc

    return (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError)


def column_sum(x: Tensor) -> Tensor:
    """Return the sum over all dims but the last, in fp32 or wider. [..., width] -> [width]"""
    return x.flatten(0, -2).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))


def loss_statistics(
    logits: Tensor, index: Tensor, is_local: Tensor, entries: int, even_share: float, smoothing: float, softcap: float | None
) -> Tensor:
    """Return for each token of this rank's vocabulary the largest logit, the sum of exp(logit - largest), and the target's.

    logits: [tokens, padded entries]; index: entry of each label, [tokens]; is_local: whether this rank has it, [tokens].
    entries: entries without padding. Returns fp32, [3, tokens]. With smoothing, the third number is the weighted sum of the
    logits that the smoothed label asks for.
    """
    scores = _scores(logits, softcap)
    target = torch.where(is_local, scores.gather(-1, index.unsqueeze(-1)).squeeze(-1), 0.0)
    valid = torch.arange(scores.shape[1], device=scores.device) < entries
    if smoothing > 0:
        target = target * (1 - smoothing) + even_share * torch.where(valid, scores, 0.0).sum(-1)
    if entries < scores.shape[1]:
        scores = torch.where(valid, scores, float("-inf"))
    largest = scores.amax(-1).clamp(min=torch.finfo(torch.float32).min)  # -inf on a rank that has padding only
    total = (scores - largest.unsqueeze(-1)).exp().sum(-1)
    return torch.stack((largest, total, target))


def loss_gradient(
    logits: Tensor,
    log_total: Tensor,
    index: Tensor,
    is_local: Tensor,
    ignored: Tensor,
    entries: int,
    even_share: float,
    smoothing: float,
    softcap: float | None,
    z_loss: float,
) -> None:
    """Replace logits [tokens, padded entries] by the gradient of the loss by them; 0 at ignored tokens and at padding.

    log_total: logarithm of the sum of exp(logit) over all ranks, [tokens]. The other arguments as in `loss_statistics`.
    """
    scores = _scores(logits, softcap)
    columns = torch.arange(scores.shape[1], device=scores.device)
    gradient = (scores - log_total.unsqueeze(-1)).exp()
    if z_loss > 0:
        gradient = gradient * (1 + 2 * z_loss * log_total).unsqueeze(-1)
    is_target = (columns == index.unsqueeze(-1)) & is_local.unsqueeze(-1)
    gradient = torch.where(is_target, gradient - (1 - smoothing), gradient)
    if smoothing > 0:
        gradient = gradient - even_share
    if softcap is not None:
        gradient = gradient * (1 - (scores / softcap).square())
    kept = (columns < entries) & ~ignored.unsqueeze(-1)
    logits.copy_(torch.where(kept, gradient, 0.0))


def _scores(logits: Tensor, softcap: float | None) -> Tensor:
    scores = logits.float()
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
