"""Messages between pipeline stages: activations to later stages, gradients to earlier stages.

Each direction has its own communicator, so messages in opposite directions never wait for each other. A receiver posts
its receives in the order in which the sender sends, which is known from the plan, one message before it needs it.
"""

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.distributed.phase import PhaseTracker
from megagpt.parallel.topology import Topology
from megagpt.schedules.plan import ActionKind, Message

MessageKey = tuple[ActionKind, int, int]
"""(kind, destination stage, micro-batch)"""
Tensors = tuple[Tensor, ...]
"""Content of a message."""


class Transfers:
    """The messages of one rank in one step."""

    def __init__(self, topology: Topology, expected: Sequence[Message], likes: Sequence[Tensors], phase: PhaseTracker) -> None:
        """`expected`: messages to receive, for each source in sending order.

        `likes`: shapes, dtype and device of the tensors between each stage and the next one.
        """
        self._topology = topology
        self._likes = likes
        self._phase = phase
        self._peers = topology.layout.ranks_along(topology.rank, "pipeline")
        self._expected: dict[int, deque[Message]] = {}
        for message in expected:
            self._expected.setdefault(message.source, deque()).append(message)
        self._posted: dict[MessageKey, list[tuple[Tensor, dist.Work]]] = {}
        self._local: dict[MessageKey, Tensors] = {}
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, kind: ActionKind, stage: int, micro_batch: int, tensors: Tensors, to_rank: int) -> None:
        """Send `tensors` to `stage` on pipeline rank `to_rank`; does not wait. A stage on this rank gets them directly."""
        if to_rank == self._topology.pp_rank:
            self._local[kind, stage, micro_batch] = tensors
            return
        for tensor in map(Tensor.contiguous, tensors):
            work = dist.isend(tensor, self._peers[to_rank], group=self._group(self._topology.pp_rank, to_rank))
            assert work is not None
            self._sending.append((work, tensor))
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()

    def receive(self, kind: ActionKind, stage: int, micro_batch: int, from_rank: int) -> Tensors:
        """Wait for the message that pipeline rank `from_rank` sends to this stage."""
        key = (kind, stage, micro_batch)
        if from_rank == self._topology.pp_rank:
            return self._local.pop(key)
        while key not in self._posted:
            self._post(from_rank)
        received = self._posted.pop(key)
        if self._expected[from_rank]:
            self._post(from_rank)
        with self._phase.waiting():
            for _, work in received:
                work.wait()
        return tuple(tensor for tensor, _ in received)

    def finish(self) -> None:
        """Wait until all messages are sent."""
        with self._phase.waiting():
            while self._sending:
                self._sending.popleft()[0].wait()

    def _post(self, source: int) -> None:
        message = self._expected[source].popleft()
        # A gradient has the shapes of the activations that the stage has sent.
        boundary = message.stage - 1 if message.kind is ActionKind.FORWARD else message.stage
        posted = []
        for tensor in map(torch.empty_like, self._likes[boundary]):
            work = dist.irecv(tensor, self._peers[source], group=self._group(source, self._topology.pp_rank))
            assert work is not None
            posted.append((tensor, work))
        self._posted[message.kind, message.stage, message.micro_batch] = posted

    def _group(self, source: int, destination: int) -> dist.ProcessGroup | None:
        return self._topology.pp_forward_group if source < destination else self._topology.pp_backward_group
