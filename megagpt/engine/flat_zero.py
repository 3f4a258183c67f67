"""ZeRO 1 and 2 on flat buffers (Rajbhandari et al., arXiv 1910.02054): few kernels per step, whatever the number of weights.

The gradients of a group of parameters are views of one fp32 buffer, laid out like the group's flat weights. So backwards add
to it in place, the sum over the ranks goes straight to the rank that owns a part (as many bytes as a reduce-scatter), and
norm, clipping and optimizer each read the rank's part once. The updated weights come from their owners, in buckets, beside the
next forward. DeepSpeed creates the flat weights, the fp32 master weights and their division over the ranks
(`deepspeed_internals.py`); ZeRO 0 is the case of one rank.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt.parallel.collectives import all_gather_into

CLIP_EPSILON = 1e-6
"""Added to the norm before clipping, as torch and DeepSpeed do."""


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that are views of one buffer, which ZeRO divides evenly over its ranks."""

    parameters: Sequence[nn.Parameter]
    weights: Tensor
    """Flat weights of all parameters, padded at the end; in the dtype of the forwards."""
    master: nn.Parameter
    """fp32 weights of this rank's part; the optimizer updates it by its `.grad`."""


@dataclass(frozen=True)
class Update:
    """Outcome of one optimizer step, equal on all ranks."""

    grad_norm: float
    """L2 norm of the unscaled gradients before clipping; not finite if the step was skipped."""
    skipped: bool
    """The norm is not finite, so no weight has changed."""


@dataclass(frozen=True)
class _Segment:
    """Neighbours in a flat buffer whose gradients are complete at the same time."""

    group: int
    start: int
    end: int
    parameters: tuple[tuple[nn.Parameter, int], ...]
    """Each with its offset in the group's buffer."""


class FlatZero:
    """Gradients and optimizer step of ZeRO 0 to 2: `begin`, backwards, `reduce` per chunk, `finish`, then `update`.

    After `update`, weights may be read when the collectives that `take_gathers` returns for them are done.
    """

    def __init__(
        self,
        groups: Sequence[FlatGroup],
        buckets: Sequence[Sequence[nn.Parameter]],
        rests: Sequence[Sequence[nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        shard_group: ProcessGroup,
        model_group: ProcessGroup,
        is_counted: Callable[[nn.Parameter], bool],
        frees: bool,
    ) -> None:
        """`buckets`, `rests`: parameters that `reduce` gets together; all others are reduced by `finish`.

        The weights of each bucket are gathered apart, in this order, after those that are in no bucket.
        `shard_group`: ranks that share the parts; `model_group`: ranks with the other parameters of this replica.
        `is_counted`: whether a parameter's gradient counts in the norm on this rank.
        `frees`: free a chunk's gradients, except this rank's part, as soon as they are reduced (ZeRO 2).
        """
        self._groups = groups
        self._optimizer = optimizer
        self._shard_group = shard_group
        self._model_group = model_group
        self._rank, self._n_ranks = dist.get_rank(shard_group), dist.get_world_size(shard_group)
        self._frees = frees and self._n_ranks > 1
        self._place = {p: (index, _offset(p, group)) for index, group in enumerate(groups) for p in group.parameters}
        self._segments = [segment for part in self._parts([*buckets, *rests]) for segment in self._joined(part)]
        self._segment_of = {p: segment for segment in self._segments for p, _ in segment.parameters}
        self._counted = list(self._own_ranges(self._joined([p for p in self._place if is_counted(p)])))
        self._full = [] if self._frees else [_zeros(group.weights, len(group.weights)) for group in groups]
        self._own = [self._part(flat) for flat in self._full]
        if self._frees:
            self._own = [_zeros(group.weights, len(group.weights) // self._n_ranks) for group in groups]
        self._buffers: dict[_Segment, Tensor] = {}
        self._views: dict[nn.Parameter, Tensor] = {}
        if not self._frees:
            self._allocate()
        self._pending: dict[nn.Parameter, None] = {}
        self._works: list[tuple[Any, _Segment]] = []
        *in_buckets, rest = self._parts(buckets)
        self._gathered_together = [rest, *in_buckets]
        self._gather_of = {p: index for index, part in enumerate(self._gathered_together) for p in part}
        self._gathers: dict[int, list[Any]] = {}

    def begin(self) -> None:
        """Set all gradients to zero, as views of flat buffers."""
        torch._foreach_zero_(self._full or self._own)
        if self._frees:
            self._allocate()
        for parameter, view in self._views.items():
            parameter.grad = view
        self._pending = dict.fromkeys(self._place)

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Start the sums of these parameters' gradients, which are complete. Collective; all ranks in the same order."""
        segments: dict[_Segment, None] = {}
        for parameter in parameters:
            del self._pending[parameter]
            segments[self._segment_of[parameter]] = None
        if self._n_ranks == 1:
            return
        for segment in segments:
            for owner, first, last in self._pieces(segment):
                piece = self._buffers[segment][first - segment.start : last - segment.start]
                self._works.append((dist.reduce(piece, owner, group=self._shard_group, async_op=True), segment))
            if self._frees:
                for parameter, _ in segment.parameters:
                    parameter.grad = None

    def finish(self) -> None:
        """Sum the remaining gradients, and wait for all sums. Collective."""
        self.reduce(list(self._pending))
        for work, _ in self._works:
            work.wait()
        if self._frees:
            for segment in dict.fromkeys(segment for _, segment in self._works):
                for index, first, last in self._own_ranges([segment]):
                    shift = self._rank * self._part_length(index) - segment.start
                    self._own[index][first:last] = self._buffers[segment][first + shift : last + shift]
            self._buffers, self._views = {}, {}
        self._works = []

    def update(self, loss_scale: float, max_norm: float) -> Update:
        """Clip this rank's gradients to `max_norm` (0: do not), update its weights, start to gather all weights. Collective.

        `loss_scale`: factor that the gradients have. Without any change if their norm is not finite.
        """
        norm = self._norm() / loss_scale
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            return Update(grad_norm, skipped=True)
        factor = 1 / loss_scale
        if max_norm > 0:
            factor /= max(1.0, (grad_norm + CLIP_EPSILON) / max_norm)
        if factor != 1:
            torch._foreach_mul_(self._own, factor)
        for group, gradients in zip(self._groups, self._own, strict=True):
            group.master.grad = gradients
        self._optimizer.step()
        for group in self._groups:
            self._part(group.weights).copy_(group.master.detach())
        if self._n_ranks > 1:
            self._gathers = {index: self._gather(part) for index, part in enumerate(self._gathered_together)}
        return Update(grad_norm, skipped=False)

    def take_gathers(self, parameters: Iterable[nn.Parameter] | None = None) -> list[Any]:
        """Return the collectives in flight that bring the weights of these parameters; of all parameters if None.

        Each is returned once, so the caller must wait for it.
        """
        if not self._gathers:
            return []
        indices = self._gather_of.values() if parameters is None else [self._gather_of.get(p) for p in parameters]
        return [work for index in dict.fromkeys(indices) if index is not None for work in self._gathers.pop(index, ())]

    def _gather(self, parameters: Sequence[nn.Parameter]) -> list[Any]:
        """Start to bring the weights of these parameters from their owners; return the collectives."""
        if len(parameters) == len(self._place):
            return [
                all_gather_into(group.weights, self._part(group.weights), group=self._shard_group, async_op=True)
                for group in self._groups
            ]
        return [
            dist.broadcast(self._groups[segment.group].weights[first:last], owner, group=self._shard_group, async_op=True)
            for segment in self._joined(parameters)
            for owner, first, last in self._pieces(segment)
        ]

    def _allocate(self) -> None:
        """Make the buffers of all segments, and the views of them that are the gradients."""
        for segment in self._segments:
            if self._frees:
                buffer = _zeros(self._groups[segment.group].weights, segment.end - segment.start)
            else:
                buffer = self._full[segment.group][segment.start : segment.end]
            self._buffers[segment] = buffer
            for parameter, start in segment.parameters:
                first = start - segment.start
                self._views[parameter] = buffer[first : first + parameter.numel()].view_as(parameter)

    def _norm(self) -> Tensor:
        """Return the L2 norm of all counted gradients of all ranks, a scalar on the device. Collective."""
        total = torch.zeros((), dtype=torch.float64, device=self._groups[0].weights.device)
        ranges = [self._own[index][first:last] for index, first, last in self._counted]
        if ranges:
            total = torch.stack([torch.linalg.vector_norm(values, dtype=torch.float64) for values in ranges]).square().sum()
        for group in (self._shard_group, self._model_group):
            if dist.get_world_size(group) > 1:
                dist.all_reduce(total, group=group)
        return total.sqrt()

    def _parts(self, parts: Sequence[Sequence[nn.Parameter]]) -> list[list[nn.Parameter]]:
        """Return the trained parameters of each part, and at the end those that are in none."""
        in_parts = {p for part in parts for p in part}
        return [[p for p in part if p in self._place] for part in parts] + [[p for p in self._place if p not in in_parts]]

    def _pieces(self, segment: _Segment) -> Iterator[tuple[int, int, int]]:
        """Yield (owner, first, last) of the ranges of a segment that one rank owns; `owner` is a global rank."""
        part = self._part_length(segment.group)
        for number in range(segment.start // part, (segment.end - 1) // part + 1):
            owner = dist.get_global_rank(self._shard_group, number)
            yield owner, max(segment.start, number * part), min(segment.end, (number + 1) * part)

    def _part_length(self, group: int) -> int:
        return len(self._groups[group].weights) // self._n_ranks

    def _part(self, flat: Tensor) -> Tensor:
        """Return this rank's part of a flat buffer."""
        return flat.chunk(self._n_ranks)[self._rank]

    def _own_ranges(self, segments: Iterable[_Segment]) -> Iterator[tuple[int, int, int]]:
        """Yield (group, first, last) of what this rank owns of the segments, relative to its part."""
        for segment in segments:
            part = self._part_length(segment.group)
            first, last = max(segment.start - self._rank * part, 0), min(segment.end - self._rank * part, part)
            if first < last:
                yield segment.group, first, last

    def _joined(self, parameters: Iterable[nn.Parameter]) -> list[_Segment]:
        """Return the parameters as segments, as few as possible, in the order of the buffers."""
        runs: list[list[tuple[int, int, nn.Parameter]]] = []
        for index, start, parameter in sorted(((*self._place[p], p) for p in parameters), key=lambda entry: entry[:2]):
            if runs:
                last_index, last_start, last = runs[-1][-1]
                if last_index == index and last_start + last.numel() == start:
                    runs[-1].append((index, start, parameter))
                    continue
            runs.append([(index, start, parameter)])
        return [
            _Segment(run[0][0], run[0][1], run[-1][1] + run[-1][2].numel(), tuple((p, start) for _, start, p in run))
            for run in runs
        ]


def _zeros(like: Tensor, length: int) -> Tensor:
    return torch.zeros(length, dtype=torch.float32, device=like.device)


def _offset(parameter: nn.Parameter, group: FlatGroup) -> int:
    """Return where the parameter starts in the group's flat weights."""
    return (parameter.data_ptr() - group.weights.data_ptr()) // group.weights.element_size()
