"""The learning-rate range test: real steps at the given rates, an end when the loss diverges, and valid suggestions."""

import math
from pathlib import Path

import numpy as np
import pytest
from support.pool import Pool
from support.runs import Tree, corpus, open_trainer, run_trainer, tiny_config

from megagpt.commands.find_learning_rate import growing_rates
from megagpt.config import Config
from megagpt.errors import ConfigError
from megagpt.training.lr_finder import Point, search, suggest


def run_search(config: Config, rates: list[float]) -> list[Point]:
    trainer = open_trainer(config)
    points = list(search(trainer, rates))
    trainer.close()
    return points


def search_config(folder: Path, data: str, **sections: Tree) -> Config:
    tree: Tree = {
        "data": {"train": data},
        "training": {"steps": 12},
        "lr_schedule": {"type": "constant"},
        "logging": {"interval": 1, "metrics_file": str(folder / "metrics.jsonl")},
    }
    return tiny_config(**{**tree, **sections})


def test_a_search_at_one_rate_equals_a_training_run(ranks: Pool, tmp_path: Path) -> None:
    data = corpus(tmp_path)
    (run,) = ranks.run(1, run_trainer, search_config(tmp_path, data))
    points = ranks.run(1, run_search, search_config(tmp_path, data), [1e-2] * 12)[0]
    assert [point.loss for point in points] == run["losses"]
    weights = 0.9 ** np.arange(11, -1, -1)  # the running mean as an explicit weighted sum
    assert points[-1].smoothed == pytest.approx(float(weights @ run["losses"] / weights.sum()))


def test_the_search_ends_on_every_rank_of_any_layout_when_the_loss_diverges(ranks: Pool, tmp_path: Path) -> None:
    data, steps = corpus(tmp_path), 40
    sgd: Tree = {"type": "sgd", "clip_grad": 0.0, "weight_decay": 0.0}
    length: Tree = {"training": {"steps": steps}, "optimizer": sgd}
    rates = growing_rates(1e-3, 1e6, steps)
    (single,) = ranks.run(1, run_search, search_config(tmp_path, data, **length), rates)
    parallel = ranks.run(4, run_search, search_config(tmp_path, data, parallel={"pipeline": 2}, **length), rates)
    assert 5 < len(single) < steps
    best = min(point.smoothed for point in single)
    assert all(point.smoothed <= 4 * best for point in single[:-1]) and not single[-1].smoothed <= 4 * best
    assert len({len(points) for points in parallel}) == 1
    falling = [point.loss for point in single[:10]]  # at larger rates, rounding differences grow from step to step
    assert [point.loss for point in parallel[3][:10]] == pytest.approx(falling, rel=1e-5)


def curve(centre: float, end: float) -> list[Point]:
    """Return losses that fall as a logistic function of log10(rate) around 10^centre, and rise after 10^end."""
    exponents = np.linspace(-6, 0, 121)
    losses = 6 - 4 / (1 + np.exp(-4 * (exponents - centre))) + np.where(exponents > end, 10 * (exponents - end), 0)
    return [Point(10**e, loss, loss) for e, loss in zip(exponents.tolist(), losses.tolist(), strict=True)]


def test_the_suggestions_are_the_steepest_point_and_a_tenth_of_the_lowest() -> None:
    suggestion = suggest(curve(-3.0, -1.0))
    assert math.log10(suggestion.steepest) == pytest.approx(-3.0, abs=0.05)
    assert math.log10(suggestion.tenth_of_best) == pytest.approx(-2.0, abs=0.05)
    broken = [*curve(-3.0, -1.0), Point(2.0, math.nan, math.nan)]
    assert suggest(broken) == pytest.approx(suggestion)


def test_a_loss_that_never_falls_gives_no_suggestion() -> None:
    rising = [Point(10.0**-e, float(20 - e), float(20 - e)) for e in range(20, 0, -1)]
    with pytest.raises(ConfigError, match="did not fall at any learning rate"):
        suggest(rising)
