"""How long actions take, whatever the schedule: a plan with more chunks has more stages, and each has fewer layers."""

from collections.abc import Callable

from megagpt.pipeline.simulate import Cost, kind_costs

CostModel = Callable[[int], Cost]
"""From the number of stages that the model is cut into to the durations of their actions."""


def even_costs(ranks: int, forward: float = 1.0, input_backward: float = 1.0, weight_backward: float = 1.0) -> CostModel:
    """Costs of one micro-batch on all layers of one rank, shared evenly by its chunks. A B takes what its I and W take."""

    def costs(stages: int) -> Cost:
        part = ranks / stages
        return kind_costs(
            forward * part, (input_backward + weight_backward) * part, input_backward * part, weight_backward * part
        )

    return costs
