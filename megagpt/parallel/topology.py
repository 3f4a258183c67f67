"""Process topology: each rank's coordinates and its process groups.

`Layout` is arithmetic and needs no process group; `Topology` is a layout with the groups of this rank.
Ranks form a grid with one axis per kind of parallelism. The last axis varies fastest, so tensor-parallel ranks, which
communicate most, are neighbours and usually on one node.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from torch.distributed import ProcessGroup


class Coordinates(NamedTuple):
    """A rank's index along each axis of the grid, slowest axis first. A new axis is one more field here and in `Layout`."""

    pipeline: int = 0
    data: int = 0
    context: int = 0
    tensor: int = 0


SHARED = "shared parameters"
"""Description of the groups of pipeline ranks that share parameters."""
AXES = Coordinates._fields
"""Names of the axes, slowest first."""


@dataclass(frozen=True)
class Layout:
    """Number of ranks along each axis; the world size is their product."""

    tensor: int = 1
    """Ranks that share each weight matrix."""
    pipeline: int = 1
    """Ranks that share the layers."""
    context: int = 1
    """Ranks that share each sequence."""
    data: int = 1
    """Data-parallel size: model replicas that process different sequences."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def dp_cp(self) -> int:
        """Data-parallel times context-parallel size: ranks that hold the same parameters. ZeRO shards over these."""
        return self.data * self.context

    def rank(self, coordinates: Coordinates) -> int:
        """Return the global rank at `coordinates`."""
        return int(np.ravel_multi_index(coordinates, self.sizes))

    def coordinates(self, rank: int) -> Coordinates:
        """Return the coordinates of a global rank."""
        return Coordinates(*map(int, np.unravel_index(rank, self.sizes)))

    def ranks_along(self, rank: int, *axes: str) -> list[int]:
        """Return the ranks that differ from `rank` along `axes` only, in grid order; `rank` is one of them."""
        coordinates = self.coordinates(rank)
        index = tuple(slice(None) if axis in axes else getattr(coordinates, axis) for axis in AXES)
        ranks: list[int] = np.arange(self.world_size).reshape(self.sizes)[index].flatten().tolist()
        return ranks


@dataclass(frozen=True)
class Topology:
    """This rank's coordinates and process groups. A group of size 1 is None: it needs no communication."""

    layout: Layout = Layout()
    rank: int = 0
    tensor_group: ProcessGroup | None = None
    context_group: ProcessGroup | None = None
    dp_cp_group: ProcessGroup | None = None
    """Data-parallel and context-parallel ranks together: they hold the same parameters."""
    model_parallel_group: ProcessGroup | None = None
    """Tensor and pipeline ranks of one replica of the model."""
    pp_forward_group: ProcessGroup | None = None
    """Pipeline ranks, for messages to a later stage. Each direction has its own communicator, so neither blocks the other."""
    pp_backward_group: ProcessGroup | None = None
    """Pipeline ranks, for messages to an earlier stage."""
    embedding_group: ProcessGroup | None = None
    """First and last pipeline rank, which share a tied embedding; None on ranks in between."""
    world_group: ProcessGroup | None = None
    timeout: timedelta = timedelta(seconds=1800)
    """Time limit of each collective."""

    @cached_property
    def coordinates(self) -> Coordinates:
        """This rank's coordinates in the grid."""
        return self.layout.coordinates(self.rank)

    @property
    def tp_rank(self) -> int:
        """Index along the tensor axis."""
        return self.coordinates.tensor

    @property
    def pp_rank(self) -> int:
        """Index along the pipeline axis."""
        return self.coordinates.pipeline

    @property
    def dp_rank(self) -> int:
        """Index along the data axis: selects this rank's share of the global batch."""
        return self.coordinates.data

    @property
    def cp_rank(self) -> int:
        """Index along the context axis: selects this rank's range of positions."""
        return self.coordinates.context

    @property
    def dp_cp_rank(self) -> int:
        """Index among the ranks that hold the same parameters."""
        return self.dp_rank * self.layout.context + self.cp_rank

    @classmethod
    def create(cls, tensor: int, pipeline: int, timeout_seconds: float = 1800.0, context: int = 1) -> "Topology":
        """Place the axes on the default process group and create this rank's groups. Collective.

        `timeout_seconds`: time limit of each collective in these groups.
        Raises ValueError if tensor x pipeline x context does not divide the world size.
        """
        world = dist.get_world_size()
        if world % (tensor * pipeline * context):
            sizes = f"tensor {tensor} x pipeline {pipeline}" + (f" x context {context}" if context > 1 else "")
            raise ValueError(f"{sizes} does not divide a world of {world} ranks")
        layout = Layout(tensor=tensor, pipeline=pipeline, context=context, data=world // (tensor * pipeline * context))
        rank, timeout = dist.get_rank(), timedelta(seconds=timeout_seconds)
        stages = layout.ranks_along(rank, "pipeline")
        return cls(
            layout,
            rank,
            timeout=timeout,
            tensor_group=_new_group(layout.ranks_along(rank, "tensor"), timeout),
            context_group=_new_group(layout.ranks_along(rank, "context"), timeout),
            dp_cp_group=_new_group(layout.ranks_along(rank, "data", "context"), timeout),
            model_parallel_group=_new_group(layout.ranks_along(rank, "pipeline", "tensor"), timeout),
            pp_forward_group=_new_group(stages, timeout),
            pp_backward_group=_new_group(stages, timeout),
            world_group=_new_group(list(range(world)), timeout),
            embedding_group=_group_of_members([stages[0], stages[-1]], rank, timeout) if pipeline > 1 else None,
        )

    def pipeline_group(self, pipeline_ranks: Sequence[int]) -> ProcessGroup | None:
        """Create a group of some of the pipeline ranks, in each pipeline; None on the other ranks. Collective.

        `pipeline_ranks`: two or more.
        """
        stages = self.layout.ranks_along(self.rank, "pipeline")
        return _group_of_members([stages[rank] for rank in pipeline_ranks], self.rank, self.timeout)


def _new_group(ranks: list[int], timeout: timedelta) -> ProcessGroup | None:
    """Create a group; only its members take part, so the cost does not grow with the world size."""
    if len(ranks) == 1:
        return None
    return dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)


def _group_of_members(members: list[int], rank: int, timeout: timedelta) -> ProcessGroup | None:
    """Create a group of some ranks; None on the other ranks, which call this, too.

    torch names a group by its ranks and the number of groups that a rank has. So the other ranks create a group, too: of
    themselves, which is not used.
    """
    own = members if rank in members else [rank]
    group = dist.new_group(own, timeout=timeout, use_local_synchronization=True, group_desc=SHARED)
    return group if rank in members else None
