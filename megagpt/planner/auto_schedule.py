"""Replace `parallel.schedule` "auto" by the name of a schedule."""

from collections.abc import Callable

from megagpt.config.rules import broken_rules
from megagpt.config.schema import Config
from megagpt.errors import ConfigError
from megagpt.planner.choose_schedule import best_plan
from megagpt.planner.schedule_costs import even_costs


def resolve_schedule(
    config: Config, micro_batches: int, report: Callable[[int, int], object] = lambda done, total: None
) -> tuple[Config, str]:
    """Return the config with the schedule that is fastest in simulation, and the reason for the user.

    `micro_batches`: micro-batches per step of one data-parallel rank. A config that names a schedule is returned unchanged,
    with an empty reason. `report`: called after each simulation with the number of simulations that are done and of all.
    Raises ConfigError if no schedule fits `parallel.schedule_costs.max_micro_batches`.
    """
    parallel = config.parallel
    if parallel.schedule != "auto":
        return config, ""
    if parallel.pipeline == 1:
        return _with_schedule(config, "1f1b", 1), "1f1b: with one pipeline rank all schedules are equally fast."
    times = parallel.schedule_costs
    costs = even_costs(parallel.pipeline, times.forward, times.input_backward, times.weight_backward)
    try:
        choice = best_plan(
            parallel.pipeline, micro_batches, costs, times.transfer, times.max_micro_batches, config.model.n_blocks, report
        )
    except ValueError as error:
        raise ConfigError(f"parallel.schedule_costs.max_micro_batches: {error}") from None
    return _with_schedule(config, choice.name, choice.virtual_stages), choice.why


def _with_schedule(config: Config, schedule: str, virtual_stages: int) -> Config:
    parallel = config.parallel.model_copy(update={"schedule": schedule, "virtual_stages": virtual_stages})
    chosen = config.model_copy(update={"parallel": parallel})
    assert not broken_rules(chosen)
    return chosen
