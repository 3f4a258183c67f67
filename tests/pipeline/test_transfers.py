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


def exchange_tuples() -> None:
    """Three stages on ranks 0, 1 and 0: the second hands on two tensors of different shapes, and gets their gradients."""
    topology = Topology.create(1, 2)
    rank, other = topology.pp_rank, 1 - topology.pp_rank
    long, short = torch.arange(12.0).view(2, 6), torch.arange(4.0).view(2, 2)
    forward, backward = Message(FORWARD, 1, 0, 0), Message(BACKWARD, 1, 0, 0)
    expected = [forward, backward] if rank == 1 else [Message(FORWARD, 2, 0, 1)]
    transfers = Transfers(topology, expected, [(long,), (long, short)], PhaseTracker())
    if rank == 0:
        transfers.send(FORWARD, 1, 0, (long,), other)
        received = transfers.receive(FORWARD, 2, 0, other)
        transfers.send(BACKWARD, 1, 0, (received[0] + 1, received[1] + 1), other)
    else:
        (received_long,) = transfers.receive(FORWARD, 1, 0, other)
        transfers.send(FORWARD, 2, 0, (received_long, short), other)
        received = transfers.receive(BACKWARD, 1, 0, other)
    assert torch.equal(received[0], long + rank) and torch.equal(received[1], short + rank)
    transfers.finish()


def test_a_message_can_have_several_tensors(ranks: Pool) -> None:
    ranks.run(2, exchange_tuples)


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
