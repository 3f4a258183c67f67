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


class Transfers:
    """The messages of one rank in one step. All have the same shape, [batch, seq, hidden]."""

    def __init__(self, topology: Topology, expected: Sequence[Message], like: Tensor, phase: PhaseTracker) -> None:
        """`expected`: messages to receive, for each source in sending order; `like`: shape, dtype and device of a message."""
        self._topology = topology
        self._like = like
        self._phase = phase
        self._peers = topology.layout.ranks_along(topology.rank, "pipeline")
        self._expected: dict[int, deque[Message]] = {}
        for message in expected:
            self._expected.setdefault(message.source, deque()).append(message)
        self._posted: dict[MessageKey, tuple[Tensor, dist.Work]] = {}
        self._local: dict[MessageKey, Tensor] = {}
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, kind: ActionKind, stage: int, micro_batch: int, tensor: Tensor, to_rank: int) -> None:
        """Send `tensor` to `stage` on pipeline rank `to_rank`; does not wait. A stage on this rank gets it directly."""
        if to_rank == self._topology.pp_rank:
            self._local[kind, stage, micro_batch] = tensor
            return
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._peers[to_rank], group=self._group(self._topology.pp_rank, to_rank))
        assert work is not None
        self._sending.append((work, tensor))
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()

    def receive(self, kind: ActionKind, stage: int, micro_batch: int, from_rank: int) -> Tensor:
        """Wait for the message that pipeline rank `from_rank` sends to this stage."""
        key = (kind, stage, micro_batch)
        if from_rank == self._topology.pp_rank:
            return self._local.pop(key)
        while key not in self._posted:
            self._post(from_rank)
        tensor, work = self._posted.pop(key)
        if self._expected[from_rank]:
            self._post(from_rank)
        with self._phase.waiting():
            work.wait()
        return tensor

    def finish(self) -> None:
        """Wait until all messages are sent."""
        with self._phase.waiting():
            while self._sending:
                self._sending.popleft()[0].wait()

    def _post(self, source: int) -> None:
        message = self._expected[source].popleft()
        tensor = torch.empty_like(self._like)
        work = dist.irecv(tensor, self._peers[source], group=self._group(source, self._topology.pp_rank))
        assert work is not None
        self._posted[message.kind, message.stage, message.micro_batch] = (tensor, work)

    def _group(self, source: int, destination: int) -> dist.ProcessGroup | None:
        return self._topology.pp_forward_group if source < destination else self._topology.pp_backward_group
