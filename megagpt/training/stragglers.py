"""Which rank the others wait for: each rank's own work, the time of its steps less what it waited for others.

Waiting is what messages between stages and sums over data ranks take. Tensor ranks wait for each other within their
products, and data ranks under ZeRO-3 for their weights, so that of these only the group can be told from others.
"""

import statistics
from typing import NamedTuple

import torch
import torch.distributed as dist

from megagpt.checkpoint.format import names, node_name
from megagpt.checkpoint.together import of_all
from megagpt.parallel.topology import Layout
from megagpt.training.engine import Engine
from megagpt.training.say import warn


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

    def __init__(self, engine: Engine, factor: float) -> None:
        """Collective."""
        self._engine, self._factor = engine, factor
        self._alone = engine.topology.layout.world_size == 1
        self._nodes = [] if self._alone else of_all(node_name())
        self._suspect: list[int] | None = None

    def look(self, seconds: float, steps: int) -> dict[str, float]:
        """For the log, from this rank's `seconds` in the last `steps` (collective); empty on one process."""
        if self._alone:
            return {}
        own = (seconds - self._engine.where.take_waited()) / steps
        found = summarise(_of_all(own, self._engine), self._engine.topology.layout)
        group = self._engine.topology.layout.tensor_ranks(found.rank)
        suspect = group if found.factor >= self._factor else None
        if suspect is not None and suspect == self._suspect:
            among = f" (tensor ranks {names(map(str, group))} wait for each other: one of them)" if len(group) > 1 else ""
            warn(
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


def _of_all(own: float, engine: Engine) -> list[float]:
    mine = torch.tensor([own], dtype=torch.float64, device=engine.device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine, group=engine.topology.world_group)
    return torch.cat(found).tolist()
