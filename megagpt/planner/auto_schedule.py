"""Replace `parallel.schedule` "auto" by the name of a schedule."""

from collections.abc import Callable

from megagpt.config.rules import broken_rules
from megagpt.config.schema import Config
from megagpt.errors import ConfigError
from megagpt.planner.choose_schedule import best_plan
from megagpt.planner.coverage import is_supported
from megagpt.planner.hardware import Hardware, find_hardware
from megagpt.planner.memory import message_bytes
from megagpt.planner.predict import Planner
from megagpt.planner.schedule_costs import CostModel, even_costs
from megagpt.planner.stage_times import cost_of, stage_times
from megagpt.planner.strategy import Strategy
from megagpt.planner.work import Call
from megagpt.schedules.simulate import Cost

USUAL_GPU = "H100"
"""GPU of the times if the run's own is not known. Which schedule is fastest depends on the ratios of the times."""


def resolve_schedule(
    config: Config,
    micro_batches: int,
    report: Callable[[int, int], object] = lambda done, total: None,
    data: int = 1,
    hardware: Hardware | None = None,
) -> tuple[Config, str]:
    """Return the config with the schedule that is fastest in simulation, and the reason for the user.

    `micro_batches`: micro-batches per step of one data-parallel rank. A config that names a schedule is returned unchanged,
    with an empty reason. `report`: called after each simulation with the number of simulations that are done and of all.
    `data`: data-parallel size, and `hardware`: the cluster; both give the links between stages.
    Raises ConfigError if no schedule fits `parallel.schedule_costs.max_micro_batches`.
    """
    parallel = config.parallel
    if parallel.schedule != "auto":
        return config, ""
    if parallel.pipeline == 1:
        return _with_schedule(config, "1f1b", 1), "1f1b: with one pipeline rank all schedules are equally fast."
    costs, transfer = _costs(config, data, hardware)
    limit = parallel.schedule_costs.max_micro_batches
    try:
        choice = best_plan(parallel.pipeline, micro_batches, costs, transfer, limit, config.model.n_blocks, report)
    except ValueError as error:
        raise ConfigError(f"parallel.schedule_costs.max_micro_batches: {error}") from None
    return _with_schedule(config, choice.name, choice.virtual_stages), choice.why


def _costs(config: Config, data: int, hardware: Hardware | None) -> tuple[CostModel, float]:
    """Return the costs of the config, if it has any, else the planner's stage times in seconds; and those of a message."""
    times = config.parallel.schedule_costs
    given = (times.forward, times.input_backward, times.weight_backward)
    if given == (None, None, None) and is_supported(config):
        costs, transfer = planned_costs(config, data, hardware or find_hardware(USUAL_GPU))
        return costs, transfer if times.transfer is None else times.transfer
    forward, input_backward, weight_backward = (1.0 if time is None else time for time in given)
    return even_costs(config.parallel.pipeline, forward, input_backward, weight_backward), times.transfer or 0.0


def planned_costs(config: Config, data: int, hardware: Hardware) -> tuple[CostModel, float]:
    """Return the planner's seconds of the stages, for any number of stages, and of a message between two of them."""
    planner, parallel = Planner(config, hardware), config.parallel

    def strategy(n_stages: int) -> Strategy:
        chunks = n_stages // parallel.pipeline
        return Strategy(
            parallel.tensor,
            parallel.pipeline,
            parallel.context,
            data,
            "interleaved_1f1b" if chunks > 1 else "1f1b",
            chunks,
            parallel.sequence_parallel,
            config.zero.stage,
            config.training.micro_batch_size,
            recompute=config.training.recompute,
            recompute_layers=config.training.recompute_layers,
        )

    def costs(n_stages: int) -> Cost:
        one = strategy(n_stages)
        return cost_of(stage_times(config, one, planner.model.stages(one), planner.clock(one)))

    one = strategy(parallel.pipeline)
    return costs, planner.clock(one).call_seconds(Call("pipeline", "send", message_bytes(config, one)))


def _with_schedule(config: Config, schedule: str, virtual_stages: int) -> Config:
    changes = {"schedule": schedule, "virtual_stages": virtual_stages}
    chosen = config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})
    assert not broken_rules(chosen)
    return chosen
