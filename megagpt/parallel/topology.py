"""Which rank does what: (pipeline, data, tensor) coordinates and the process groups along each axis.

`Layout` is arithmetic and needs no processes; `Topology` is a layout with this rank's groups.
Tensor ranks are neighbours (they talk most and belong on one node), then data, then pipeline:
rank = (pipeline_rank * data + data_rank) * tensor + tensor_rank.

Data ranks hold the same parameters. Under context parallelism runs of `context` consecutive ones share their samples,
each with a part of the positions; to everything but the reading of samples and attention they are data ranks.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup


class Coordinates(NamedTuple):
    """A rank's place along each axis."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; world size = pipeline x data x tensor."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    """Of `data`, how many share a sample."""

    @property
    def readers(self) -> int:
        """Ranks, or groups of context ranks, that read other samples."""
        return self.data // self.context

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.tensor

    def rank(self, pipeline: int, data: int, tensor: int) -> int:
        """The global rank at these coordinates."""
        return (pipeline * self.data + data) * self.tensor + tensor

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of a global rank."""
        return Coordinates(rank // (self.tensor * self.data), rank // self.tensor % self.data, rank % self.tensor)

    def tensor_ranks(self, rank: int) -> list[int]:
        """Ranks that share this rank's matrices."""
        at = self.coordinates(rank)
        return [self.rank(at.pipeline, at.data, tensor) for tensor in range(self.tensor)]

    def context_ranks(self, rank: int) -> list[int]:
        """Ranks that share this rank's samples and parameters, in the order of their positions."""
        at = self.coordinates(rank)
        first = at.data // self.context * self.context
        return [self.rank(at.pipeline, data, at.tensor) for data in range(first, first + self.context)]

    def data_ranks(self, rank: int) -> list[int]:
        """Ranks that hold the same parameters and work on other tokens."""
        at = self.coordinates(rank)
        return [self.rank(at.pipeline, data, at.tensor) for data in range(self.data)]

    def pipeline_ranks(self, rank: int) -> list[int]:
        """Ranks that hold the other stages of this rank's micro-batches, in stage order."""
        at = self.coordinates(rank)
        return [self.rank(pipeline, at.data, at.tensor) for pipeline in range(self.pipeline)]

    def model_ranks(self, rank: int) -> list[int]:
        """Ranks that together hold one copy of the model: all stages and tensor shards of one data rank."""
        at = self.coordinates(rank)
        return [self.rank(pipeline, at.data, tensor) for pipeline in range(self.pipeline) for tensor in range(self.tensor)]


@dataclass(frozen=True)
class Topology:
    """A rank's coordinates and process groups. A group of one rank is None: nothing is to be said to it."""

    layout: Layout
    rank: int
    at: Coordinates
    tensor_group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None
    model_group: ProcessGroup | None = None
    context_group: ProcessGroup | None = None
    towards_last: ProcessGroup | None = None
    """Messages from a stage to a later one. A communicator of its own, so that they never wait for opposite ones."""
    towards_first: ProcessGroup | None = None
    """Messages from a stage to an earlier one."""
    world_group: ProcessGroup | None = None
    """All ranks."""
    ends_group: ProcessGroup | None = None
    """First and last stage, which share a tied embedding; None on interior stages and where they are one rank."""

    @property
    def reader(self) -> int:
        """Which of `layout.readers` parts of the global batch this rank reads."""
        return self.at.data // self.layout.context

    @property
    def context_rank(self) -> int:
        """Which part of a sample's positions this rank works on."""
        return self.at.data % self.layout.context

    @classmethod
    def single(cls) -> "Topology":
        """One process, no groups: tools and tests."""
        return cls(Layout(), 0, Coordinates(0, 0, 0))

    @classmethod
    def create(cls, tensor: int, pipeline: int, timeout_seconds: float = 1800.0, context: int = 1) -> "Topology":
        """Lay the axes over the process group and open this rank's communicators (collective over all ranks).

        `timeout_seconds`: a collective that waits longer fails.
        Raises ValueError if tensor x pipeline x context does not divide the world.
        """
        world = dist.get_world_size()
        if world % (tensor * pipeline * context):
            sizes = f"tensor {tensor} x pipeline {pipeline}" + (f" x context {context}" if context > 1 else "")
            raise ValueError(f"{sizes} does not divide a world of {world} ranks")
        layout, rank = Layout(tensor, pipeline, world // (tensor * pipeline), context), dist.get_rank()
        at, stages = layout.coordinates(rank), layout.pipeline_ranks(rank)

        def group(ranks: list[int]) -> ProcessGroup | None:
            return _group(ranks, timedelta(seconds=timeout_seconds))

        return cls(
            layout,
            rank,
            at,
            tensor_group=group(layout.tensor_ranks(rank)),
            data_group=group(layout.data_ranks(rank)),
            model_group=group(layout.model_ranks(rank)),
            context_group=group(layout.context_ranks(rank)),
            world_group=group(list(range(world))),
            towards_last=group(stages),
            towards_first=group(stages),
            ends_group=group([stages[0], stages[-1]]) if pipeline > 1 and at.pipeline in (0, pipeline - 1) else None,
        )


def _group(ranks: list[int], timeout: timedelta) -> ProcessGroup | None:
    """A communicator of these ranks; only they take part in its making, so that it costs the same in a world of thousands."""
    if len(ranks) == 1:
        return None
    return dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
