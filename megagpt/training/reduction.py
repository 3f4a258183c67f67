"""Gradients over the data ranks, a chunk of the model at a time, as soon as its last backward is done.

DeepSpeed reduces after every backward, or once after a whole step (`coalesce_grad_reduction`). Between the two there is
no public way, so this file drives the parts of its ZeRO optimizer (stages 1 and 2) that the latter calls on its exit;
`deepspeed` is pinned to the versions whose parts these are (`_PARTS` is checked when the engine is made).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from unittest import mock

from torch import nn

from megagpt.errors import ConfigError

_PARTS = ("setup_buckets", "reduce_ready_partitions_and_remove_grads", "reduce_ipg_grads", "get_gradient_for_reduction")


class Reduction(Protocol):
    """The reductions of one engine's steps: `begin`, `reduce` for parameters that are done, then `finish`."""

    def begin(self) -> None:
        """From here on backwards leave their gradients where they are."""

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """These have their whole gradients."""

    def finish(self) -> None:
        """All have; hand them to the optimizer."""


class WholeStep:
    """One reduction at the end of the step, by DeepSpeed's own context manager (stage 3)."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def begin(self) -> None:
        """From here on backwards leave their gradients where they are."""
        self._context = self._engine.coalesce_grad_reduction()
        self._context.__enter__()

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """They wait for the others."""

    def finish(self) -> None:
        """Reduce all."""
        self._context.__exit__(None, None, None)


class ByChunk:
    """Reductions under stages 1 and 2, each when its parameters are done."""

    def __init__(self, engine: Any) -> None:
        """Raises ConfigError for a DeepSpeed that has no such parts."""
        self._engine, self._optimizer = engine, engine.optimizer
        missing = [part for part in _PARTS if not hasattr(self._optimizer, part)]
        if missing:
            raise ConfigError(
                f"the installed deepspeed has no {missing[0]} in its ZeRO optimizer; use 0.19, see requirements.txt"
            )
        self._group = {p: number for number, group in enumerate(self._optimizer.bit16_groups) for p in group}
        self._waiting: dict[nn.Parameter, None] = {}

    def begin(self) -> None:
        """From here on backwards leave their gradients where they are."""
        self._optimizer._coalesce_grad_reduction = True
        self._engine.inside_no_sync_ctxt = True
        # One step is one accumulation of DeepSpeed's, so that every reduction is its last.
        self._before = self._engine._is_gradient_accumulation_boundary
        self._engine._is_gradient_accumulation_boundary = True
        self._optimizer.set_gradient_accumulation_boundary(True)
        self._waiting = dict.fromkeys(self._group)

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum these gradients over the shards, which keep their parts; under stage 2 the whole ones are freed.

        A collective of the data ranks, which come to it in the same order: they run the same plan.
        """
        optimizer = self._optimizer
        optimizer._coalesce_grad_reduction = False
        optimizer.setup_buckets()
        for parameter in parameters:
            del self._waiting[parameter]
            if optimizer.get_gradient_for_reduction(parameter) is not None:
                optimizer.reduce_ready_partitions_and_remove_grads(parameter, self._group[parameter])
        optimizer.reduce_ipg_grads()
        optimizer._coalesce_grad_reduction = True

    def finish(self) -> None:
        """Reduce what is left and hand all of it to the optimizer."""
        self.reduce(list(self._waiting))
        self._optimizer._coalesce_grad_reduction = False
        self._engine.inside_no_sync_ctxt = False
        self._optimizer.overlapping_partition_gradients_reduce_epilogue()
        self._engine._is_gradient_accumulation_boundary = self._before


@contextmanager
def refused(optimizer: Any) -> Iterator[None]:
    """Within the block the ZeRO optimizer takes a step as one whose gradients overflowed: it drops them, nothing changes.

    Every stage asks for its loss scale to be updated when it knows of overflows, and then looks at `overflow`.
    """

    def overflow(_: bool = False) -> None:
        optimizer.overflow = True

    with mock.patch.object(optimizer, "_update_scale", overflow):
        yield
