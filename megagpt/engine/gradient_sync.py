"""Gradient sums outside of ZeRO, after the backwards of a chunk.

- Parameters that several stages share, such as a tied embedding: each stage computes a part of their gradient.
- Replicated parameters under sequence parallelism: each tensor rank computes the gradient of its range of the sequence.
- ZeRO 0: every gradient is summed over the replicas.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt.parallel.parameter import shard_of
from megagpt.parallel.topology import Topology

_BUCKET_ELEMENTS = 2**24
"""Elements summed in one call: few calls, and a small buffer beside the gradients."""


class SharedParameter(NamedTuple):
    """A parameter that several stages have, and the group of their ranks."""

    parameter: nn.Parameter
    group: ProcessGroup | None
    """None if all of these stages are on this rank."""


class GradientSync:
    """Sums the gradients of one rank's chunks that ZeRO does not sum."""

    def __init__(
        self,
        chunks: Mapping[int, nn.Module],
        rank_of_stage: Sequence[int],
        topology: Topology,
        zero_stage: int,
        shared: Mapping[str, Sequence[int]],
    ) -> None:
        """`chunks`: this rank's, by stage; `shared`: names of shared parameters -> stages that have them. Collective."""
        self._topology = topology
        self._zero_stage = zero_stage
        own = {shard_of(p).name: p for chunk in chunks.values() for p in chunk.parameters()}
        groups = _groups_of(shared, rank_of_stage, topology)
        self.shared = [SharedParameter(own[name], group) for name, group in groups.items() if name in own]
        """The shared parameters of this rank; their gradients are complete only after the backwards of all stages.
        In the same order on all ranks."""
        self._shared_set = {shared.parameter for shared in self.shared}
        self.by_stage = {stage: self._without_shared(chunk) for stage, chunk in chunks.items()}
        """Trained parameters of each stage, without the shared ones."""

    def sum_shared(self) -> None:
        """Sum the gradients of the shared parameters, after all backwards. Collective."""
        self.sum_over_stages()
        self.sum([shared.parameter for shared in self.shared if shared.parameter.requires_grad])

    def sum_over_stages(self) -> None:
        """Sum the gradients of the shared parameters over the ranks of the stages that have them. Collective."""
        for parameter, group in self.shared:
            if parameter.requires_grad:
                sum_gradients([parameter], group)

    def sum(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum complete gradients of this rank. Collective."""
        sum_partial_gradients(parameters, self._topology.tensor_group)
        if self._zero_stage == 0:
            sum_gradients(parameters, self._topology.dp_cp_group)

    def _without_shared(self, chunk: nn.Module) -> list[nn.Parameter]:
        return [p for p in chunk.parameters() if p.requires_grad and p not in self._shared_set]


def _groups_of(
    shared: Mapping[str, Sequence[int]], rank_of_stage: Sequence[int], topology: Topology
) -> dict[str, ProcessGroup | None]:
    """Return the group of the ranks that have each shared parameter; None for one rank, and on other ranks. Collective."""
    ends = (0, topology.layout.pipeline - 1)
    created: dict[tuple[int, ...], ProcessGroup | None] = {ends: topology.embedding_group}
    groups = {}
    for name, stages in shared.items():
        ranks = tuple(sorted({rank_of_stage[stage] for stage in stages}))
        if len(ranks) > 1 and ranks not in created:
            created[ranks] = topology.pipeline_group(ranks)
        groups[name] = created[ranks] if len(ranks) > 1 else None
    return groups


def sum_partial_gradients(parameters: Iterable[nn.Parameter], tp_group: ProcessGroup | None) -> None:
    """Sum over the tensor ranks the gradients that each of them has a part of. Collective."""
    sum_gradients((p for p in parameters if shard_of(p).partial_gradient), tp_group)


def sum_gradients(parameters: Iterable[nn.Parameter], group: ProcessGroup | None) -> None:
    """Sum gradients over a group whose ranks hold the same parameters in the same order. Collective."""
    if group is None:
        return
    for bucket in _buckets(p.grad for p in parameters if p.grad is not None):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=group)
        for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        bucket.append(gradient)
        size += gradient.numel()
        if size >= _BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
