"""Learning-rate range test: a few steps at growing learning rates, until the loss diverges (Smith, arXiv 1506.01186)."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megagpt.errors import ConfigError
from megagpt.training.trainer import Trainer

SMOOTHING = 0.9
"""Decay of the running mean of the losses."""
DIVERGED = 4.0
"""The test ends when the smoothed loss is this many times its minimum."""
NOISY_START = 0.1
"""Share of points at the start whose running mean rests on few losses; their slopes are ignored."""


class Point(NamedTuple):
    """One step of the test."""

    learning_rate: float
    loss: float
    """Nats per token, before the step."""
    smoothed: float
    """Running mean of the losses so far."""


class Suggestion(NamedTuple):
    """Learning rates to start with, both well below the rate at which training diverges."""

    steepest: float
    """Rate at which the smoothed loss falls fastest over the logarithm of the rate."""
    tenth_of_best: float
    """A tenth of the rate with the lowest smoothed loss."""


def search(trainer: Trainer, learning_rates: Sequence[float]) -> Iterator[Point]:
    """Train one step at each rate, until the smoothed loss is `DIVERGED` times its minimum. Collective."""
    mean, best = 0.0, math.inf
    with trainer.batches() as batches:
        for number, (rate, batch) in enumerate(zip(learning_rates, batches, strict=False), start=1):
            loss = trainer.train_step(batch, rate).loss
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            point = Point(rate, loss, mean / (1 - SMOOTHING**number))  # bias correction as in Adam
            best = min(best, point.smoothed)
            yield point
            if not point.smoothed <= DIVERGED * best:  # also true for NaN
                return


def suggest(points: Sequence[Point]) -> Suggestion:
    """Return the learning rates that the test supports. Raises ConfigError if the loss did not fall."""
    smoothed = np.array([point.smoothed for point in points])
    first = math.ceil(NOISY_START * len(points))
    lowest = int(np.nanargmin(smoothed)) if np.isfinite(smoothed).any() else 0
    if lowest <= first + 1:
        raise ConfigError("the loss did not fall at any learning rate: start lower (--min-rate), or take more steps (--steps)")
    rates = [point.learning_rate for point in points]
    slope = np.gradient(smoothed[first : lowest + 1], np.log(rates[first : lowest + 1]))
    return Suggestion(rates[first + int(np.argmin(slope))], rates[lowest] / 10)
