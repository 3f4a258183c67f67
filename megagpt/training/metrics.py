"""Numbers that ranks have in parts, put together: the same value on every rank."""

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


def global_loss(loss_sum: Tensor | None, n_tokens: int, topology: Topology, device: torch.device) -> float:
    """Mean loss over all tokens of all data ranks, in nats, on every rank; `loss_sum` is None off the last stage."""
    total = torch.zeros((), dtype=torch.float64, device=device) if loss_sum is None else loss_sum.double()
    if topology.data_group is not None:
        dist.all_reduce(total, group=topology.data_group)
    if topology.towards_first is not None:  # zero on all but one of its ranks
        dist.all_reduce(total, group=topology.towards_first)
    return float(total) / max(1, n_tokens)  # of documents of one token each, with no loss at their ends
