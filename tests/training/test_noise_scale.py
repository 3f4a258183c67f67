"""The gradient noise scale: against its definition, against plain loops over one process, and without effect on the run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pool import Pool
from support.runs import Tree, corpus, micro_batches, run_trainer, tiny_config

from megagpt.config import Config
from megagpt.engine.engine import Engine, StepResult
from megagpt.errors import ConfigError
from megagpt.model.gpt import build_chunk
from megagpt.parallel.context_parallel import ContextParallel
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parameter import ParallelContext
from megagpt.parallel.topology import Topology
from megagpt.training.noise_scale import NoiseScale, estimate


def test_expected_squares_give_the_covariance_and_the_true_gradient_back() -> None:
    found = estimate(2.0 + 30.0 / 4, 2.0 + 30.0 / 64, 4, 64)
    assert found == pytest.approx((30.0, 2.0))


def test_gradients_of_known_covariance_give_their_noise_scale() -> None:
    """Gradients N(G, C) with C diagonal: tr(C) / |G|^2 is known. 400 measurements; a mean of that many errs by some 5%."""
    generator = np.random.default_rng(0)
    true, deviations = generator.normal(size=50) * 0.3, generator.uniform(0.5, 2.0, 50)
    small, big = 8, 64
    found = []
    for _ in range(400):
        tokens = true + generator.normal(size=(big, 50)) * deviations
        parts = tokens.reshape(big // small, small, 50).mean(1)
        found.append(estimate(float((parts**2).sum(1).mean()), float((tokens.mean(0) ** 2).sum()), small, big))
    noise, signal = np.mean(found, 0)
    assert noise == pytest.approx((deviations**2).sum(), rel=0.05)
    assert noise / signal == pytest.approx((deviations**2).sum() / (true**2).sum(), rel=0.1)


def test_noise_and_signal_are_smoothed_apart() -> None:
    """Two measurements of which the second's quotient is negative: the quotient of the means, not the mean of quotients."""
    engine: Any = type("", (), {"config": tiny_config()})  # micro-batches of 2 sequences
    scale, squares = NoiseScale(engine), [(9.0, 1.0), (9.0, 2.0)]
    for small_square, big_square in squares:
        scale._small_square = small_square
        scale.update(StepResult(None, math.sqrt(big_square), 1.0, False), 160, 16)
    (noise_1, signal_1), (noise_2, signal_2) = (estimate(a, b, 20, 160) for a, b in squares)
    assert signal_1 < 0 < signal_2
    news = scale.news()
    expected = (0.9 * noise_1 + noise_2) / (0.9 * signal_1 + signal_2)
    assert news == pytest.approx({"noise_scale": expected, "suggested_batch_size": expected / 10})
    assert scale.news() == {}


def test_a_skipped_or_broken_step_is_left_out() -> None:
    engine: Any = type("", (), {"config": tiny_config()})
    scale = NoiseScale(engine)
    scale._small_square = 9.0
    scale.update(StepResult(None, 1.0, 1.0, True), 160, 16)
    scale.update(StepResult(None, math.inf, 1.0, False), 160, 16)
    assert scale.news() == {}


def measured(config: Config) -> dict[str, float]:
    """Of the first step, through the engine."""
    parallel = config.parallel
    topology = Topology.create(parallel.tensor, parallel.pipeline, context=parallel.context)
    engine = Engine(config, topology, torch.device("cpu"))
    context = ContextParallel(rank=topology.cp_rank, size=topology.layout.context)
    scale, n_tokens = NoiseScale(engine), count_labels(config, 0)
    batches = [
        type(batch)(context.part(batch.tokens), context.part(batch.labels), batch.seed)
        for batch in micro_batches(config, 0, topology.dp_rank, topology.layout.data)
    ]
    result = engine.train_step(batches, n_tokens, 0.0, scale.look)
    scale.update(result, n_tokens, config.training.global_batch_size)
    engine.close()
    return {"small": scale._small_square, **scale.news()}


def by_plain_loops(config: Config) -> dict[str, float]:
    """The same from gradients that autograd alone makes, a micro-batch at a time."""
    chunk = build_chunk(config, ParallelContext(DeferredGradients()), range(config.model.n_layer))
    batches = micro_batches(config, 0, 0, 1)
    gradients, counts = [], []
    for batch in batches:
        chunk.zero_grad(set_to_none=True)
        chunk(None, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in chunk.parameters() if p.grad is not None]).double())
        counts.append(int((batch.labels >= 0).sum()))
    small_square = sum(float((g / n).square().sum()) for g, n in zip(gradients, counts, strict=True)) / len(batches)
    big, small = sum(counts), sum(counts) / len(batches)
    big_square = float((sum(gradients) / big).square().sum())
    noise = (small_square - big_square) / (1 / small - 1 / big)
    signal = (big * big_square - small * small_square) / (big - small)
    return {"small": small_square, "noise_scale": noise / signal, "sequences": noise / signal * 16 / big}


LAYOUTS: dict[str, tuple[int, Tree, int]] = {
    "alone": (1, {}, 1),
    "data 2, ZeRO-0": (2, {}, 0),
    "data 4, ZeRO-2": (4, {}, 2),
    "2 x 2 x 2, sequence parallel": (8, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 1),
    "context 2": (2, {"context": 2}, 1),
    "zbv, data 2, ZeRO-2": (4, {"pipeline": 2, "schedule": "zbv"}, 2),
}


@pytest.fixture(scope="module")
def expected(ranks: Pool) -> dict[str, float]:
    return ranks.run(1, by_plain_loops, tiny_config())[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_measures_what_plain_loops_do(name: str, ranks: Pool, expected: dict[str, float]) -> None:
    """To 1e-5 in the squares; 1e-4 in the scale, whose signal is a small difference of them."""
    world, parallel, stage = LAYOUTS[name]
    for result in ranks.run(world, measured, tiny_config(parallel=parallel, zero={"stage": stage})):
        assert result["small"] == pytest.approx(expected["small"], rel=1e-5)
        assert result["noise_scale"] == pytest.approx(expected["noise_scale"], rel=1e-4)
        assert result["suggested_batch_size"] == pytest.approx(expected["sequences"], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 2])
def test_the_run_is_the_same_to_the_bit_with_and_without(stage: int, ranks: Pool, tmp_path: Path) -> None:
    data = corpus(tmp_path)
    runs = {}
    for interval in (None, 2):
        logging = {"interval": 1, "metrics_file": str(tmp_path / f"{interval}.jsonl"), "noise_scale_interval": interval}
        training = {"steps": 5, "precision": "bf16"}
        config = tiny_config(data={"train": data}, training=training, logging=logging, zero={"stage": stage})
        runs[interval] = ranks.run(2, run_trainer, config)
    assert runs[2][0]["losses"] == runs[None][0]["losses"]
    for (name, *_, values), (_, *_, wanted) in zip(runs[2][0]["weights"], runs[None][0]["weights"], strict=True):
        assert np.array_equal(values, wanted), name
    assert [record["step"] for record in runs[2][0]["records"] if "noise_scale" in record] == [2, 4]
    assert not any("noise_scale" in record for record in runs[None][0]["records"])


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"zero": {"stage": 3}}, "not kept whole under zero.stage 3"),
        ({"training": {"micro_batch_size": 16}}, "both have 16 sequences"),
        ({"training": {"batch_ramp": {"start": 2, "increment": 2, "samples": 8}}}, "both have 2 sequences"),
    ],
)
def test_what_cannot_be_measured_is_refused(sections: Tree, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(logging={"noise_scale_interval": 1}, **sections)
