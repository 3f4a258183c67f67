"""Time and memory of a strategy without simulating its schedule, for the search. Does not import torch.

Bubbles come from closed formulas (Narayanan et al., arXiv 2104.04473; Qi et al., arXiv 2401.10241). They are exact for 1F1B and
GPipe and close for the others; equal layers are assumed to be spread evenly. `tests/planner/test_search.py` has the errors.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache

from megagpt.planner.gradient_sums import KINDS, gathers_in_buckets, has_buckets, parameter_gather
from megagpt.planner.layer_sizes import LayerCost
from megagpt.planner.memory import GRADIENT_BYTES, MemoryEstimate, estimate, message_bytes
from megagpt.planner.model_parts import EMBEDDING, OUTPUT, Kind
from megagpt.planner.predict import Planner
from megagpt.planner.rank_work import optimizer_work
from megagpt.planner.stage_times import StageTimes
from megagpt.planner.strategy import Strategy
from megagpt.planner.timing import Clock
from megagpt.planner.work import Call, Overlap, Work
from megagpt.schedules.plan import ActionKind
from megagpt.schedules.registry import make_plan, placement, splits_backward

DELAYED = ("zb_h1", "interleaved_zero_bubble")
"""Schedules whose rank r delays weight gradients by r backwards."""
NAMES = tuple(field.name for field in fields(StageTimes))


@dataclass(frozen=True)
class QuickEstimate:
    """Approximate time and memory of a step."""

    seconds: float
    memory: MemoryEstimate


@dataclass(frozen=True)
class _Layers:
    """Times and sizes of the parts of the model, for one micro-batch and rank."""

    block: StageTimes
    """The mean of all blocks."""
    by_kind: dict[Kind, StageTimes]
    first: StageTimes
    last: StageTimes
    block_parameters: int
    block_saved: float
    block_deferred: float
    block_working: int
    embedding: LayerCost
    output: LayerCost


def in_flight(name: str, ranks: int, micro_batches: int, chunks: int) -> int:
    """Return the largest number of (chunk, micro-batch) pairs in flight on a rank, at most a few too high."""
    rounds = max(1, micro_batches // ranks)
    first_round = -(-micro_batches // rounds)
    limits = {
        "1f1b": ranks,
        "gpipe": micro_batches,
        "zb_h1": ranks,
        "zbv": 2 * ranks,
        "v_half": ranks + 2,
        "v_min": 2 * (ranks + 2) // 3 + 2,
        "interleaved_1f1b": (chunks - 1) * first_round + 2 * (ranks - 1) + 1,
        "interleaved_zero_bubble": (chunks - 1) * first_round + ranks,
    }
    return min(micro_batches * chunks, limits[name])


def held_bytes(name: str, ranks: int, micro_batches: int, chunks: int, saved: float, deferred: float) -> float:
    """Return the largest sum of what a rank holds: `saved` from F to I of a chunk, `deferred` from I to W."""
    flying = in_flight(name, ranks, micro_batches, chunks)
    if name in DELAYED:  # the last rank delays W by as many backwards as there are other ranks
        delayed = min(ranks - 1, flying)
        return max(flying * saved, (flying - delayed) * saved + delayed * deferred)
    if not splits_backward(name):
        return flying * saved
    pairs = _held_pairs(name, ranks, min(micro_batches, 2 * ranks))
    return max(first * saved + second * deferred for first, second in pairs)


def _held_at_end(name: str, ranks: int, micro_batches: int, chunks: int, chunk: float, largest: float) -> float:
    """Return what the rank of the last stage holds of its blocks; `largest`: what the first rank does, or what is delayed."""
    if name in DELAYED or name == "gpipe":
        return largest
    if name == "interleaved_1f1b":
        rounds = max(1, micro_batches // ranks)
        return ((chunks - 1) * -(-micro_batches // rounds) + 1) * chunk
    return chunk if chunks == 1 else largest / 2


@lru_cache(256)
def _held_pairs(name: str, ranks: int, micro_batches: int) -> tuple[tuple[int, int], ...]:
    """Return the largest pairs of (chunks between F and I, chunks between I and W) of any rank."""
    most: dict[int, int] = {}
    for order in make_plan(name, ranks, micro_batches).actions:
        first = second = 0
        for action in order:
            if action.kind is ActionKind.FORWARD:
                first += 1
            elif action.kind is ActionKind.BACKWARD_INPUT:
                first, second = first - 1, second + 1
            else:
                second -= 1
            most[first] = max(most.get(first, 0), second)
    return tuple(most.items())


def pipeline_seconds(name: str, ranks: int, micro_batches: int, chunks: int, times: StageTimes, transfer: float) -> float:
    """Return the time of a step of a pipeline with equal ranks; `times`: of one micro-batch on all chunks of a rank."""
    splits = splits_backward(name)
    forward, inputs, weights = times.forward / chunks, times.input_backward / chunks, times.weight_backward / chunks
    backward = inputs + weights if splits else times.backward / chunks
    total = forward + backward
    period = chunks * total
    if ranks == 1:
        return micro_batches * period
    others = ranks - 1
    bubble = {
        "1f1b": others * total,
        "gpipe": others * total,
        "interleaved_1f1b": others * total,
        "zb_h1": others * max(forward + inputs - weights, 0.0),
        "interleaved_zero_bubble": others * max(forward + inputs - weights, 0.0),
        "zbv": others * (abs(forward + inputs - 2 * weights) + total / 6),
        "v_half": others * total * 0.55,
        "v_min": others * total * 0.75,
    }[name]
    # The action lists of these fit equal times; others lengthen each round.
    if name == ("v_half" if ranks > 2 else "v_min"):
        period = max(period, 2 * forward + 4 * inputs)
    elif name == "v_min":
        period = max(period, 6 * max(forward, inputs))
    seconds = micro_batches * period + bubble + 2 * others * transfer
    if name == "1f1b":  # a rank waits for the answer to each micro-batch
        seconds += 2 * micro_batches * transfer * others / ranks
    return seconds


class QuickEstimator:
    """Estimates for many strategies of one config and cluster."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._layers = lru_cache(None)(self._times_of_layers)
        self._counts = lru_cache(None)(planner.model.block_counts_by_stage)

    def estimate(self, strategy: Strategy) -> QuickEstimate:
        """Return time and memory of a strategy."""
        config, clock = self._planner.config, self._planner.clock(strategy)
        layers = self._layers(
            Strategy(
                tensor=strategy.tensor,
                context=strategy.context,
                data=strategy.data if strategy.zero_stage == 3 else 1,
                sequence_parallel=strategy.sequence_parallel,
                zero_stage=strategy.zero_stage if strategy.zero_stage == 3 else 1,
                micro_batch=strategy.micro_batch,
                recompute=strategy.recompute,
                recompute_layers=strategy.recompute_layers,
                compiled=strategy.compiled,
            )
        )
        times = self._largest_rank(strategy, layers)
        transfer = clock.call_seconds(Call("pipeline", "send", message_bytes(config, strategy)))
        memory = self._memory(strategy, layers)
        step = pipeline_seconds(strategy.schedule, strategy.pipeline, strategy.micro_batches, strategy.chunks, times, transfer)
        return QuickEstimate(step + self._after_backward(strategy, clock, memory.parameters, times), memory)

    def _largest_rank(self, strategy: Strategy, layers: _Layers) -> StageTimes:
        """Return the times of the rank that computes longest."""
        if len(layers.by_kind) == 1:
            return _rank_of_equal_blocks(layers, self._planner.config.model.n_blocks, strategy.stages, strategy.chunks)
        totals = [[0.0] * len(NAMES) for _ in range(strategy.pipeline)]
        owners = placement(strategy.schedule, strategy.pipeline, strategy.virtual_stages)
        for owner, counts in zip(owners, self._counts(strategy.stages), strict=True):
            for kind, count in counts.items():
                totals[owner] = _plus(totals[owner], layers.by_kind[kind], count)
        for owner, end in ((owners[0], layers.first), (owners[-1], layers.last)):
            totals[owner] = _plus(totals[owner], end, 1)
        return StageTimes(*max(totals, key=lambda times: times[0] + times[1]))

    def _after_backward(self, strategy: Strategy, clock: Clock, n_parameters: int, times: StageTimes) -> float:
        """Return the time after the last backward, and that of the next forward for its weights. `times`: of the rank."""
        config = self._planner.config
        exposed = n_parameters / (strategy.chunks if strategy.zero_stage else 1)
        gathers = sum(clock.call_seconds(call) for call in parameter_gather(config, strategy, n_parameters))
        update = clock.compute_seconds(optimizer_work(config, strategy, n_parameters))
        sums = clock.call_seconds(Call("dp_cp", KINDS[strategy.zero_stage], GRADIENT_BYTES * exposed))
        embedding = config.model.padded_vocab_size // strategy.tensor * config.model.n_embd
        if has_buckets(config, strategy):  # the embedding's sum is never hidden
            last = GRADIENT_BYTES * min(exposed, embedding)
            backward = times.backward / strategy.chunks
            sums = max(sums - backward, clock.call_seconds(Call("dp_cp", KINDS[strategy.zero_stage], last)))
        if gathers_in_buckets(config, strategy):
            first = sum(clock.call_seconds(call) for call in parameter_gather(config, strategy, min(n_parameters, embedding)))
            gathers = max(gathers - times.forward, first)
        return sums + gathers + update

    def _memory(self, strategy: Strategy, layers: _Layers) -> MemoryEstimate:
        """Return the memory of the first rank, or of the last one if it needs more."""
        config = self._planner.config
        model = config.model
        # A rank with several chunks rarely has the largest number of layers in each.
        per_chunk = model.n_blocks / strategy.stages if strategy.chunks > 1 else -(-model.n_blocks // strategy.stages)
        held = math.ceil(per_chunk * strategy.chunks)
        kept = sum(self._planner.model.kept(strategy, range(math.ceil(per_chunk))))
        chunk = per_chunk * layers.block_saved + kept
        head = model.padded_vocab_size // strategy.tensor * model.n_embd
        blocks = held * layers.block_parameters
        working = layers.block_working
        last_saved = layers.output.saved + layers.output.held
        if strategy.pipeline == 1:
            n_parameters = blocks + layers.embedding.parameters + layers.output.parameters
            n_parameters += 0 if model.tie_embeddings else head
            largest, working = max(head, layers.block_parameters), max(working, layers.output.working)
            return estimate(config, strategy, n_parameters, chunk + last_saved, largest, working)
        largest = max(head, layers.block_parameters)
        name, ranks, micro_batches = strategy.schedule, strategy.pipeline, strategy.micro_batches
        held_chunks = held_bytes(name, ranks, micro_batches, strategy.chunks, chunk, per_chunk * layers.block_deferred)
        first = estimate(config, strategy, blocks + layers.embedding.parameters, held_chunks, largest, working)
        # Each delayed weight gradient of the output layer is as large as its weight.
        n_delayed = min(ranks - 1, micro_batches) / strategy.chunks if name in DELAYED else 0
        delayed = n_delayed * layers.output.deferred
        at_end = estimate(
            config,
            strategy,
            blocks + head + layers.output.parameters,
            _held_at_end(name, ranks, micro_batches, strategy.chunks, chunk, held_chunks) + last_saved + delayed,
            largest,
            max(working, layers.output.working),
        )
        return max(first, at_end, key=lambda memory: memory.total)

    def _times_of_layers(self, strategy: Strategy) -> _Layers:
        planner = self._planner
        clock = planner.clock(strategy)
        costs, counts = planner.model.costs(strategy), planner.model.block_counts
        total = sum(counts.values())
        parts = [(count / total, costs[kind], _times(costs[kind], strategy, clock)) for kind, count in counts.items()]
        block = StageTimes(*(sum(share * getattr(times, name) for share, _, times in parts) for name in NAMES))
        return _Layers(
            block,
            {kind: times for kind, (_, _, times) in zip(counts, parts, strict=True)},
            _times(costs[EMBEDDING], strategy, clock),
            _times(costs[OUTPUT], strategy, clock),
            round(sum(share * cost.parameters for share, cost, _ in parts)),
            sum(share * cost.saved for share, cost, _ in parts),
            sum(share * cost.deferred for share, cost, _ in parts),
            max(cost.working for _, cost, _ in parts),
            costs[EMBEDDING],
            costs[OUTPUT],
        )


def _times(cost: LayerCost, strategy: Strategy, clock: Clock) -> StageTimes:
    forward, inputs = cost.forward, cost.input_backward
    if strategy.zero_stage == 3:
        call = Call("dp_cp", "all-gather", 2 * cost.parameters)
        forward += Work(overlaps=(Overlap(call, forward),))
        inputs += Work(overlaps=(Overlap(call, inputs + cost.weight_backward),))
    return StageTimes(
        clock.seconds(forward),
        clock.seconds(inputs + cost.weight_backward),
        clock.seconds(inputs.without_overlap()),
        clock.seconds(cost.weight_backward.without_overlap()),
    )


def _plus(total: list[float], times: StageTimes, count: int) -> list[float]:
    return [value + count * getattr(times, name) for value, name in zip(total, NAMES, strict=True)]


def _rank_of_equal_blocks(layers: _Layers, n_layer: int, n_stages: int, chunks: int) -> StageTimes:
    """Return the times of the rank that computes longest, if its stages have as many layers as fits best."""
    block = layers.block.forward + layers.block.backward
    first, last = (part.forward + part.backward for part in (layers.first, layers.last))
    if n_stages == 1:
        return _scaled(layers, n_layer, 1.0, 1.0)
    limit = _stage_limit(n_layer, n_stages, block, first, last)
    mean = (n_layer * block + first + last) / (n_stages // chunks)
    # A rank with several chunks rarely has the longest stage in each of them.
    rank = max(mean, limit if chunks == 1 else min(limit * chunks, mean + block))
    factor = rank / block
    return StageTimes(
        layers.block.forward * factor,
        layers.block.backward * factor,
        layers.block.input_backward * factor,
        layers.block.weight_backward * factor,
    )


@lru_cache(2**16)
def _stage_limit(n_layer: int, n_stages: int, block: float, first: float, last: float) -> float:
    """Return the smallest possible time of the longest stage."""
    for limit in sorted({k * block + extra for k in range(1, n_layer + 1) for extra in (0.0, first, last)}):
        inner = math.floor(limit / block + 1e-9) * (n_stages - 2)
        ends = [math.floor((limit - extra) / block + 1e-9) for extra in (first, last)]
        if min(ends) >= 1 and inner + sum(ends) >= n_layer:
            return limit
    return n_layer * block


def _scaled(layers: _Layers, n_layer: int, first: float, last: float) -> StageTimes:
    return StageTimes(
        *(
            n_layer * getattr(layers.block, name) + first * getattr(layers.first, name) + last * getattr(layers.last, name)
            for name in NAMES
        )
    )
