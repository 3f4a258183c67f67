"""Action costs that do not depend on the schedule: a plan with more chunks has more stages, each with fewer layers."""

from collections.abc import Callable

from megagpt.schedules.simulate import Cost, kind_costs

CostModel = Callable[[int], Cost]
"""Number of stages of the model -> durations of their actions."""


def even_costs(ranks: int, forward: float = 1.0, input_backward: float = 1.0, weight_backward: float = 1.0) -> CostModel:
    """Return a cost model in which the chunks of a rank share its time evenly.

    The arguments are times of one micro-batch on all layers of one rank. A full backward takes the sum of its two halves.
    """

    def costs(stages: int) -> Cost:
        share = ranks / stages
        return kind_costs(
            forward * share, (input_backward + weight_backward) * share, input_backward * share, weight_backward * share
        )

    return costs
