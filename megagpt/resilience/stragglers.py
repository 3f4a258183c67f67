"""Which rank the others wait for: each rank's own work, the time of its steps less what it waited for others.

Waiting is what messages between stages and sums over data ranks take. Tensor ranks wait for each other within their
products, and data ranks under ZeRO-3 for their weights, so that of these only the group can be told from others.
"""

import statistics
from typing import NamedTuple

import torch
import torch.distributed as dist

from megagpt.checkpoint.check import Warn
from megagpt.checkpoint.together import of_all
from megagpt.errors import listed
from megagpt.parallel.topology import Layout, Topology
from megagpt.parallel.whereabouts import Whereabouts, node_name


class Summary(NamedTuple):
    """Seconds of own work in a step, over all ranks."""

    fastest: float
    median: float
    slowest: float
    rank: int
    """The slowest, beside the others of its stage."""
    factor: float
    """Its time in those of the typical rank of its stage; in a stage of one rank, of all ranks."""


def summarise(seconds: list[float], layout: Layout) -> Summary:
    """`seconds` by rank. Stages have other layers, so that a rank is compared with those of its own stage first."""
    factors = []
    for rank, own in enumerate(seconds):
        stage = layout.coordinates(rank).pipeline
        peers = [other for r, other in enumerate(seconds) if layout.coordinates(r).pipeline == stage]
        typical = statistics.median_low(peers if len(peers) > 1 else seconds)
        factors.append(own / typical if typical > 0 else 1.0)
    rank = max(range(len(seconds)), key=factors.__getitem__)
    return Summary(min(seconds), statistics.median(seconds), seconds[rank], rank, factors[rank])


class Stragglers:
    """The summary at each report, and a warning when the same rank is far behind at two in a row."""

    def __init__(self, where: Whereabouts, topology: Topology, device: torch.device, factor: float, warn: Warn) -> None:
        """Collective."""
        self._where, self._topology, self._device, self._factor, self._warn = where, topology, device, factor, warn
        self._alone = topology.layout.world_size == 1
        self._nodes = [] if self._alone else of_all(node_name())
        self._suspect: list[int] | None = None

    def look(self, seconds: float, steps: int) -> dict[str, float]:
        """For the log, from this rank's `seconds` in the last `steps` (collective); empty on one process."""
        if self._alone:
            return {}
        own = (seconds - self._where.take_waited()) / steps
        found = summarise(self._of_all(own), self._topology.layout)
        group = self._topology.layout.tensor_ranks(found.rank)
        suspect = group if found.factor >= self._factor else None
        if suspect is not None and suspect == self._suspect:
            among = f" (tensor ranks {listed(map(str, group))} wait for each other: one of them)" if len(group) > 1 else ""
            self._warn(
                f"straggler: rank {found.rank} on {self._nodes[found.rank]}{among} works {found.slowest:.3f} s a step, "
                f"{found.factor:.1f} times as long as others of its stage, which wait for it"
            )
        self._suspect = suspect
        return {
            "own_seconds_fastest": found.fastest,
            "own_seconds_median": found.median,
            "own_seconds_slowest": found.slowest,
            "slowest_rank": found.rank,
        }

    def _of_all(self, own: float) -> list[float]:
        mine = torch.tensor([own], dtype=torch.float64, device=self._device)
        found = [torch.empty_like(mine) for _ in range(self._topology.layout.world_size)]
        dist.all_gather(found, mine, group=self._topology.world_group)
        return torch.cat(found).tolist()
