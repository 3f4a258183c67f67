"""Predict memory, communication and time of a training step from a config, without a GPU. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megagpt.config.schema import Config
from megagpt.planner.coverage import require_supported
from megagpt.planner.gradient_sums import exposed_gather_seconds, exposed_seconds, gradient_sums
from megagpt.planner.hardware import Hardware
from megagpt.planner.memory import MemoryEstimate, message_bytes, rank_memory, rank_parameters
from megagpt.planner.rank_work import optimizer_work, rank_calls
from megagpt.planner.stage_times import Passes, StageTimes, cost_of, stage_times, stage_work
from megagpt.planner.stages import Stage, StageModel, stages_of_rank
from megagpt.planner.step_simulation import StepSimulation, simulate_step
from megagpt.planner.strategy import Strategy
from megagpt.planner.timing import Clock, Efficiency
from megagpt.planner.work import Call, Work
from megagpt.schedules.registry import placement, splits_backward

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
    """Share of the time of the forwards and backwards in which a rank waits, on average."""
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
        busy = sum(rank.busy for rank in ranks) / len(ranks)
        model_flops, repeated = self._flops(strategy, stages)
        precision = "fp32" if config.training.precision == "fp32" else "bf16"
        return Prediction(
            strategy,
            tuple(rank.memory for rank in ranks),
            tuple(times),
            transfer,
            step_seconds,
            max(0.0, 1 - busy / step.makespan),
            {name: parts[name] for name in PARTS if parts.get(name)},
            max(ranks, key=lambda rank: rank.communication).traffic,
            model_flops,
            model_flops + repeated,
            model_parameters(config, self.model),
            config.training.global_batch_size * config.model.sample_tokens,
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
        last = step.last_stages[rank]
        waiting = [
            exposed_seconds(self.config, strategy, stages[stage], calls, clock)
            for stage, calls in zip(own, sums.by_stage, strict=True)
            if stage == last or strategy.zero_stage == 0
        ]
        reduction = sum(waiting) + sum(clock.call_seconds(call) for call in sums.shared)
        parts = {name: strategy.micro_batches * value for name, value in _parts(passes, clock, splits).items()}
        parts["pipeline bubble and messages"] = step.finish[rank] - busy
        parts["gradient sums"] = reduction
        work = rank_calls(self.config, strategy, stages, own)
        update = optimizer_work(self.config, strategy, n_parameters)
        return _Rank(
            memory,
            busy,
            step.finish[rank] + reduction,
            parts,
            clock.compute_seconds(update),
            exposed_gather_seconds(self.config, strategy, mine, n_parameters, clock),
            work.traffic(),
            sum(clock.call_seconds(call) for call in work.calls),
        )

    def _flops(self, strategy: Strategy, stages: Sequence[Stage]) -> tuple[float, float]:
        """Return model FLOPs and recomputed FLOPs of a step."""
        steps = strategy.micro_batches * strategy.data
        forward = sum(cost.model_flops for stage in stages for cost in stage.costs)
        output = stages[-1].costs[-1].model_flops
        core = self.model.core_flops * strategy.micro_batch
        repeated = {"none": 0.0, "full": forward - output, "selective": core}
        return 3 * steps * forward, steps * repeated[strategy.recompute]


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
