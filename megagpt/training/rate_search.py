"""A learning rate by trying: a few steps at rates that grow, until the loss diverges (Smith, arXiv 1506.01186)."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megagpt.errors import ConfigError
from megagpt.training.trainer import Trainer

SMOOTHING = 0.9
"""Decay of the running mean of the losses."""
DIVERGED = 4.0
"""A smoothed loss of this many times its best ends the search."""
NOISY_START = 0.1
"""Share of the points at the beginning where the running mean still rests on few losses: no slope is read there."""


class Point(NamedTuple):
    """One step of the search."""

    rate: float
    loss: float
    """Nats per token, before the step."""
    smoothed: float
    """Running mean of the losses so far."""


class Suggestion(NamedTuple):
    """Rates to begin with, both well below where training breaks."""

    steepest: float
    """Where the smoothed loss falls fastest over the logarithm of the rate."""
    tenth_of_best: float
    """A tenth of the rate at which the smoothed loss is lowest."""


def search(trainer: Trainer, rates: Sequence[float]) -> Iterator[Point]:
    """Train one step at each rate, until the smoothed loss is `DIVERGED` times its best (collective)."""
    mean, best = 0.0, math.inf
    with trainer.batches() as ready:
        for number, (rate, batch) in enumerate(zip(rates, ready, strict=False), start=1):
            loss = trainer.step_on(batch, rate).loss
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            point = Point(rate, loss, mean / (1 - SMOOTHING**number))  # as Adam's, a mean that starts at no value
            best = min(best, point.smoothed)
            yield point
            if not point.smoothed <= DIVERGED * best:  # NaN as well
                return


def suggest(points: Sequence[Point]) -> Suggestion:
    """Rates that the search speaks for. Raises ConfigError where the loss did not fall."""
    smoothed = np.array([point.smoothed for point in points])
    first = math.ceil(NOISY_START * len(points))
    lowest = int(np.nanargmin(smoothed)) if np.isfinite(smoothed).any() else 0
    if lowest <= first + 1:
        raise ConfigError("the loss did not fall at any rate: begin lower (--min-rate), or take more steps (--steps)")
    slope = np.gradient(smoothed[first : lowest + 1], np.log([point.rate for point in points[first : lowest + 1]]))
    return Suggestion(points[first + int(np.argmin(slope))].rate, points[lowest].rate / 10)
