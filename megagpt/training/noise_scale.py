"""The gradient noise scale (McCandlish et al., arXiv 1812.06162): how large a batch still speeds up training.

The mean gradient of B tokens has the expected squared norm |G|^2 + tr(C) / B, where G is the true gradient and C the
covariance of one token's gradient. The squared norms at two batch sizes, a micro-batch and the global batch, give both
(appendix A.1). Their quotient tr(C) / |G|^2 is the noise scale in tokens: well below it, a batch of twice the size needs
half the steps; well above it, a larger batch saves almost nothing. Both are averaged over measurements before they are
divided, because the quotient of single estimates is biased.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.engine.engine import Engine, StepResult
from megagpt.labels import IGNORED
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel.parameter import shard_of
from megagpt.parallel.topology import Topology

DECAY = 0.9
"""Decay of the running means, per measurement."""


class Estimate(NamedTuple):
    """Unbiased estimates; a single one is noisy and may be negative."""

    noise: float
    """tr(C) of one token's gradient."""
    signal: float
    """|G|^2"""


def estimate(small_square: float, big_square: float, small: float, big: float) -> Estimate:
    """Estimate noise and signal from the mean squared gradient norms of batches of `small` and `big` tokens.

    `small` may be an average if the small batches differ in size.
    """
    noise = (small_square - big_square) / (1 / small - 1 / big)
    return Estimate(noise, (big * big_square - small * small_square) / (big - small))


class NoiseScale:
    """Measures the noise scale in selected steps: `measure` before the step, `update` with its result."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._small_square = math.nan
        self._mean = Estimate(0.0, 0.0)  # both have the same weight, which cancels in the quotient
        self._report: dict[str, float] = {}

    def measure(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Measure the gradients of the step's micro-batches one by one, before the step itself. Collective."""
        self._small_square = mean_square(self._engine, micro_batches)

    def update(self, result: StepResult, n_tokens: int, sequences: int) -> None:
        """Compare with the gradient of the step's batch of `n_tokens` tokens in `sequences` sequences."""
        big_square = result.grad_norm**2
        if result.skipped or not math.isfinite(big_square + self._small_square) or n_tokens == 0:
            return
        small = n_tokens / (sequences // self._engine.config.training.micro_batch_size)
        latest = estimate(self._small_square, big_square, small, n_tokens)
        self._mean = Estimate(*(DECAY * old + (1 - DECAY) * new for old, new in zip(self._mean, latest, strict=True)))
        noise, signal = self._mean
        scale = noise / signal if noise > 0 and signal > 0 else math.nan
        self._report = {"noise_scale": scale, "suggested_batch_size": scale * sequences / n_tokens}

    def take_report(self) -> dict[str, float]:
        """Return noise_scale (tokens) and suggested_batch_size (sequences) if measured since the last call, else nothing.

        Both are NaN until the estimates are positive.
        """
        report, self._report = self._report, {}
        return report


def mean_square(engine: Engine, micro_batches: Sequence[MicroBatch]) -> float:
    """Return the mean squared gradient norm over all micro-batches of the global batch. Collective.

    The small batch is a micro-batch under every layout, so the layout does not change the result.
    """
    topology = engine.topology
    counts = torch.stack([(batch.labels != IGNORED).sum() for batch in micro_batches])
    if topology.context_group is not None:
        dist.all_reduce(counts, group=topology.context_group)
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for batch, n_tokens in zip(micro_batches, counts.tolist(), strict=True):
        with engine.micro_batch_gradient(batch, n_tokens):
            total += local_square(engine.parameters, topology)
    for group in (topology.model_parallel_group, topology.dp_cp_group):
        if group is not None:
            dist.all_reduce(total, group=group)
    return float(total) / (len(micro_batches) * topology.layout.dp_cp * engine.loss_scale**2)


def local_square(parameters: Sequence[nn.Parameter], topology: Topology) -> Tensor:
    """Return this rank's part of the squared gradient norm: each weight counts once over the ranks of a replica."""
    counted = [p for p in parameters if _counts_here(p, topology)]
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in counted if p.grad is not None]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)


def _counts_here(parameter: nn.Parameter, topology: Topology) -> bool:
    shard = shard_of(parameter)
    return not shard.second_copy and (shard.dim is not None or topology.tp_rank == 0)
