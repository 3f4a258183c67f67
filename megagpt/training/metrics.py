"""Reductions of per-rank numbers to values that are equal on all ranks."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.parallel.topology import Topology


def sum_tokens(local_tokens: int, topology: Topology, device: torch.device) -> Tensor:
    """Return the unmasked tokens of all ranks' shares of a batch, an fp64 scalar on the device. Collective.

    The result stays on the device, so the host does not wait for it.
    """
    total = torch.tensor(local_tokens, dtype=torch.float64, device=device)
    if topology.dp_cp_group is not None:
        dist.all_reduce(total, group=topology.dp_cp_group)
    return total


class LossSummary(NamedTuple):
    """Loss of a step or an evaluation, bitwise equal on all ranks."""

    loss: float
    """Mean over all unmasked tokens, in nats; 0 if every label is masked."""
    n_tokens: int
    stop_requested: bool
    """Some rank was asked to stop."""


def reduce_loss(
    loss_sum: Tensor | None, n_tokens: Tensor, topology: Topology, device: torch.device, stop_requested: bool = False
) -> LossSummary:
    """Reduce the sums of token losses of all ranks to their mean, with one all-reduce and one read from the device.

    `loss_sum`: None except on the last stage; tensor ranks hold equal sums, of which the first counts. `n_tokens`: of the
    global batch, from `sum_tokens`. Collective.
    """
    numbers = torch.tensor([0.0, stop_requested], dtype=torch.float64, device=device)
    if loss_sum is not None and topology.tp_rank == 0:
        numbers[0] += loss_sum
    if topology.world_group is not None:
        dist.all_reduce(numbers, group=topology.world_group)
    total, stop_requests, tokens = torch.cat([numbers, n_tokens.view(1)]).tolist()
    return LossSummary(total / max(1, tokens), int(tokens), stop_requests > 0)


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class LossMean:
    """Mean training loss since the last record, weighted by unmasked tokens. Steps without an update are only counted."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._n_tokens = 0
        self._last = math.nan
        self.skipped = 0
        """Steps without an update."""

    def add(self, loss: float, n_tokens: int, skipped: bool) -> None:
        """Count one step."""
        self._last = loss
        if skipped:
            self.skipped += 1
            return
        self._sum += loss * n_tokens
        self._n_tokens += n_tokens

    @property
    def mean(self) -> float:
        """The mean loss per token; the loss of the last step if no step had an update."""
        return self._sum / self._n_tokens if self._n_tokens else self._last
