"""Gradient sums outside of ZeRO, after the backwards of a chunk.

- The tied embedding: the first and the last stage each compute a part of its gradient.
- Replicated parameters under sequence parallelism: each tensor rank computes the gradient of its range of the sequence.
- ZeRO 0: every gradient is summed over the replicas.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt.parallel.parameter import shard_of
from megagpt.parallel.topology import Topology

_BUCKET_ELEMENTS = 2**24
"""Elements summed in one call: few calls, and a small buffer beside the gradients."""


class GradientSync:
    """Sums the gradients of one rank's chunks that ZeRO does not sum."""

    def __init__(
        self,
        chunks: Mapping[int, nn.Module],
        rank_of_stage: Sequence[int],
        topology: Topology,
        zero_stage: int,
        tied: str | None,
    ) -> None:
        """`chunks`: this rank's, by stage; `tied`: name of the tied embedding, if the model has one."""
        self._topology = topology
        self._zero_stage = zero_stage
        self._tied_on_two_ranks = rank_of_stage[0] != rank_of_stage[-1]
        parameters = dict.fromkeys(p for chunk in chunks.values() for p in chunk.parameters() if p.requires_grad)
        self.tied = [p for p in parameters if shard_of(p).name == tied]
        """The tied embedding, if this rank trains it: complete only after the backwards of both ends of the model."""
        self._tied_set = set(self.tied)
        self.by_stage = {stage: self._without_tied(chunk) for stage, chunk in chunks.items()}
        """Trained parameters of each stage, without the tied embedding."""

    def sum_stage(self, stage: int) -> list[nn.Parameter]:
        """Sum the gradients of a stage whose backwards are done; return its parameters. Collective."""
        parameters = self.by_stage[stage]
        self._sum(parameters)
        return parameters

    def sum_tied(self) -> None:
        """Sum the tied embedding's gradient, after all backwards. Collective."""
        self.sum_over_ends()
        self._sum(self.tied)

    def sum_over_ends(self) -> None:
        """Sum the tied embedding's gradient over the first and the last stage, unless one rank has both. Collective."""
        if self._tied_on_two_ranks:
            sum_gradients(self.tied, self._topology.embedding_group)

    def _sum(self, parameters: Sequence[nn.Parameter]) -> None:
        sum_partial_gradients(parameters, self._topology.tensor_group)
        if self._zero_stage == 0:
            sum_gradients(parameters, self._topology.dp_cp_group)

    def _without_tied(self, chunk: nn.Module) -> list[nn.Parameter]:
        return [p for p in chunk.parameters() if p.requires_grad and p not in self._tied_set]


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
