"""The gradient noise scale equals its definition and plain loops over one process, and does not change the run."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pool import Pool
from support.runs import (
    Tree,
    corpus,
    count_labels,
    create_engine,
    full_model,
    local_micro_batches,
    micro_batches,
    run_trainer,
    tiny_config,
)
from torch import nn

from megagpt.config import Config
from megagpt.engine.engine import StepResult
from megagpt.errors import ConfigError
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import replicated_parameter
from megagpt.parallel.topology import Topology
from megagpt.training.noise_scale import NoiseScale, estimate, mean_square


def test_expected_squares_give_back_the_covariance_and_the_true_gradient() -> None:
    assert estimate(2.0 + 30.0 / 4, 2.0 + 30.0 / 64, 4, 64) == pytest.approx((30.0, 2.0))


def test_gradients_of_known_covariance_give_their_noise_scale() -> None:
    """Gradients N(G, C) with C diagonal: tr(C) / |G|^2 is known. The error of a mean of 400 measurements is about 5%."""
    generator = np.random.default_rng(0)
    true, deviations = generator.normal(size=50) * 0.3, generator.uniform(0.5, 2.0, 50)
    small, big = 8, 64
    estimates = []
    for _ in range(400):
        tokens = true + generator.normal(size=(big, 50)) * deviations
        batches = tokens.reshape(big // small, small, 50).mean(1)
        estimates.append(estimate(float((batches**2).sum(1).mean()), float((tokens.mean(0) ** 2).sum()), small, big))
    noise, signal = np.mean(estimates, 0)
    assert noise == pytest.approx((deviations**2).sum(), rel=0.05)
    assert noise / signal == pytest.approx((deviations**2).sum() / (true**2).sum(), rel=0.1)


def config_of(**sections: Tree) -> Config:
    """Return a tiny config with micro-batches of 2 sequences."""
    return tiny_config(**{**sections, "training": {"micro_batch_size": 2, **sections.get("training", {})}})


class ScriptedEngine:
    """An engine of one parameter whose micro-batch gradients have given squared norms."""

    def __init__(self, squares: list[float]) -> None:
        self.config = config_of()
        self.topology = Topology()
        self.device = torch.device("cpu")
        self.loss_scale = 1.0
        self.parameters: list[nn.Parameter] = [replicated_parameter("weight", (1,), ParallelContext())]
        self._squares = iter(squares)

    @contextmanager
    def micro_batch_gradient(self, micro_batch: MicroBatch, n_tokens: int) -> Iterator[None]:
        self.parameters[0].grad = torch.tensor([math.sqrt(next(self._squares))])
        yield
        self.parameters[0].grad = None


MICRO_BATCH = MicroBatch(torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64))


def scripted(squares: list[float]) -> NoiseScale:
    engine: Any = ScriptedEngine(squares)
    return NoiseScale(engine)


def test_noise_and_signal_are_smoothed_separately() -> None:
    """Two measurements; the quotient of the second is negative: the quotient of the means, not the mean of quotients."""
    squares = [(9.0, 1.0), (9.0, 2.0)]
    scale = scripted([small_square for small_square, _ in squares])
    for _, big_square in squares:
        scale.measure([MICRO_BATCH])
        scale.update(StepResult(math.sqrt(big_square), 1.0, False), 160, 16)
    (noise_1, signal_1), (noise_2, signal_2) = (estimate(a, b, 20, 160) for a, b in squares)
    assert signal_1 < 0 < signal_2
    report = scale.take_report()
    expected = (0.9 * noise_1 + noise_2) / (0.9 * signal_1 + signal_2)
    assert report == pytest.approx({"noise_scale": expected, "suggested_batch_size": expected / 10})
    assert scale.take_report() == {}


def test_the_small_square_is_the_mean_over_the_micro_batches() -> None:
    scale = scripted([1.0, 5.0, 12.0])
    scale.measure([MICRO_BATCH] * 3)
    scale.update(StepResult(math.sqrt(2.0), 1.0, False), 160, 16)
    noise, signal = estimate(6.0, 2.0, 20, 160)
    assert scale.take_report()["noise_scale"] == pytest.approx(noise / signal)


@pytest.mark.parametrize("result", [StepResult(1.0, 1.0, True), StepResult(math.inf, 1.0, False)])
def test_a_skipped_or_broken_step_is_left_out(result: StepResult) -> None:
    scale = scripted([9.0])
    scale.measure([MICRO_BATCH])
    scale.update(result, 160, 16)
    assert scale.take_report() == {}


def measure_first_step(config: Config) -> dict[str, float]:
    """Return what the engine measures in the first step."""
    engine = create_engine(config)
    scale, n_tokens = NoiseScale(engine), count_labels(config, 0)
    batches = local_micro_batches(config, 0, engine.topology)
    small_square = mean_square(engine, batches)
    scale.measure(batches)
    engine.forward_backward(batches, n_tokens)
    scale.update(engine.step(0.0), n_tokens, config.training.global_batch_size)
    engine.close()
    return {"small": small_square, **scale.take_report()}


def by_plain_loops(config: Config) -> dict[str, float]:
    """Return the same from gradients that autograd alone computes, one micro-batch at a time."""
    model, batches = full_model(config), micro_batches(config, 0, 0, 1)
    gradients, counts = [], []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        model(None, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
        counts.append(int((batch.labels >= 0).sum()))
    small_square = sum(float((g / n).square().sum()) for g, n in zip(gradients, counts, strict=True)) / len(batches)
    big, small = sum(counts), sum(counts) / len(batches)
    big_square = float((sum(gradients) / big).square().sum())
    noise = (small_square - big_square) / (1 / small - 1 / big)
    signal = (big * big_square - small * small_square) / (big - small)
    return {"small": small_square, "noise_scale": noise / signal, "sequences": noise / signal * 16 / big}


LAYOUTS: dict[str, tuple[int, Tree, int]] = {
    "one process": (1, {}, 1),
    "data 2, ZeRO-0": (2, {}, 0),
    "data 4, ZeRO-2": (4, {}, 2),
    "2 x 2 x 2, sequence parallel": (8, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 1),
    "context 2": (2, {"context": 2}, 1),
    "zbv, data 2, ZeRO-2": (4, {"pipeline": 2, "schedule": "zbv"}, 2),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    return by_plain_loops(config_of())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_measures_the_same_as_plain_loops(name: str, ranks: Pool, expected: dict[str, float]) -> None:
    """Relative 1e-5 in the squares; 1e-4 in the scale, whose signal is a small difference of squares."""
    world, parallel, stage = LAYOUTS[name]
    for result in ranks.run(world, measure_first_step, config_of(parallel=parallel, zero={"stage": stage})):
        assert result["small"] == pytest.approx(expected["small"], rel=1e-5)
        assert result["noise_scale"] == pytest.approx(expected["noise_scale"], rel=1e-4)
        assert result["suggested_batch_size"] == pytest.approx(expected["sequences"], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_has_the_same_bits_with_and_without_the_measurement(stage: int, ranks: Pool, tmp_path: Path) -> None:
    data = corpus(tmp_path)
    runs = {}
    for interval in (None, 2):
        logging = {"interval": 1, "metrics_file": str(tmp_path / f"{interval}.jsonl"), "noise_scale_interval": interval}
        training = {"steps": 5, "precision": "bf16"}
        config = config_of(data={"train": data}, training=training, logging=logging, zero={"stage": stage})
        runs[interval] = ranks.run(2, run_trainer, config)
    assert runs[2][0]["losses"] == runs[None][0]["losses"]
    for (name, *_, values), (_, *_, expected) in zip(runs[2][0]["weights"], runs[None][0]["weights"], strict=True):
        assert np.array_equal(values, expected), name
    assert [record["step"] for record in runs[2][0]["records"] if "noise_scale" in record] == [2, 4]
    assert not any("noise_scale" in record for record in runs[None][0]["records"])


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"zero": {"stage": 3}}, "not available under zero.stage 3"),
        ({"training": {"micro_batch_size": 16}}, "both have 16 sequences"),
        ({"training": {"batch_ramp": {"start": 2, "increment": 2, "samples": 8}}}, "both have 2 sequences"),
    ],
)
def test_a_config_that_cannot_be_measured_is_an_error(sections: Tree, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(logging={"noise_scale_interval": 1}, **sections)
