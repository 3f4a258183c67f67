"""Estimate of a rank's memory: weights, gradients and optimizer states exactly, activations from a dry run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megagpt.config.schema import Config
from megagpt.model.gpt import activation_dtype
from megagpt.parallel.topology import Layout
from megagpt.planner.dry_run import open_dry_run
from megagpt.schedules.plan import Action, ActionKind, Plan
from megagpt.schedules.registry import make_plan

OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "sgd": 0, "muon": 2}
"""fp32 states per weight, beside the fp32 master weight; muon has one for the matrices of the blocks: an upper limit."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a step. Buffers of communication, kernels and the allocator come on top."""

    parameters: int
    """Number of parameters of the rank."""
    weights: int
    gradients: int
    """fp32, of all micro-batches together."""
    optimizer: int
    """This rank's share of fp32 master weights and optimizer states."""
    activations: int
    """Saved for the backwards of all micro-batches in flight."""

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.gradients + self.optimizer + self.activations


def rank_memory(config: Config, layout: Layout, rank: int) -> MemoryEstimate:
    """Estimate the memory of `rank`. No process group may exist. `parallel.schedule` must not be "auto"."""
    return _rank_memory(config, layout, rank, _plan(config, layout))


def largest_rank_memory(config: Config, layout: Layout) -> MemoryEstimate:
    """Estimate the memory of the rank that needs most; ranks of the same pipeline stages need the same."""
    plan = _plan(config, layout)
    one_per_stage = layout.ranks_along(0, "pipeline")
    return max((_rank_memory(config, layout, rank, plan) for rank in one_per_stage), key=lambda estimate: estimate.total)


def _plan(config: Config, layout: Layout) -> Plan:
    n_micro_batches = config.training.global_batch_size // config.training.micro_batch_size // layout.data
    return make_plan(config.parallel.schedule, layout.pipeline, n_micro_batches, config.parallel.virtual_stages)


def _rank_memory(config: Config, layout: Layout, rank: int, plan: Plan) -> MemoryEstimate:
    with open_dry_run(config, layout, rank) as dry_run:
        n_parameters = dry_run.n_parameters
        saved_bytes = {stage: dry_run.saved_bytes(stage) for stage in dry_run.chunks}
    activations = _peak_activations(plan.actions[layout.coordinates(rank).pipeline], saved_bytes)
    return replace(state_memory(config, layout, n_parameters), activations=activations)


def state_memory(config: Config, layout: Layout, n_parameters: int) -> MemoryEstimate:
    """Return the memory of a rank with `n_parameters` without its activations."""
    stage, dtype = config.zero.stage, activation_dtype(config)
    states = 1 + OPTIMIZER_STATES[config.optimizer.type] + (config.optimizer.type == "sgd" and config.optimizer.momentum > 0)
    optimizer = 4 * states * n_parameters // (layout.dp_cp if stage >= 1 else 1)
    return MemoryEstimate(
        parameters=n_parameters,
        weights=dtype.itemsize * n_parameters // (layout.dp_cp if stage == 3 else 1),
        gradients=4 * n_parameters,
        optimizer=0 if config.zero.offload_optimizer == "cpu" else optimizer,
        activations=0,
    )


def _peak_activations(actions: Sequence[Action], saved_bytes: Mapping[int, int]) -> int:
    """Return the largest sum of saved bytes over a rank's actions: from each forward to its (weight) backward."""
    live = peak = 0
    for action in actions:
        if action.kind is ActionKind.FORWARD:
            live += saved_bytes[action.stage]
            peak = max(peak, live)
        elif action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT):
            live -= saved_bytes[action.stage]
    return peak
