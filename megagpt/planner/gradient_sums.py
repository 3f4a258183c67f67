"""Gradient sums and parameter gathers of a step: their collectives, and how much of their time no computation hides.

As `megagpt/engine/gradient_sync.py`, `megagpt/engine/reduction.py` and ZeRO make them. Does not import torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.config.schema import Config
from megagpt.planner.layer_sizes import ITEMSIZE, LayerCost
from megagpt.planner.memory import GRADIENT_BYTES, shared_on_rank
from megagpt.planner.stages import Stage
from megagpt.planner.strategy import Strategy
from megagpt.planner.timing import Clock
from megagpt.planner.work import Call
from megagpt.schedules.registry import placement, splits_backward

KINDS = {0: "all-reduce", 1: "reduce", 2: "reduce", 3: "reduce-scatter"}
"""ZeRO stage -> collective of the gradients."""


@dataclass(frozen=True)
class GradientSums:
    """Collectives after the backwards."""

    by_stage: list[list[Call]]
    shared: list[Call]
    """Of the parameters that several places of the model share, after all stages."""


def gradient_sums(config: Config, strategy: Strategy, stages: Sequence[Stage], own: Sequence[int]) -> GradientSums:
    """Return the sums of gradients of a rank with the stages `own`."""

    def shards(n_parameters: int) -> list[Call]:
        if strategy.shards == 1 or n_parameters == 0:
            return []
        return [Call("dp_cp", KINDS[strategy.zero_stage], GRADIENT_BYTES * n_parameters)]

    by_stage = []
    for stage in own:
        partial = stages[stage].partial
        calls = [Call("tensor", "all-reduce", GRADIENT_BYTES * partial)] if partial and strategy.tensor > 1 else []
        by_stage.append(calls + shards(stages[stage].own_parameters))
    owners = placement(strategy.schedule, strategy.pipeline, strategy.virtual_stages)
    shared = shared_on_rank(stages, own)
    over_stages = [
        Call("embedding", "all-reduce", GRADIENT_BYTES * size)
        for name, size in shared.items()
        if len({owners[index] for index, stage in enumerate(stages) if name in stage.shared}) > 1
    ]
    return GradientSums(by_stage, over_stages + shards(sum(shared.values())))


def exposed_seconds(config: Config, strategy: Strategy, stage: Stage, calls: Sequence[Call], clock: Clock) -> float:
    """Return the time from the end of a stage's last backward to the end of its sums `calls`.

    Sums over the tensor ranks wait. Those over the replicas are divided into buckets of blocks, each of which starts when the
    backward has passed its blocks; the first blocks and the embedding, which are in no bucket, start at the end.
    """
    waiting = sum(clock.call_seconds(call) for call in calls if call.axis != "dp_cp")
    replicas = [call for call in calls if call.axis == "dp_cp"]
    if not replicas or not has_buckets(config, strategy):
        return waiting + sum(clock.call_seconds(call) for call in replicas)
    (call,) = replicas
    now = free = 0.0
    in_buckets = 0
    for cost, n_parameters in buckets(config, stage):
        now += clock.seconds(cost.backward)
        if n_parameters:
            in_buckets += n_parameters
            free = max(free, now) + clock.call_seconds(call._replace(bytes=GRADIENT_BYTES * n_parameters))
    rest = call._replace(bytes=call.bytes - GRADIENT_BYTES * in_buckets)
    return waiting + max(free - now, 0.0) + clock.call_seconds(rest)


def has_buckets(config: Config, strategy: Strategy) -> bool:
    """Return whether gradients are summed during the last backward of a chunk."""
    return gathers_in_buckets(config, strategy) and not splits_backward(strategy.schedule)


def gathers_in_buckets(config: Config, strategy: Strategy) -> bool:
    """Return whether updated weights are gathered during the next forward."""
    return strategy.zero_stage in (1, 2) and config.zero.offload_optimizer == "none"


def buckets(config: Config, stage: Stage) -> list[tuple[LayerCost, int]]:
    """Return the parts of a stage in the order of the backward, each with the parameters of the bucket that it completes, or 0.

    As `make_buckets` in `megagpt/engine/reduction.py` divides the blocks.
    """
    least, waiting, result = config.zero.reduce_bucket_mib * 2**20, 0, list[tuple[LayerCost, int]]()
    blocks = stage.blocks
    for index, cost in reversed(list(enumerate(stage.costs))):
        ready = 0
        if index in blocks[1:]:
            waiting += cost.parameters
            if GRADIENT_BYTES * waiting >= least:
                ready, waiting = waiting, 0
        result.append((cost, ready))
    return result


def parameter_gather(config: Config, strategy: Strategy, n_parameters: int) -> list[Call]:
    """Return the gather of updated weights of ZeRO 1 and 2."""
    if strategy.shards == 1 or strategy.zero_stage not in (1, 2):
        return []
    return [Call("dp_cp", "all-gather", ITEMSIZE[config.training.weight_precision] * n_parameters)]


def exposed_gather_seconds(
    config: Config, strategy: Strategy, stages: Sequence[Stage], n_parameters: int, clock: Clock
) -> float:
    """Return how much longer the first forwards of a rank with these stages take because they wait for updated weights.

    What is in no bucket is gathered first and waited for. Each bucket is waited for by its first block.
    """
    calls = parameter_gather(config, strategy, n_parameters)
    if not calls:
        return 0.0
    (call,) = calls
    if not gathers_in_buckets(config, strategy):
        return clock.call_seconds(call)
    parts = [part for stage in stages for part in reversed(buckets(config, stage))]
    itemsize = call.bytes / n_parameters
    arrived = now = clock.call_seconds(call._replace(bytes=call.bytes - itemsize * sum(size for _, size in parts)))
    computed = 0.0
    for cost, size in parts:
        if size:
            arrived += clock.call_seconds(call._replace(bytes=itemsize * size))
            now = max(now, arrived)
        now += clock.seconds(cost.forward)
        computed += clock.seconds(cost.forward)
    return now - computed
