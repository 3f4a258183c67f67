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
    per chunk; there are as many as ranks that own a part of it. `parallel.schedule` must not be "auto".
    """
    n_micro_batches = config.training.global_batch_size // config.training.micro_batch_size // layout.data
    with open_dry_run(config, layout, rank) as dry_run:
        return count_traffic(dry_run, n_micro_batches)


def count_traffic(dry_run: DryRun, n_micro_batches: int) -> Traffic:
    """Run one micro-batch and the sums of the gradients; return the communication of a step of `n_micro_batches`."""
    traffic: Traffic = {}
    with CollectiveCounter(dry_run.topology) as per_micro_batch:
        dry_run.forward_backward()
    with CollectiveCounter(dry_run.topology) as per_step:
        dry_run.sum_gradients()
    for counter, times in ((per_micro_batch, n_micro_batches), (per_step, 1)):
        for key, calls in counter.calls.items():
            before = traffic.get(key, Amount(0, 0))
            traffic[key] = Amount(before.calls + times * calls, before.bytes + times * counter.bytes[key])
    zero = ZERO_TRAFFIC[dry_run.config.zero.stage]
    return traffic | (zero(dry_run, n_micro_batches) if dry_run.topology.layout.dp_cp > 1 else {})


def _no_zero(dry_run: DryRun, n_micro_batches: int) -> Traffic:
    """Return nothing: the gradients' sums of ZeRO 0 are counted."""
    return {}


def _zero_1_and_2(dry_run: DryRun, n_micro_batches: int) -> Traffic:
    """Return the traffic of ZeRO 1 and 2: every gradient summed once by its owner, every parameter gathered once."""
    n_parameters = dry_run.n_parameters
    return {
        TrafficKey("dp_cp", "reduce"): Amount(len(dry_run.chunks), GRADIENT_BYTES * n_parameters),
        TrafficKey("dp_cp", "all-gather"): Amount(1, dry_run.dtype.itemsize * n_parameters),
    }


def _zero_3(dry_run: DryRun, n_micro_batches: int) -> Traffic:
    """Return the traffic of ZeRO 3: parameters gathered for every forward and backward, each gradient summed once by its owner.

    Counted as one call each; DeepSpeed gathers in buckets, and keeps small parameters on every rank.
    """
    n_parameters = dry_run.n_parameters
    gathers = 2 * n_micro_batches
    return {
        TrafficKey("dp_cp", "reduce-scatter"): Amount(1, GRADIENT_BYTES * n_parameters),
        TrafficKey("dp_cp", "all-gather"): Amount(gathers, gathers * dry_run.dtype.itemsize * n_parameters),
    }


ZERO_TRAFFIC = {0: _no_zero, 1: _zero_1_and_2, 2: _zero_1_and_2, 3: _zero_3}
"""ZeRO stage -> its traffic."""
