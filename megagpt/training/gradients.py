"""What remains to be summed after a chunk's backwards, before ZeRO reduces over its shards.

- a tied embedding's gradient, made in part by the first stage and in part by the last;
- replicated parameters under sequence parallelism, to which each tensor rank adds its part of the sequence;
- under ZeRO 0, every gradient over the data ranks.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt.parallel.shard import has_partial_gradient
from megagpt.parallel.topology import Topology

_BUCKET = 2**24
"""Elements summed in one call: few calls, and a small buffer beside the gradients."""


def finish_gradients(parameters: list[nn.Parameter], topology: Topology, over_data: bool) -> None:
    """Sum what tensor ranks have parts of, and with `over_data` everything over the data ranks."""
    _sum([p for p in parameters if has_partial_gradient(p)], topology.tensor_group)
    if over_data:
        _sum(parameters, topology.data_group)


def sum_over_context(parameters: list[nn.Parameter], topology: Topology) -> None:
    """Sum what context ranks have made, each of its part of the same samples."""
    _sum(parameters, topology.context_group)


def sum_over_ends(tied: list[nn.Parameter], topology: Topology) -> None:
    """Sum the gradients of parameters that the first stage and the last both have."""
    _sum(tied, topology.ends_group)


def _sum(parameters: list[nn.Parameter], group: ProcessGroup | None) -> None:
    """Sum the gradients over the group's ranks, which hold the same parameters in the same order."""
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
        if size >= _BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
