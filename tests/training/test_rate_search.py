"""The search for a learning rate: real steps at the rates it names, an end where the loss diverges, sound advice."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pool import Pool
from support.runs import Tree, corpus, run_trainer, tiny_config

from megagpt.commands.find_learning_rate import growing_rates
from megagpt.config import Config
from megagpt.data.blend import build_datasets
from megagpt.errors import ConfigError
from megagpt.parallel.topology import Topology
from megagpt.training.rate_search import Point, search, suggest
from megagpt.training.trainer import Trainer


def find(config: Config, rates: list[float]) -> list[Point]:
    topology = Topology.create(config.parallel.tensor, config.parallel.pipeline)
    trainer = Trainer(config, topology, build_datasets(config.data, config.model.n_positions), torch.device("cpu"))
    points = list(search(trainer, rates))
    trainer.close()
    return points


def config_of(folder: Path, data: str, **sections: Tree) -> Config:
    tree: Tree = {
        "data": {"train": data},
        "training": {"steps": 12},
        "lr_schedule": {"type": "constant"},
        "logging": {"interval": 1, "metrics_file": str(folder / "metrics.jsonl")},
    }
    return tiny_config(**{**tree, **sections})


def test_rates_grow_by_the_same_factor() -> None:
    assert growing_rates(1e-4, 1e-1, 4) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    with pytest.raises(ConfigError, match="expected 0 < --min-rate < --max-rate"):
        growing_rates(1.0, 0.1, 10)


def test_at_one_rate_the_search_is_the_run(ranks: Pool, tmp_path: Path) -> None:
    data = corpus(tmp_path)
    (run,) = ranks.run(1, run_trainer, config_of(tmp_path, data))
    points = ranks.run(1, find, config_of(tmp_path, data), [1e-2] * 12)[0]
    assert [point.loss for point in points] == run["losses"]
    weights = 0.9 ** np.arange(11, -1, -1)  # the running mean, written as the sum that it is
    assert points[-1].smoothed == pytest.approx(float(weights @ run["losses"] / weights.sum()))


def test_it_ends_where_the_loss_diverges_on_every_rank_of_any_layout(ranks: Pool, tmp_path: Path) -> None:
    data, steps = corpus(tmp_path), 40
    sgd: Tree = {"type": "sgd", "clip_grad": 0.0, "weight_decay": 0.0}
    length: Tree = {"training": {"steps": steps}, "optimizer": sgd}
    rates = growing_rates(1e-3, 1e6, steps)
    (alone,) = ranks.run(1, find, config_of(tmp_path, data, **length), rates)
    split = ranks.run(4, find, config_of(tmp_path, data, parallel={"pipeline": 2}, **length), rates)
    assert 5 < len(alone) < steps
    best = min(point.smoothed for point in alone)
    assert all(point.smoothed <= 4 * best for point in alone[:-1]) and not alone[-1].smoothed <= 4 * best
    assert len({len(points) for points in split}) == 1
    falling = [point.loss for point in alone[:10]]  # before the rates at which rounding grows from step to step
    assert [point.loss for point in split[3][:10]] == pytest.approx(falling, rel=1e-5)


def curve(centre: float, end: float) -> list[Point]:
    """A loss that falls as a logistic function of log10(rate) around 10^centre, and jumps from 10^end on."""
    exponents = np.linspace(-6, 0, 121)
    losses = 6 - 4 / (1 + np.exp(-4 * (exponents - centre))) + np.where(exponents > end, 10 * (exponents - end), 0)
    return [Point(10**e, loss, loss) for e, loss in zip(exponents.tolist(), losses.tolist(), strict=True)]


def test_the_advice_is_the_steepest_point_and_a_tenth_of_the_lowest() -> None:
    found = suggest(curve(-3.0, -1.0))
    assert math.log10(found.steepest) == pytest.approx(-3.0, abs=0.05)
    assert math.log10(found.tenth_of_best) == pytest.approx(-2.0, abs=0.05)
    broken = [*curve(-3.0, -1.0), Point(2.0, math.nan, math.nan)]
    assert suggest(broken) == pytest.approx(found)


def test_a_loss_that_never_falls_gives_no_advice() -> None:
    rising = [Point(10.0**-e, float(20 - e), float(20 - e)) for e in range(20, 0, -1)]
    with pytest.raises(ConfigError, match="did not fall at any rate"):
        suggest(rising)
