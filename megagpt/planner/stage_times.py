"""Work and time of one micro-batch on a pipeline stage. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.config.schema import Config
from megagpt.planner.layer_sizes import ITEMSIZE
from megagpt.planner.stages import Stage
from megagpt.planner.strategy import Strategy
from megagpt.planner.timing import Clock
from megagpt.planner.work import Call, Overlap, Work
from megagpt.schedules.plan import Action, ActionKind
from megagpt.schedules.simulate import Cost


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch on a stage."""

    forward: float
    backward: float
    input_backward: float
    weight_backward: float


@dataclass(frozen=True)
class Passes:
    """Work of one micro-batch on a stage."""

    forward: Work
    input_backward: Work
    weight_backward: Work


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
