"""Device memory of each pipeline rank at the peak of a step, in closed form. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.config.schema import Config
from megagpt.planner.layers import ITEMSIZE
from megagpt.planner.stages import Stage, StageModel, stages_of_rank
from megagpt.planner.step_simulation import peaks_in_flight
from megagpt.planner.strategy import Strategy
from megagpt.schedules.registry import placement

GRADIENT_BYTES = 4
"""Gradients are summed in fp32."""
OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "sgd": 0, "muon": 2}
"""fp32 states per weight, beside the fp32 master weight; muon has one for the matrices of the blocks: an upper limit."""
MESSAGES = 4
"""Messages between stages that a rank has at the same time beside its saved activations: one sent and one received in each
direction."""
ZERO_3_PREFETCH = 5 * 10**7
"""Weights that DeepSpeed's stage 3 gathers ahead (stage3_prefetch_bucket_size)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a step. The CUDA context, NCCL's buffers and unused parts of the allocator are extra."""

    parameters: int
    """Number of parameters of the rank."""
    weights: int
    gradients: int
    """fp32, of all micro-batches together."""
    optimizer: int
    """This rank's share of fp32 master weights and optimizer states."""
    activations: int
    """Saved for the backwards of all micro-batches in flight."""
    communication: int
    """Buffers of collectives and messages."""
    working: int
    """Temporary tensors of the layer that needs most."""

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.communication + self.working


def rank_memory(
    config: Config, strategy: Strategy, stages: Sequence[Stage], activations: float, n_parameters: int
) -> MemoryEstimate:
    """Return the memory of a rank with `n_parameters` on `stages`, with `activations` bytes saved at the peak."""
    largest = max(cost.parameters for stage in stages for cost in stage.costs)
    working = max(stage.working for stage in stages)
    return estimate(config, strategy, n_parameters, activations, largest, working)


def memory_by_rank(
    config: Config, strategy: Strategy, stages: Sequence[Stage], peaks: Sequence[float]
) -> tuple[MemoryEstimate, ...]:
    """Return the memory of each pipeline rank. `peaks`: largest sum of saved bytes on each."""
    owners = placement(strategy.schedule, strategy.pipeline, strategy.virtual_stages)
    result = []
    for rank in range(strategy.pipeline):
        own = stages_of_rank(owners, rank)
        n_parameters = rank_parameters(stages, own)
        result.append(rank_memory(config, strategy, [stages[stage] for stage in own], peaks[rank], n_parameters))
    return tuple(result)


def predict_memory(config: Config, strategy: Strategy) -> tuple[MemoryEstimate, ...]:
    """Return the memory of each pipeline rank at the peak of a step. `model.vocab_size` must be known, the schedule named."""
    stages = StageModel(config).stages(strategy)
    held = [stage.held for stage in stages]
    peaks = peaks_in_flight(strategy.schedule, strategy.virtual_stages, strategy.pipeline, strategy.micro_batches, held)
    return memory_by_rank(config, strategy, stages, peaks)


def peak_memory(config: Config, strategy: Strategy) -> MemoryEstimate:
    """Return the memory of the pipeline rank that needs most. Arguments as in `predict_memory`."""
    return max(predict_memory(config, strategy), key=lambda memory: memory.total)


def rank_parameters(stages: Sequence[Stage], own: Sequence[int]) -> int:
    """Return the parameters of a rank; a tied embedding that both ends of the model share on one rank counts once."""
    total = sum(stages[stage].parameters for stage in own)
    if len(stages) > 1 and 0 in own and len(stages) - 1 in own:
        total -= stages[0].tied
    return total


def estimate(
    config: Config, strategy: Strategy, n_parameters: int, activations: float, largest_layer: int, working: int
) -> MemoryEstimate:
    """Return the memory of a rank. `largest_layer`: parameters of its largest layer; `working`: bytes of temporary tensors."""
    zero, shards = strategy.zero_stage, strategy.shards
    itemsize = ITEMSIZE[config.training.weight_precision]
    states = 1 + OPTIMIZER_STATES[config.optimizer.type] + (config.optimizer.type == "sgd" and config.optimizer.momentum > 0)
    optimizer = 4 * states * n_parameters // (shards if zero >= 1 else 1)
    gradients = GRADIENT_BYTES * n_parameters
    if zero == 2 and shards > 1:  # the rank's part, which stays when the gradients of a chunk are freed
        gradients += gradients // shards
    return MemoryEstimate(
        parameters=n_parameters,
        weights=itemsize * n_parameters // (shards if zero == 3 else 1),
        gradients=gradients,
        optimizer=0 if config.zero.offload_optimizer == "cpu" else optimizer,
        activations=int(activations),
        communication=_communication(config, strategy, n_parameters, largest_layer),
        working=working,
    )


def message_bytes(config: Config, strategy: Strategy) -> int:
    """Return the bytes of a message between stages."""
    ranks = strategy.context * (strategy.tensor if strategy.sequence_parallel else 1)
    tokens = strategy.micro_batch * config.model.n_positions // ranks
    return tokens * config.model.n_embd * ITEMSIZE[config.training.weight_precision]


def _communication(config: Config, strategy: Strategy, n_parameters: int, largest_layer: int) -> int:
    message, total = message_bytes(config, strategy), 0
    if strategy.pipeline > 1:
        total += MESSAGES * message
    if strategy.sequence_parallel and strategy.tensor > 1:  # the input of a layer, gathered, and its gradient
        total += 2 * strategy.tensor * message
    if strategy.context > 1:  # queries, keys and values before and after the exchange
        total += 6 * message
    if strategy.zero_stage == 3:
        total += ITEMSIZE[config.training.weight_precision] * (largest_layer + min(ZERO_3_PREFETCH, n_parameters))
    return total
