"""What a pipeline rank does in a step beside its layers: messages, optimizer. Does not import torch."""

from collections.abc import Sequence

from megagpt.config.schema import Config
from megagpt.planner.gradient_sums import gradient_sums, parameter_gather
from megagpt.planner.layer_sizes import ITEMSIZE
from megagpt.planner.memory import GRADIENT_BYTES, rank_parameters
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
    calls += [call for one in (*sums.by_stage, sums.shared) for call in one]
    calls += parameter_gather(config, strategy, rank_parameters(stages, own))
    return Work(calls=(*calls, *messages(strategy, stages, own)))


def messages(strategy: Strategy, stages: Sequence[Stage], own: Sequence[int]) -> list[Call]:
    """Return what a rank with the stages `own` sends in a step: hidden states, and the gradients of those received."""
    owners, calls = placement(strategy.schedule, strategy.pipeline, strategy.virtual_stages), []
    for stage in own:
        for neighbour, sender in ((stage + 1, stage), (stage - 1, stage - 1)):
            if 0 <= neighbour < len(stages) and owners[neighbour] != owners[stage]:
                calls += [Call("pipeline", "send", size, strategy.micro_batches) for size in stages[sender].messages]
    return calls


def optimizer_work(config: Config, strategy: Strategy, n_parameters: int) -> Work:
    """Return the work of zeroing the gradients, the gradient's norm, clipping, Adam, and the copy to the weights' dtype."""
    shards = strategy.shards if strategy.zero_stage >= 1 else 1
    per_owned = 4 + 8 + 28 + 4 + ITEMSIZE[config.training.weight_precision]
    return Work(moved=GRADIENT_BYTES * n_parameters + per_owned * n_parameters / shards, kernels=20)
