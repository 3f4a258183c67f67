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
