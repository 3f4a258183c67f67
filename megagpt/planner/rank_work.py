"""What a pipeline rank does in a step beside its layers: gradient sums, messages, optimizer. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.config.schema import Config
from megagpt.planner.layers import ITEMSIZE
from megagpt.planner.memory import GRADIENT_BYTES, message_bytes, rank_parameters
from megagpt.planner.stage_times import stage_work
from megagpt.planner.stages import Stage, StageModel, stages_of_rank
from megagpt.planner.strategy import Strategy
from megagpt.planner.work import Call, Work
from megagpt.schedules.registry import placement


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
