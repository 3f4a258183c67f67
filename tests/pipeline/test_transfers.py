"""Messages between stages arrive whatever the order in which they are needed, and stages on one rank need no message."""

import torch
from support.pool import Pool

from megagpt.distributed.phase import PhaseTracker
from megagpt.parallel.topology import Topology
from megagpt.pipeline.transfers import Transfers
from megagpt.planner.collective_counter import CollectiveCounter
from megagpt.schedules.plan import ActionKind, Message

FORWARD, BACKWARD = ActionKind.FORWARD, ActionKind.BACKWARD
LIKE = torch.empty(2, 3, 4)
MICRO_BATCHES = 4


def message(micro_batch: int) -> torch.Tensor:
    return torch.full(LIKE.shape, float(micro_batch)).transpose(1, 2).contiguous().transpose(1, 2)  # not contiguous


def exchange(order: list[int]) -> None:
    """Send every micro-batch to the other rank, and receive the other rank's in another order. Both directions at a time."""
    topology = Topology.create(1, 2)
    rank, other = topology.pp_rank, 1 - topology.pp_rank
    sent, received = (FORWARD, BACKWARD) if rank == 0 else (BACKWARD, FORWARD)
    expected = [Message(received, rank, micro_batch, other) for micro_batch in range(MICRO_BATCHES)]
    transfers = Transfers(topology, expected, [(LIKE,)], PhaseTracker())
    for micro_batch in range(MICRO_BATCHES):
        transfers.send(sent, other, micro_batch, (message(10 * rank + micro_batch),), other)
    for micro_batch in order:
        (tensor,) = transfers.receive(received, rank, micro_batch, other)
        assert torch.equal(tensor, message(10 * other + micro_batch))
    transfers.finish()


def test_both_directions_arrive_in_any_order_of_need(ranks: Pool) -> None:
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        ranks.run(2, exchange, order)


def test_a_stage_on_the_same_rank_gets_the_tensor_itself() -> None:
    topology = Topology()
    with CollectiveCounter(topology) as counter:
        transfers = Transfers(topology, [], [(LIKE,)], PhaseTracker())
        tensors = [message(micro_batch) for micro_batch in range(2)]
        for micro_batch, tensor in enumerate(tensors):
            transfers.send(FORWARD, 1, micro_batch, (tensor,), to_rank=0)
        assert transfers.receive(FORWARD, 1, 1, from_rank=0)[0] is tensors[1]
        assert transfers.receive(FORWARD, 1, 0, from_rank=0)[0] is tensors[0]
        transfers.finish()
    assert not counter.calls
