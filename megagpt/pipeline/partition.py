"""Split layers into pipeline stages: contiguous ranges whose most expensive stage is as cheap as possible."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

StageCost = Callable[[int, int, int], float]
"""(stage, first layer, end layer) -> cost."""
_ROUNDING = 1 + 1e-9
"""Tolerance for sums of the same costs in another order."""


def balance(layer_costs: Sequence[float], stages: int, first_extra: float, last_extra: float) -> list[range]:
    """Split layers into `stages` contiguous ranges of at least one layer, with the exact minimum of the largest stage cost.

    `first_extra` is added to the first stage and `last_extra` to the last, in the unit of `layer_costs`; none may be
    negative. Among equally good splits, choose the one with the most even sizes, and among those the one with small early
    stages: under 1F1B these hold the most micro-batches.
    Raises ValueError if `stages` is not in 1 ... number of layers.
    """
    layers = len(layer_costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot fill {stages} stages with at least one layer each")
    sums = [0.0, *accumulate(layer_costs)]

    def cost(stage: int, start: int, end: int) -> float:
        extra = (first_extra if stage == 0 else 0.0) + (last_extra if stage == stages - 1 else 0.0)
        return sums[end] - sums[start] + extra

    limit = _smallest_maximum(cost, layers, stages) * _ROUNDING
    sizes = _most_even_sizes(cost, layers, stages, limit)
    return [range(start, end) for start, end in pairwise([0, *accumulate(sizes)])]


def _smallest_maximum(cost: StageCost, layers: int, stages: int) -> float:
    """Return the smallest possible cost of the most expensive stage.

    Dynamic programming: `best[n]` is that cost for the first n layers in the stages so far.
    """
    best = [0.0] + [math.inf] * layers
    for stage in range(stages):
        previous, best = best, [math.inf] * (layers + 1)
        for end in range(stage + 1, layers - (stages - stage - 1) + 1):
            for start in range(end - 1, stage - 1, -1):
                stage_cost = cost(stage, start, end)
                if stage_cost >= best[end]:
                    break  # a longer range is not cheaper
                best[end] = min(best[end], max(stage_cost, previous[start]))
    return best[layers]


def _most_even_sizes(cost: StageCost, layers: int, stages: int, limit: float) -> tuple[int, ...]:
    """Return the stage sizes with the smallest sum of squares, then the smallest in lexical order; no stage above `limit`."""
    best: dict[int, tuple[int, tuple[int, ...]]] = {layers: (0, ())}
    for stage in reversed(range(stages)):
        later, best = best, {}
        for start in range(stage, layers):
            options = []
            for end in range(start + 1, layers + 1):
                if cost(stage, start, end) > limit:
                    break
                if end in later:
                    squares, sizes = later[end]
                    options.append((squares + (end - start) ** 2, (end - start, *sizes)))
            if options:
                best[start] = min(options)
    return best[0][1]
