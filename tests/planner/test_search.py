"""The search finds the fastest layout that fits, and its estimates are close to full predictions."""

import random

import pytest
from support.runs import tiny_config

from megagpt.config import Config, load_config
from megagpt.config.rules import broken_rules, data_parallel_size
from megagpt.errors import ConfigError
from megagpt.planner.hardware import find_hardware
from megagpt.planner.predict import Planner
from megagpt.planner.quick_estimate import QuickEstimator, in_flight, pipeline_seconds
from megagpt.planner.search import candidates, nearest_that_fits, reason, search
from megagpt.planner.stage_times import StageTimes
from megagpt.planner.strategy import Strategy
from megagpt.schedules.registry import SCHEDULES, chunks_per_rank, make_plan
from megagpt.schedules.simulate import kind_costs, peak_activations, step_time


def small(**model: int) -> Config:
    shape = {"n_layer": 8, "n_embd": 2048, "n_head": 16, "n_positions": 1024, "vocab_size": 51200, **model}
    return tiny_config(
        model={**shape, "vocab_multiple": 128},
        training={"precision": "bf16", "micro_batch_size": 1, "global_batch_size": 32},
    )


def test_the_best_is_as_fast_as_the_fastest_of_all_predictions_that_fit() -> None:
    planner = Planner(small(), find_hardware("H100"))
    found = search(planner, 8)
    every = [planner.predict(strategy) for strategy in candidates(planner.config, 8, 8)]
    fitting = [prediction for prediction in every if prediction.fits]
    assert found.tried == len(every) > 300
    assert found.ranking[0].step_seconds <= 1.02 * min(prediction.step_seconds for prediction in fitting)
    times = [prediction.step_seconds for prediction in found.ranking]
    assert times == sorted(times)
    assert all(prediction.fits for prediction in found.ranking)
    assert reason(found.ranking[0], found.ranking[-1])


def test_every_candidate_is_a_layout_that_can_run() -> None:
    for name, gpus in (("6B", 32), ("llama-3.1-8B", 64), ("125M", 6)):
        config = load_config(name)
        found = list(candidates(config, gpus, 8))
        assert found
        for strategy in random.Random(0).sample(found, min(200, len(found))):
            applied = strategy.apply(config)
            assert strategy.gpus == gpus
            assert broken_rules(applied) == []
            assert data_parallel_size(applied, gpus) == strategy.data
            assert Strategy.of(applied, gpus) == strategy


def test_thousands_of_candidates_are_estimated_for_large_models() -> None:
    assert len(list(candidates(load_config("175B"), 1024, 8))) > 3000


@pytest.mark.parametrize("name", SCHEDULES)
def test_estimates_of_a_pipeline_are_close_to_its_simulation(name: str) -> None:
    """Exact for 1F1B and GPipe; a bubble or a few percent for the others, whose limits are below."""
    limits = {"1f1b": 0.01, "gpipe": 1e-9, "zb_h1": 0.01, "interleaved_1f1b": 0.02, "interleaved_zero_bubble": 0.02}
    for ranks in (2, 4, 8):
        for micro_batches in (2 * ranks, 4 * ranks, 8 * ranks + 1):
            for chunks in (2, 4) if SCHEDULES[name].interleaved else (1,):
                plan = make_plan(name, ranks, micro_batches, chunks)
                per_rank = chunks_per_rank(name, chunks)
                for forward, inputs, weights, transfer in ((1, 1, 1, 0), (1, 1.3, 0.9, 0.02), (1, 2.2, 0.9, 0.02)):
                    costs = kind_costs(*(time / per_rank for time in (forward, inputs + weights, inputs, weights)))
                    times = StageTimes(forward, inputs + weights, inputs, weights)
                    estimate = pipeline_seconds(name, ranks, micro_batches, per_rank, times, transfer)
                    simulated = step_time(plan, costs, transfer)
                    assert estimate == pytest.approx(simulated, rel=limits.get(name, 0.12)), (ranks, micro_batches, chunks)
                flying = in_flight(name, ranks, micro_batches, per_rank)
                assert 0 <= flying - peak_activations(plan) <= 2


@pytest.mark.parametrize(("name", "n_samples"), [("6B", 40), ("t5-v1.1-3B", 20)])
def test_estimates_are_close_to_predictions(name: str, n_samples: int) -> None:
    planner = Planner(load_config(name), find_hardware("H100"))
    estimator = QuickEstimator(planner)
    found = [strategy for strategy in candidates(planner.config, 32, 8) if strategy.micro_batches >= 2 * strategy.pipeline]
    for strategy in random.Random(1).sample(found, n_samples):
        estimate, prediction = estimator.estimate(strategy), planner.predict(strategy)
        is_v = strategy.schedule in ("v_half", "v_min")  # depend most on the ratio of the times
        assert estimate.seconds == pytest.approx(prediction.step_seconds, rel=0.5 if is_v else 0.2), strategy
        assert estimate.memory.total > 0.6 * prediction.peak.total, strategy  # what is too large is found by the prediction


def test_no_layout_and_no_room_are_one_sentence() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^--gpus 8: no layout fits in the .* GiB that a run can use on A100-40GB; the smallest, .* needs .* GiB",
    ):
        search(Planner(load_config("175B"), find_hardware("A100-40GB")), 8)
    with pytest.raises(ConfigError, match="^--gpus 37: no layout is possible with training.global_batch_size 32"):
        search(Planner(small(), find_hardware("H100")), 37)


def test_the_nearest_layout_that_fits_changes_as_little_as_possible() -> None:
    config = load_config("175B", ["training.recompute=none", "training.micro_batch_size=4"])
    planner = Planner(config, find_hardware("H100"))
    strategy = Strategy.of(config, 64)
    assert not planner.predict(strategy).fits
    nearest = nearest_that_fits(planner, strategy)
    assert nearest is not None and nearest.fits
    assert (nearest.strategy.tensor, nearest.strategy.pipeline) == (8, 8)
