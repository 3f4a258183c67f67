"""Predict memory, communication and time of a training step from a config, without a GPU. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megagpt.config.schema import Config
from megagpt.errors import ConfigError
from megagpt.planner.hardware import Hardware
from megagpt.planner.layers import ITEMSIZE
from megagpt.planner.memory import GRADIENT_BYTES, MemoryEstimate, message_bytes, rank_memory, rank_parameters
from megagpt.planner.stages import Stage, StageModel, stages_of_rank
from megagpt.planner.step_simulation import StepSimulation, simulate_step
from megagpt.planner.strategy import Strategy
from megagpt.planner.timing import Clock, Efficiency
from megagpt.planner.work import Call, Overlap, Work
from megagpt.schedules.plan import Action, ActionKind
from megagpt.schedules.registry import placement
from megagpt.schedules.simulate import Cost

PARTS = (
    "matrix products",
    "attention",
    "other kernels",
    "tensor-parallel communication",
    "context-parallel communication",
    "ZeRO-3 gathers",
    "pipeline bubble and messages",
    "gradient sums",
    "optimizer",
    "parameter gather",
)
"""Where the time of a step goes, in this order."""


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch on a stage."""

    forward: float
    backward: float
    input_backward: float
    weight_backward: float


@dataclass(frozen=True)
class Prediction:
    """What a step of a run needs: on every rank, and in time."""

    strategy: Strategy
    memory: tuple[MemoryEstimate, ...]
    """Of each pipeline rank."""
    times: tuple[StageTimes, ...]
    """Of each stage."""
    transfer: float
    """Seconds of a message between stages."""
    step_seconds: float
    bubble: float
    """Share of the time of the forwards and backwards in which the busiest rank waits."""
    parts: dict[str, float]
    """Seconds of the rank that ends last, by `PARTS`; the sum is the step."""
    traffic: dict[tuple[str, str], tuple[float, float]]
    """Calls and bytes in a step, by axis and kind, of the pipeline rank that communicates longest."""
    model_flops: float
    """FLOPs of a step on all GPUs, as MFU counts them."""
    hardware_flops: float
    """The same and what is recomputed."""
    parameters: int
    """Of the model, vocabulary padding excluded."""
    tokens: int
    """Tokens of a step."""
    peak_flops: float
    """bf16 peak of a GPU in FLOP/s; that of fp32 for fp32. The MFU is a share of it."""
    memory_limit: int
    """Bytes of a GPU that a run can use."""
    links: dict[str, bool] = field(default_factory=dict)
    """Axis -> whether its ranks are on several nodes."""

    @cached_property
    def peak_rank(self) -> int:
        """Pipeline rank that needs the most memory."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)

    @property
    def peak(self) -> MemoryEstimate:
        """Memory of that rank."""
        return self.memory[self.peak_rank]

    @property
    def fits(self) -> bool:
        """Whether the memory of every rank is within the limit."""
        return self.peak.total <= self.memory_limit

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs."""
        return self.tokens / self.step_seconds

    @property
    def tflops_per_gpu(self) -> float:
        """Model TFLOP/s of one GPU."""
        return self.model_flops / self.step_seconds / self.strategy.gpus / 1e12

    @property
    def mfu(self) -> float:
        """Share of the peak."""
        return self.tflops_per_gpu * 1e12 / self.peak_flops

    def gpu_hours(self, tokens: float) -> float:
        """Return the GPU-hours of training on `tokens`."""
        return tokens / self.tokens_per_second / 3600 * self.strategy.gpus


class Planner:
    """Predictions for one config on one kind of cluster, for many strategies."""

    def __init__(self, config: Config, hardware: Hardware, efficiency: Efficiency | None = None) -> None:
        """`model.vocab_size` must be known. Raises ConfigError for models that the planner does not cover."""
        require_supported(config)
        self.config = config
        self.hardware = hardware
        self.efficiency = efficiency or Efficiency()
        self.model = StageModel(config)
        self._clocks: dict[tuple[int, ...], Clock] = {}

    def clock(self, strategy: Strategy) -> Clock:
        """Return the clock of a layout."""
        key = (strategy.tensor, strategy.context, strategy.data, strategy.pipeline)
        if key not in self._clocks:
            self._clocks[key] = Clock(self.hardware, strategy, self.config.training.precision, self.efficiency)
        return self._clocks[key]

    def predict(self, strategy: Strategy) -> Prediction:
        """Return the prediction for a strategy, whose schedule is simulated. It must not be "auto"."""
        config, clock = self.config, self.clock(strategy)
        stages = self.model.stages(strategy)
        times = stage_times(config, strategy, stages, clock)
        transfer = clock.call_seconds(Call("pipeline", "send", message_bytes(config, strategy)))
        step = simulate_step(
            strategy.schedule,
            strategy.virtual_stages,
            strategy.pipeline,
            strategy.micro_batches,
            cost_of(times),
            transfer,
            [stage.held for stage in stages],
        )
        ranks = [self._rank(strategy, stages, times, step, rank, clock) for rank in range(strategy.pipeline)]
        last = max(ranks, key=lambda rank: rank.end)
        update = max(ranks, key=lambda rank: rank.optimizer + rank.gather)
        step_seconds = last.end + update.optimizer + update.gather
        parts = {**last.parts, "optimizer": update.optimizer, "parameter gather": update.gather}
        busiest = max(rank.busy for rank in ranks)
        model_flops, repeated = self._flops(strategy, stages)
        precision = "fp32" if config.training.precision == "fp32" else "bf16"
        return Prediction(
            strategy,
            tuple(rank.memory for rank in ranks),
            tuple(times),
            transfer,
            step_seconds,
            1 - busiest / step.makespan,
            {name: parts[name] for name in PARTS if parts.get(name)},
            max(ranks, key=lambda rank: rank.communication).traffic,
            model_flops,
            model_flops + repeated,
            model_parameters(config, self.model),
            config.training.global_batch_size * config.model.n_positions,
            self.hardware.peak_flops(precision),
            self.hardware.usable_bytes,
            {axis: link.between_nodes for axis, link in clock.links.items() if link.ranks > 1},
        )

    def _rank(
        self,
        strategy: Strategy,
        stages: Sequence[Stage],
        times: Sequence[StageTimes],
        step: StepSimulation,
        rank: int,
        clock: Clock,
    ) -> "_Rank":
        """Return what one pipeline rank does in a step."""
        owners = placement(strategy.schedule, strategy.pipeline, strategy.virtual_stages)
        own = stages_of_rank(owners, rank)
        mine = [stages[stage] for stage in own]
        n_parameters = rank_parameters(stages, own)
        memory = rank_memory(self.config, strategy, mine, step.peaks[rank], n_parameters)
        splits = splits_backward(strategy.schedule)
        passes = [stage_work(self.config, strategy, stage) for stage in mine]
        busy = strategy.micro_batches * sum(
            times[stage].forward
            + (times[stage].input_backward + times[stage].weight_backward if splits else times[stage].backward)
            for stage in own
        )
        sums = gradient_sums(self.config, strategy, stages, own)
        # Sums of a chunk that is complete earlier are hidden behind the other chunks, but ZeRO 0 waits for them.
        last = own.index(step.last_stages[rank])
        waiting = [calls for index, calls in enumerate(sums.by_stage) if index == last or strategy.zero_stage == 0]
        reduction = sum(clock.call_seconds(call) for calls in (*waiting, sums.tied) for call in calls)
        parts = {name: strategy.micro_batches * value for name, value in _parts(passes, clock, splits).items()}
        parts["pipeline bubble and messages"] = step.finish[rank] - busy
        parts["gradient sums"] = reduction
        gather = parameter_gather(self.config, strategy, n_parameters)
        work = rank_calls(self.config, strategy, stages, own)
        update = optimizer_work(self.config, strategy, n_parameters)
        return _Rank(
            memory,
            busy,
            step.finish[rank] + reduction,
            parts,
            clock.compute_seconds(update),
            sum(clock.call_seconds(call) for call in gather),
            work.traffic(),
            sum(clock.call_seconds(call) for call in work.calls),
        )

    def _flops(self, strategy: Strategy, stages: Sequence[Stage]) -> tuple[float, float]:
        """Return model FLOPs and recomputed FLOPs of a step."""
        steps = strategy.micro_batches * strategy.data
        forward = sum(cost.model_flops for stage in stages for cost in stage.costs)
        output = stages[-1].costs[-1].model_flops
        repeated = {"none": 0.0, "full": forward - output, "selective": self._core_flops(strategy)}
        return 3 * steps * forward, steps * repeated[strategy.recompute]

    def _core_flops(self, strategy: Strategy) -> float:
        """Return the forward FLOPs of scores and weighted values of a micro-batch, as a full square."""
        model = self.config.model
        windows = [min(model.window_of(layer) or model.n_positions, model.n_positions) for layer in range(model.n_layer)]
        return float(4 * sum(windows) * model.n_head * model.head_size * strategy.micro_batch * model.n_positions)


@dataclass(frozen=True)
class _Rank:
    memory: MemoryEstimate
    busy: float
    end: float
    parts: dict[str, float]
    optimizer: float
    gather: float
    traffic: dict[tuple[str, str], tuple[float, float]]
    communication: float


@dataclass(frozen=True)
class Passes:
    """Work of one micro-batch on a stage."""

    forward: Work
    input_backward: Work
    weight_backward: Work


def require_supported(config: Config) -> None:
    """Raise ConfigError for what the closed formulas do not cover."""
    if config.lora.rank is not None or config.training.freeze:
        key = "lora.rank" if config.lora.rank is not None else "training.freeze"
        raise ConfigError(f"{key}: the planner covers runs that train all weights; leave it out")
    if config.model.encoder_layers:
        raise ConfigError(
            f"model.encoder_layers: {config.model.encoder_layers}; times are predicted for models without an encoder only"
        )
    if config.data.task not in ("text", "chat"):
        raise ConfigError(f'data.task: the planner covers "text" and "chat", not "{config.data.task}"')


def is_supported(config: Config) -> bool:
    """Return whether the closed formulas cover a config."""
    try:
        require_supported(config)
    except ConfigError:
        return False
    return True


def splits_backward(schedule: str) -> bool:
    """Return whether a schedule computes gradients of inputs and of weights at different times."""
    return schedule not in ("1f1b", "gpipe", "interleaved_1f1b")


def stage_work(config: Config, strategy: Strategy, stage: Stage) -> Passes:
    """Return the work of a stage: that of its layers, and under ZeRO-3 the gathers of their weights."""
    forward, inputs, weights = Work(), Work(), Work()
    for cost in stage.costs:
        forward, inputs, weights = forward + cost.forward, inputs + cost.input_backward, weights + cost.weight_backward
    if strategy.zero_stage == 3:
        size = ITEMSIZE[config.training.weight_precision] * stage.parameters
        call = Call("dp_cp", "all-gather", size)
        forward += Work(overlaps=(Overlap(call, forward),))
        inputs += Work(overlaps=(Overlap(call, inputs + weights),))
    return Passes(forward, inputs, weights)


def stage_times(config: Config, strategy: Strategy, stages: Sequence[Stage], clock: Clock) -> list[StageTimes]:
    """Return the seconds of one micro-batch on each stage; stages that are alike are computed once."""
    known: dict[tuple[int, ...], StageTimes] = {}
    result = []
    for stage in stages:
        key = tuple(map(id, stage.costs))
        if key not in known:
            passes = stage_work(config, strategy, stage)
            known[key] = StageTimes(
                clock.seconds(passes.forward),
                clock.seconds(passes.input_backward + passes.weight_backward),
                clock.seconds(passes.input_backward.without_overlap()),
                clock.seconds(passes.weight_backward.without_overlap()),
            )
        result.append(known[key])
    return result


def cost_of(times: Sequence[StageTimes]) -> Cost:
    """Return the cost function of the simulation."""

    def cost(action: Action) -> float:
        of = times[action.stage]
        return {
            ActionKind.FORWARD: of.forward,
            ActionKind.BACKWARD: of.backward,
            ActionKind.BACKWARD_INPUT: of.input_backward,
            ActionKind.BACKWARD_WEIGHT: of.weight_backward,
        }[action.kind]

    return cost


def rank_traffic(config: Config, strategy: Strategy, rank: int) -> dict[tuple[str, str], tuple[float, float]]:
    """Return calls and bytes of a pipeline rank's collectives and sends in a step, by axis and kind."""
    owners = placement(strategy.schedule, strategy.pipeline, strategy.virtual_stages)
    return rank_calls(config, strategy, StageModel(config).stages(strategy), stages_of_rank(owners, rank)).traffic()


def rank_calls(config: Config, strategy: Strategy, stages: Sequence[Stage], own: Sequence[int]) -> Work:
    """Return all collectives and sends of a rank with the stages `own` in a step."""
    calls: list[Call] = []
    for stage in own:
        passes = stage_work(config, strategy, stages[stage])
        work = (passes.forward + passes.input_backward + passes.weight_backward).without_overlap()
        calls += [call._replace(times=call.times * strategy.micro_batches) for call in work.calls]
    sums = gradient_sums(config, strategy, stages, own)
    calls += [call for one in (*sums.by_stage, sums.tied) for call in one]
    calls += parameter_gather(config, strategy, rank_parameters(stages, own))
    owners = placement(strategy.schedule, strategy.pipeline, strategy.virtual_stages)
    n_messages = message_count(owners, own) * strategy.micro_batches
    return Work(calls=(*calls, Call("pipeline", "send", message_bytes(config, strategy), n_messages)))


@dataclass(frozen=True)
class GradientSums:
    """Collectives after the backwards."""

    by_stage: list[list[Call]]
    tied: list[Call]
    """Of the tied embedding, after all stages."""


def gradient_sums(config: Config, strategy: Strategy, stages: Sequence[Stage], own: Sequence[int]) -> GradientSums:
    """Return the sums of gradients of a rank's stages. As `megagpt/engine/gradient_sync.py` and ZeRO make them."""
    kind = {0: "all-reduce", 1: "reduce", 2: "reduce", 3: "reduce-scatter"}[strategy.zero_stage]
    has_both = len(stages) > 1 and 0 in own and len(stages) - 1 in own
    n_tied = 0
    if config.model.tie_embeddings and (0 in own or len(stages) - 1 in own):
        n_tied = config.model.padded_vocab_size // strategy.tensor * config.model.n_embd

    def shards(n_parameters: int) -> list[Call]:
        if strategy.shards == 1 or n_parameters == 0:
            return []
        return [Call("dp_cp", kind, GRADIENT_BYTES * n_parameters)]

    by_stage = []
    for stage in own:
        ends = config.model.tie_embeddings and stage in (0, len(stages) - 1)
        partial = stages[stage].partial
        calls = [Call("tensor", "all-reduce", GRADIENT_BYTES * partial)] if partial and strategy.tensor > 1 else []
        by_stage.append(calls + shards(stages[stage].parameters - (n_tied if ends else 0)))
    tied = shards(n_tied)
    if n_tied and strategy.pipeline > 1 and not has_both and len(stages) > 1:
        tied = [Call("embedding", "all-reduce", GRADIENT_BYTES * n_tied), *tied]
    return GradientSums(by_stage, tied)


def parameter_gather(config: Config, strategy: Strategy, n_parameters: int) -> list[Call]:
    """Return the gather of updated weights of ZeRO 1 and 2."""
    if strategy.shards == 1 or strategy.zero_stage not in (1, 2):
        return []
    return [Call("dp_cp", "all-gather", ITEMSIZE[config.training.weight_precision] * n_parameters)]


def optimizer_work(config: Config, strategy: Strategy, n_parameters: int) -> Work:
    """Return the work of zeroing the gradients, the gradient's norm, clipping, Adam, and the copy to the weights' dtype."""
    shards = strategy.shards if strategy.zero_stage >= 1 else 1
    per_owned = 4 + 8 + 28 + 4 + ITEMSIZE[config.training.weight_precision]
    return Work(moved=GRADIENT_BYTES * n_parameters + per_owned * n_parameters / shards, kernels=20)


def message_count(owners: Sequence[int], own: Sequence[int]) -> int:
    """Return the messages that a rank sends for one micro-batch, forward and backward."""
    last = len(owners) - 1
    return sum(
        (stage < last and owners[stage + 1] != owners[stage]) + (stage > 0 and owners[stage - 1] != owners[stage])
        for stage in own
    )


def model_parameters(config: Config, model: StageModel) -> int:
    """Return the parameters of the model, vocabulary padding excluded."""
    (stage,) = model.stages(Strategy())
    padding = config.model.padded_vocab_size - config.model.tokens_in_vocab
    return stage.parameters - padding * config.model.n_embd * (1 if config.model.tie_embeddings else 2)


def _parts(passes: Sequence[Passes], clock: Clock, splits: bool) -> dict[str, float]:
    """Return the seconds of one micro-batch on a rank, by parts of the step."""
    parts = dict.fromkeys(PARTS[:6], 0.0)
    for one in passes:
        backward = [one.input_backward + one.weight_backward]
        if splits:
            backward = [one.input_backward.without_overlap(), one.weight_backward.without_overlap()]
        for work in (one.forward, *backward):
            parts["matrix products"] += clock.compute_seconds(
                Work(flops=work.flops, narrow_flops=work.narrow_flops, loaded=work.loaded)
            )
            parts["attention"] += clock.compute_seconds(Work(core_flops=work.core_flops))
            parts["other kernels"] += clock.compute_seconds(Work(moved=work.moved, kernels=work.kernels))
            for call in work.calls:
                parts[_PART_OF_AXIS[call.axis]] += clock.call_seconds(call)
            for call, cover in work.overlaps:
                left = max(0.0, clock.call_seconds(call) - clock.compute_seconds(cover))
                parts[_PART_OF_AXIS[call.axis]] += left
    return parts


_PART_OF_AXIS = {
    "tensor": "tensor-parallel communication",
    "context": "context-parallel communication",
    "dp_cp": "ZeRO-3 gathers",
}
