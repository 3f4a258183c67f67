"""Messages between pipeline stages: activations towards the last, gradients towards the first.

Each direction has a communicator of its own, so that opposite messages never wait for each other. A receiver
posts its receives in the order in which the sender sends (known from the plan), one message ahead of its need.
"""

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.parallel.topology import Topology
from megagpt.parallel.whereabouts import Whereabouts
from megagpt.pipeline.plan import Kind, Message


class Transfers:
    """One step's messages of one rank. All have one shape, [batch, seq, hidden]."""

    def __init__(self, topology: Topology, expected: Sequence[Message], like: Tensor, where: Whereabouts) -> None:
        """`expected`: what this rank receives, for each source in the order of its sending; `like`: shape, dtype, device."""
        self._topology, self._like, self._where = topology, like, where
        self._peers = topology.layout.pipeline_ranks(topology.rank)
        self._coming: dict[int, deque[Message]] = {}
        for message in expected:
            self._coming.setdefault(message.source, deque()).append(message)
        self._posted: dict[tuple[Kind, int, int], tuple[Tensor, dist.Work]] = {}
        self._kept: dict[tuple[Kind, int, int], Tensor] = {}
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def give(self, kind: Kind, stage: int, micro_batch: int, tensor: Tensor, to_rank: int) -> None:
        """Hand `tensor` to `stage` on pipeline rank `to_rank`; returns at once."""
        if to_rank == self._topology.at.pipeline:
            self._kept[kind, stage, micro_batch] = tensor
            return
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._peers[to_rank], group=self._group(self._topology.at.pipeline, to_rank))
        assert work is not None
        self._sending.append((work, tensor))
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()

    def take(self, kind: Kind, stage: int, micro_batch: int, from_rank: int) -> Tensor:
        """Wait for what pipeline rank `from_rank` gives this stage."""
        key = (kind, stage, micro_batch)
        if from_rank == self._topology.at.pipeline:
            return self._kept.pop(key)
        while key not in self._posted:
            self._post(from_rank)
        tensor, work = self._posted.pop(key)
        if self._coming[from_rank]:
            self._post(from_rank)
        with self._where.waiting():
            work.wait()
        return tensor

    def finish(self) -> None:
        """Wait until everything given has left."""
        with self._where.waiting():
            while self._sending:
                self._sending.popleft()[0].wait()

    def _post(self, source: int) -> None:
        message = self._coming[source].popleft()
        tensor = torch.empty_like(self._like)
        work = dist.irecv(tensor, self._peers[source], group=self._group(source, self._topology.at.pipeline))
        assert work is not None
        self._posted[message.kind, message.stage, message.micro_batch] = (tensor, work)

    def _group(self, source: int, destination: int) -> dist.ProcessGroup | None:
        return self._topology.towards_last if source < destination else self._topology.towards_first
