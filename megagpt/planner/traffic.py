"""Communication of one rank in one optimizer step: calls and bytes, counted in a dry run of the real modules.

Only ZeRO's own traffic, which DeepSpeed makes, is a formula.
"""

from typing import NamedTuple

from megagpt.config.schema import Config
from megagpt.parallel.topology import Layout
from megagpt.planner.collective_counter import CollectiveCounter, TrafficKey
from megagpt.planner.dry_run import DryRun, open_dry_run

GRADIENT_BYTES = 4
"""Gradients are reduced in fp32."""


class Amount(NamedTuple):
    """Number of calls, and bytes of the full tensors that they sum, gather, scatter or move."""

    calls: int
    bytes: int


Traffic = dict[TrafficKey, Amount]


def step_traffic(config: Config, layout: Layout, rank: int) -> Traffic:
    """Return the communication of `rank` in one optimizer step. No process group may exist; nothing is allocated.

    Included is everything except the few bytes of gradient norms and of the loss. ZeRO's reductions are counted as one call
    per chunk; there are as many as ranks that own a part of it. Not for ZeRO 3. `parallel.schedule` must not be "auto".
    """
    n_micro_batches = config.training.global_batch_size // config.training.micro_batch_size // layout.data
    traffic: Traffic = {}
    with open_dry_run(config, layout, rank) as dry_run:
        with CollectiveCounter(dry_run.topology) as per_micro_batch:
            dry_run.forward_backward()
        with CollectiveCounter(dry_run.topology) as per_step:
            dry_run.sum_gradients()
    for counter, times in ((per_micro_batch, n_micro_batches), (per_step, 1)):
        for key, calls in counter.calls.items():
            before = traffic.get(key, Amount(0, 0))
            traffic[key] = Amount(before.calls + times * calls, before.bytes + times * counter.bytes[key])
    if layout.dp_cp > 1 and config.zero.stage > 0:
        traffic |= _zero_traffic(dry_run)
    return traffic


def _zero_traffic(dry_run: DryRun) -> Traffic:
    """Return the traffic of ZeRO 1 and 2: every gradient summed once by its owner, every parameter gathered once."""
    n_parameters = dry_run.n_parameters
    return {
        TrafficKey("dp_cp", "reduce"): Amount(len(dry_run.chunks), GRADIENT_BYTES * n_parameters),
        TrafficKey("dp_cp", "all-gather"): Amount(1, dry_run.dtype.itemsize * n_parameters),
    }
