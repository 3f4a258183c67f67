"""`parallel.schedule` "auto" made a name."""

from megagpt.config.rules import broken_rules
from megagpt.config.schema import Config
from megagpt.errors import ConfigError
from megagpt.pipeline.choose import best_plan
from megagpt.pipeline.costs import even_costs


def resolve_schedule(config: Config, micro_batches: int) -> tuple[Config, str]:
    """The config with the schedule that simulates fastest for so many micro-batches a data rank, and why it is that one.

    As it is, where a schedule is named. Raises ConfigError where none fits the memory in `parallel.schedule_costs`.
    """
    parallel = config.parallel
    if parallel.schedule != "auto":
        return config, ""
    if parallel.pipeline == 1:
        return _with(config, "1f1b", 1), "1f1b: one pipeline rank has nothing to wait for."
    times = parallel.schedule_costs
    costs = even_costs(parallel.pipeline, times.forward, times.input_backward, times.weight_backward)
    try:
        choice = best_plan(
            parallel.pipeline, micro_batches, costs, times.transfer, times.most_micro_batches, config.model.n_layer
        )
    except ValueError as error:
        raise ConfigError(f"parallel.schedule_costs.most_micro_batches: {error}") from None
    return _with(config, choice.name, choice.virtual_stages), choice.why


def _with(config: Config, schedule: str, virtual_stages: int) -> Config:
    parallel = config.parallel.model_copy(update={"schedule": schedule, "virtual_stages": virtual_stages})
    chosen = config.model_copy(update={"parallel": parallel})
    assert not broken_rules(chosen)
    return chosen
