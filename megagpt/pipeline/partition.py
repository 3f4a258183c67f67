"""Which layers a stage owns: contiguous runs whose costliest stage is as cheap as it can be."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from megagpt.config.schema import ModelConfig

StageCost = Callable[[int, int, int], float]
"""(stage, first layer, layer after the last) -> cost."""
_ROUNDING = 1 + 1e-9
"""Sums of the same costs in another order still count as equal."""


def stage_layers(model: ModelConfig, stages: int) -> list[range]:
    """The layers of each of `stages` stages, balanced by FLOPs, embedding and output layer counted.

    `model.vocab_size` must be known. Raises ValueError where there are more stages than layers.
    """
    return balance(layer_costs(model), stages, embedding_cost(model), output_cost(model))


def layer_costs(model: ModelConfig) -> list[float]:
    """FLOPs of each block's forward for one token (Korthikanti et al., arXiv 2205.05198, appendix A, per token).

    Two for each weight of the matrices (4 h^2 of attention, 2 h ffn of the MLP), and 4 s h / 2 for scores
    and their sum over the values: half of the s x s square is masked. The backward doubles all of it alike.
    """
    h, s = model.n_embd, model.n_positions
    matrices = 4 * h * h + 2 * h * model.ffn_width
    return [float(2 * matrices + 4 * s * h // 2)] * model.n_layer


def output_cost(model: ModelConfig) -> float:
    """FLOPs of the output layer's forward for one token: 2 h V, padding rows included."""
    return float(2 * model.n_embd * model.padded_vocab_size)


def embedding_cost(model: ModelConfig) -> float:
    """FLOPs of the embeddings' forward for one token: a lookup computes nothing; one addition of h numbers."""
    return float(model.n_embd)


def balance(layer_costs: Sequence[float], stages: int, first_extra: float, last_extra: float) -> list[range]:
    """Split layers into `stages` contiguous runs of at least one layer, the largest stage cost minimal (exactly).

    `first_extra` is added to the first stage and `last_extra` to the last, in the unit of `layer_costs`
    (none of which is negative). Of equally good splits the one with the most even sizes is taken, and of
    those the one whose early stages are small: under 1F1B these hold the most micro-batches.
    Raises ValueError where `stages` is not in 1 ... number of layers.
    """
    layers = len(layer_costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers do not make {stages} stages of at least one layer")
    sums = [0.0, *accumulate(layer_costs)]

    def cost(stage: int, start: int, stop: int) -> float:
        extra = (first_extra if stage == 0 else 0.0) + (last_extra if stage == stages - 1 else 0.0)
        return sums[stop] - sums[start] + extra

    limit = _smallest_peak(cost, layers, stages) * _ROUNDING
    sizes = _evenest_sizes(cost, layers, stages, limit)
    return [range(start, stop) for start, stop in pairwise([0, *accumulate(sizes)])]


def _smallest_peak(cost: StageCost, layers: int, stages: int) -> float:
    """The least possible cost of the costliest stage, by dynamic programming over (stages used, layers placed)."""
    peak = [0.0] + [math.inf] * layers
    for stage in range(stages):
        before, peak = peak, [math.inf] * (layers + 1)
        for stop in range(stage + 1, layers - (stages - stage - 1) + 1):
            for start in range(stop - 1, stage - 1, -1):
                own = cost(stage, start, stop)
                if own >= peak[stop]:
                    break  # a longer run costs no less
                peak[stop] = min(peak[stop], max(own, before[start]))
    return peak[layers]


def _evenest_sizes(cost: StageCost, layers: int, stages: int, limit: float) -> tuple[int, ...]:
    """Stage sizes of the least sum of squares, then the least in order, with no stage above `limit`."""
    best: dict[int, tuple[int, tuple[int, ...]]] = {layers: (0, ())}
    for stage in reversed(range(stages)):
        after, best = best, {}
        for start in range(stage, layers):
            options = []
            for stop in range(start + 1, layers + 1):
                if cost(stage, start, stop) > limit:
                    break
                if stop in after:
                    squares, sizes = after[stop]
                    options.append((squares + (stop - start) ** 2, (stop - start, *sizes)))
            if options:
                best[start] = min(options)
    return best[0][1]
