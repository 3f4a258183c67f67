"""The gradient noise scale (McCandlish et al., arXiv 1812.06162): how large a batch is worth its work.

The mean gradient of B tokens has the expected square |G|^2 + tr(C) / B, of the true gradient G and the covariance C of a
token's gradient. From the squares at two sizes, a micro-batch's and the global batch's, follow both (appendix A.1). Their
quotient tr(C) / |G|^2 is the noise scale in tokens: well below it a batch of twice the size takes half the steps, well
above it a larger batch saves next to nothing. Both are averaged over measurements before they are divided, since the
quotient of single estimates is biased.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.model.gpt import MicroBatch
from megagpt.parallel.shard import is_second_copy, shard_of
from megagpt.parallel.topology import Topology
from megagpt.training.batches import token_count
from megagpt.training.engine import Engine, StepResult

DECAY = 0.9
"""Of the running means, by measurement."""


class Estimate(NamedTuple):
    """Both without bias; a single one is noisy, and may be negative."""

    noise: float
    """tr(C), of one token's gradient."""
    signal: float
    """|G|^2"""


def estimate(small_square: float, big_square: float, small: float, big: float) -> Estimate:
    """From the mean squared gradient norms of batches of `small` and `big` tokens."""
    noise = (small_square - big_square) / (1 / small - 1 / big)
    return Estimate(noise, (big * big_square - small * small_square) / (big - small))


class NoiseScale:
    """Measured on request during a run: `look` within a step, then `update` with its result; `news` for the log."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._small_square = math.nan
        self._mean = Estimate(0.0, 0.0)  # of so many measurements that the weights of both cancel in the quotient
        self._news: dict[str, float] = {}

    def look(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Measure the micro-batches' gradients (collective); for `Engine.train_step`."""
        self._small_square = mean_square(self._engine, micro_batches)

    def update(self, result: StepResult, n_tokens: int, sequences: int) -> None:
        """Compare them with the gradient of the step's batch of `n_tokens` in `sequences`."""
        small = n_tokens / (sequences // self._engine.config.training.micro_batch_size)
        big_square = result.grad_norm**2
        if result.skipped or not math.isfinite(big_square + self._small_square) or n_tokens == 0:
            return
        now = estimate(self._small_square, big_square, small, n_tokens)
        self._mean = Estimate(*(DECAY * old + (1 - DECAY) * new for old, new in zip(self._mean, now, strict=True)))
        noise, signal = self._mean
        scale = noise / signal if noise > 0 and signal > 0 else math.nan
        self._news = {"noise_scale": scale, "suggested_batch_size": scale * sequences / n_tokens}

    def news(self) -> dict[str, float]:
        """noise_scale, tokens, and suggested_batch_size, sequences, if measured since the last call; NaN while unknown."""
        news, self._news = self._news, {}
        return news


def mean_square(engine: Engine, micro_batches: Sequence[MicroBatch]) -> float:
    """Mean over all micro-batches of the global batch of the squared norm of each one's gradient (collective).

    The small batch is a micro-batch under every layout, so that the layout does not change the result. No gradient is
    left behind.
    """
    topology = engine.topology
    counts = torch.tensor([token_count([batch]) for batch in micro_batches], device=engine.device)
    if topology.context_group is not None:
        dist.all_reduce(counts, group=topology.context_group)
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for batch, n_tokens in zip(micro_batches, counts.tolist(), strict=True):
        engine.backward_alone(batch, n_tokens)
        total += local_square(engine.parameters, topology)
        for parameter in engine.parameters:
            parameter.grad = None
    for group in (topology.model_group, topology.data_group):
        if group is not None:
            dist.all_reduce(total, group=group)
    return float(total) / (len(micro_batches) * topology.layout.data * engine.loss_scale**2)


def local_square(parameters: Sequence[nn.Parameter], topology: Topology) -> Tensor:
    """This rank's part of the squared norm of all gradients: each number counts once over the ranks of a whole model."""
    mine = [p for p in parameters if not is_second_copy(p) and (shard_of(p).dim is not None or topology.at.tensor == 0)]
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in mine if p.grad is not None]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)
