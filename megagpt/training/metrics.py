"""Numbers that ranks have in parts, put together: the same value on every rank."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.parallel.topology import Topology


def count_tokens(mine: int, topology: Topology, device: torch.device) -> int:
    """Tokens with a label in the global batch, from this data rank's number."""
    if topology.data_group is None:
        return mine
    total = torch.tensor(mine, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=topology.data_group)
    return int(total)


class Agreed(NamedTuple):
    """What all ranks know of a step before its update: one sum over the world."""

    loss: float
    """Mean over all tokens, in nats."""
    asked_to_end: bool
    """Whether any rank was."""


def agree(loss_sum: Tensor | None, n_tokens: int, asked_to_end: bool, topology: Topology, device: torch.device) -> Agreed:
    """The step's loss and whether any rank was asked to end, with the same bits on every rank (collective).

    `loss_sum` is None off the last stage; tensor ranks hold the same one, of which the first counts.
    """
    loss = float(loss_sum) if loss_sum is not None and topology.at.tensor == 0 else 0.0
    numbers = torch.tensor([loss, asked_to_end], dtype=torch.float64, device=device)
    if topology.world_group is not None:
        dist.all_reduce(numbers, group=topology.world_group)
    total, asked = numbers.tolist()
    return Agreed(total / max(1, n_tokens), asked > 0)  # of documents of one token each there is no loss at their ends


def global_loss(loss_sum: Tensor | None, n_tokens: int, topology: Topology, device: torch.device) -> float:
    """Mean loss over all tokens of all data ranks, in nats, on every rank; `loss_sum` is None off the last stage."""
    total = torch.zeros((), dtype=torch.float64, device=device) if loss_sum is None else loss_sum.double()
    if topology.data_group is not None:
        dist.all_reduce(total, group=topology.data_group)
    if topology.towards_first is not None:  # zero on all but one of its ranks
        dist.all_reduce(total, group=topology.towards_first)
    return float(total) / max(1, n_tokens)  # of documents of one token each, with no loss at their ends
