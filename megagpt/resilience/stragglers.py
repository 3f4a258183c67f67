"""Find the rank that others wait for: compare each rank's compute time, its step time minus the time it waits for others.

Waiting is counted in messages between stages and in gradient reductions. Tensor ranks wait for each other inside matrix
products, and data-parallel ranks under ZeRO-3 wait for weights, so within these groups only the group can be named.
"""

import statistics
from typing import NamedTuple

import torch
import torch.distributed as dist

from megagpt.distributed.object_collectives import all_gather_object
from megagpt.distributed.phase import PhaseTracker, host_name
from megagpt.distributed.rank_zero import rank_zero_warn
from megagpt.errors import listed
from megagpt.parallel.topology import Layout, Topology


class Summary(NamedTuple):
    """Compute seconds per step over all ranks."""

    min: float
    median: float
    max: float
    """Compute seconds of `rank`."""
    rank: int
    """The slowest rank, compared with the others of its stage."""
    factor: float
    """Its ratio to the median of its stage (of all ranks if it is alone in its stage)."""


def summarise(seconds: list[float], layout: Layout) -> Summary:
    """Summarise compute seconds, ordered by rank. Stages have different layers, so a rank is compared within its stage."""
    factors = []
    for rank, own in enumerate(seconds):
        stage = layout.coordinates(rank).pipeline
        peers = [other for r, other in enumerate(seconds) if layout.coordinates(r).pipeline == stage]
        typical = statistics.median_low(peers if len(peers) > 1 else seconds)
        factors.append(own / typical if typical > 0 else 1.0)
    rank = max(range(len(seconds)), key=factors.__getitem__)
    return Summary(min(seconds), statistics.median(seconds), seconds[rank], rank, factors[rank])


class Stragglers:
    """Reports compute times, and warns if the same rank is far behind in two reports in a row."""

    def __init__(self, phase: PhaseTracker, topology: Topology, device: torch.device, factor: float) -> None:
        """Exchange host names. Collective. `factor`: ratio to the median from which a rank counts as a straggler."""
        self._phase = phase
        self._topology = topology
        self._device = device
        self._factor = factor
        self._single = topology.layout.world_size == 1
        self._hosts = [] if self._single else all_gather_object(host_name())
        self._suspects: list[int] | None = None

    def report(self, seconds: float, steps: int) -> dict[str, float]:
        """Return compute times for the log; empty on one process. Collective.

        `seconds`: time of this rank's last `steps` steps.
        """
        if self._single:
            return {}
        compute_seconds = (seconds - self._phase.take_wait_seconds()) / steps
        summary = summarise(self._gather(compute_seconds), self._topology.layout)
        group = self._topology.layout.ranks_along(summary.rank, "tensor")
        suspects = group if summary.factor >= self._factor else None
        if suspects is not None and suspects == self._suspects:
            note = f" (or another of the tensor ranks {listed(map(str, group))})" if len(group) > 1 else ""
            rank_zero_warn(
                f"straggler: rank {summary.rank} ({self._hosts[summary.rank]}){note} computes {summary.max:.3f} s/step, "
                f"{summary.factor:.1f}x the median of its stage"
            )
        self._suspects = suspects
        return {
            "compute_seconds_min": summary.min,
            "compute_seconds_median": summary.median,
            "compute_seconds_max": summary.max,
            "slowest_rank": summary.rank,
        }

    def _gather(self, seconds: float) -> list[float]:
        local = torch.tensor([seconds], dtype=torch.float64, device=self._device)
        gathered = [torch.empty_like(local) for _ in range(self._topology.layout.world_size)]
        dist.all_gather(gathered, local, group=self._topology.world_group)
        return torch.cat(gathered).tolist()
