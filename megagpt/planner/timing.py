"""Times of work on one GPU and of collectives between GPUs. Does not import torch.

A pass takes the time of its operations at a share of the peak, plus the time of its bytes at a share of the memory bandwidth,
plus a fixed time for each kernel. Adding both terms, instead of taking the larger one, makes small and narrow products less
efficient than large ones, and the same shares hold for GPUs with different ratios of peak to bandwidth. A collective takes the
time of a ring (Thakur et al., doi 10.1177/1094342005051521) at a share of the link's bandwidth, plus a latency.
"""

from dataclasses import dataclass, replace

from megagpt.planner.hardware import Hardware
from megagpt.planner.strategy import Strategy
from megagpt.planner.work import Call, Work


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that are reached, the same for all GPUs. docs/planner.md describes how they were fitted."""

    products: float = 0.72
    """Of the peak, by matrix products without the time of their bytes."""
    attention: float = 0.35
    """Of the peak, by fused attention."""
    unhidden: float = 0.25
    """Share of the bytes of products and of attention whose time is not hidden behind their operations."""
    memory: float = 0.77
    """Of the memory bandwidth."""
    link: float = 0.65
    """Of the bandwidth within a node."""
    network: float = 0.7
    """Of the bandwidth between nodes."""
    kernel_seconds: float = 4e-6
    """Fixed time of a kernel."""
    latency_seconds: float = 20e-6
    """Fixed time of a collective."""


def calibrated(efficiency: Efficiency, hardware: Hardware) -> Efficiency:
    """Return the shares with those that were measured on the hardware."""
    gpu = hardware.gpu
    measured = {
        "products": gpu.products_share,
        "memory": gpu.memory_share,
        "link": gpu.link_share,
        "network": gpu.network_share,
    }
    return replace(efficiency, **{name: share for name, share in measured.items() if share is not None})


@dataclass(frozen=True)
class Link:
    """What the ranks of a group are joined by."""

    ranks: int
    bandwidth: float
    """Bytes per second that one rank sends, one direction, if all groups of this kind communicate at the same time."""
    between_nodes: bool


class Clock:
    """Seconds of work under a strategy on a cluster."""

    def __init__(self, hardware: Hardware, strategy: Strategy, precision: str, efficiency: Efficiency | None = None) -> None:
        """`precision`: of the matrix products of the blocks, "fp32", "bf16", "fp16" or "fp8"."""
        self.efficiency = calibrated(efficiency or Efficiency(), hardware)
        self._peak = hardware.peak_flops("bf16" if precision == "fp8" else precision)
        self._narrow_peak = hardware.peak_flops(precision)
        self._memory = hardware.gpu.memory_bandwidth * 1e9
        self.links = links(hardware, strategy, self.efficiency)

    def compute_seconds(self, work: Work) -> float:
        """Return the time of everything but the collectives."""
        share = self.efficiency
        return (
            work.flops / (share.products * self._peak)
            + work.narrow_flops / (share.products * self._narrow_peak)
            + work.core_flops / (share.attention * self._peak)
            + (work.moved + share.unhidden * work.loaded) / (share.memory * self._memory)
            + work.kernels * share.kernel_seconds
        )

    def seconds(self, work: Work) -> float:
        """Return the time of a pass; collectives that other work overlaps count as far as they take longer than it."""
        waiting = sum(self.call_seconds(call) for call in work.calls)
        left = sum(max(0.0, self.call_seconds(call) - self.compute_seconds(cover)) for call, cover in work.overlaps)
        return self.compute_seconds(work) + waiting + left

    def call_seconds(self, call: Call) -> float:
        """Return the time of collectives of one kind."""
        link = self.links[call.axis]
        if link.ranks == 1:
            return 0.0
        others = (link.ranks - 1) / link.ranks
        passes = {"all-reduce": 2 * others, "reduce-scatter": others, "all-gather": others, "all-to-all": others}
        return call.times * (call.bytes * passes.get(call.kind, 1.0) / link.bandwidth + self.efficiency.latency_seconds)


def links(hardware: Hardware, strategy: Strategy, efficiency: Efficiency) -> dict[str, Link]:
    """Return the link of each axis. Ranks are placed as in `megagpt/parallel/topology.py`: tensor ranks are neighbours."""
    per_node = hardware.gpus_per_node

    def link(ranks: int, stride: int) -> Link:
        """`stride`: distance between neighbours of the group."""
        inside = hardware.gpu.link * 1e9 * efficiency.link
        if ranks * stride <= per_node or ranks == 1:
            return Link(ranks, inside, False)
        # A ring over all members in a node uses their share of the node's network cards.
        members = max(1, min(ranks, per_node // stride))
        outside = hardware.network * 1e9 / per_node * members * efficiency.network
        return Link(ranks, min(inside, outside), True)

    tensor, context = strategy.tensor, strategy.context
    replica = strategy.shards * tensor
    return {
        "tensor": link(tensor, 1),
        "context": link(context, tensor),
        "dp_cp": link(strategy.shards, tensor),
        "pipeline": link(strategy.pipeline, replica),
        "embedding": link(min(2, strategy.pipeline), replica * max(1, strategy.pipeline - 1)),
    }
