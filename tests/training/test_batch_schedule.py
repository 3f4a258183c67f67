"""Batch-size ramps: sizes, the samples of each step, the length of a run, resuming, and any layout."""

from fractions import Fraction
from itertools import islice, pairwise, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.exhaustive import more
from support.pool import Pool
from support.runs import Tree, corpus, full_weights, run_trainer, tiny_config

from megagpt.config import Config, data_parallel_size
from megagpt.config.schema import BatchRampConfig, TrainingConfig
from megagpt.data.gpt_dataset import Sample
from megagpt.data.sampler import GlobalBatches
from megagpt.errors import ConfigError
from megagpt.training.batch_schedule import batch_size, batches_from, steps_between, trained_samples
from megagpt.training.run_length import total_steps

RAMP = {"start": 4, "increment": 4, "samples": 48}
SIZES = [4, 4, 4, 4, 8, 8, 12, 12, 16, 16]
"""Sizes of the steps of RAMP up to 16: three sizes below 16 for 16 samples each; a size changes when a step starts."""


def ramp_config(start: int, increment: int, samples: int, final_size: int) -> TrainingConfig:
    ramp = BatchRampConfig(start=start, increment=increment, samples=samples)
    return TrainingConfig(steps=1, micro_batch_size=1, global_batch_size=final_size, batch_ramp=ramp)


@st.composite
def ramps(draw: st.DrawFn) -> TrainingConfig:
    start, increment, increments = (draw(st.integers(1, most)) for most in (5, 4, 6))
    return ramp_config(start, increment, draw(st.integers(1, 200)), start + increment * increments)


def test_the_sizes_of_a_ramp_equal_those_computed_by_hand() -> None:
    ramp = ramp_config(4, 4, 48, 16)
    assert [size for _, size in islice(batches_from(0, ramp), 10)] == SIZES
    assert [first for first, _ in islice(batches_from(0, ramp), 10)] == [sum(SIZES[:step]) for step in range(10)]
    assert next(batches_from(24, ramp)) == (24, 8)


@given(ramps(), st.integers(0, 300))
def test_each_size_is_used_for_an_equal_share_of_the_samples(ramp: TrainingConfig, consumed: int) -> None:
    sizes = list(range(ramp.batch_ramp.start or 0, ramp.global_batch_size + 1, ramp.batch_ramp.increment))
    share = Fraction(ramp.batch_ramp.samples, len(sizes) - 1)
    started = [size for number, size in enumerate(sizes) if consumed >= number * share]
    assert batch_size(consumed, ramp) == started[-1]


@given(ramps(), st.integers(0, 250), st.integers(0, 300))
def test_the_length_of_a_run_equals_a_count_of_its_batches(ramp: TrainingConfig, consumed: int, target: int) -> None:
    batches = list(takewhile(lambda batch: batch[0] < target, batches_from(consumed, ramp)))
    assert steps_between(consumed, target, ramp) == (len(batches), sum(batches[-1]) if batches else consumed)


@given(ramps(), st.sets(st.integers(0, 40)), st.integers(1, 20))
def test_no_batch_overlaps_a_skipped_range(ramp: TrainingConfig, numbers: set[int], length: int) -> None:
    skipped = [(number * 7, number * 7 + min(length, 7)) for number in sorted(numbers)]
    batches = list(islice(batches_from(0, ramp, skipped), 30))
    for first, size in batches:
        assert all(first + size <= start or end <= first for start, end in skipped)
    for (first, size), (following, _) in pairwise(batches):
        assert following >= first + size


def test_trained_samples_exclude_the_skipped_ranges_before_the_current_sample() -> None:
    skipped = [(8, 16), (24, 40)]
    counts = [trained_samples(consumed, skipped) for consumed in (0, 8, 12, 16, 24, 40, 48)]
    assert counts == [0, 8, 8, 8, 16, 16, 24]
    assert trained_samples(48, []) == 48


@given(ramps(), st.integers(0, 30), st.sets(st.integers(0, 25), max_size=4))
def test_trained_samples_are_the_sum_of_the_batch_sizes(ramp: TrainingConfig, steps: int, failed: set[int]) -> None:
    """With the batches `failed` of the run skipped, as after rollbacks."""
    skipped: list[tuple[int, int]] = []
    for number in sorted(failed):
        first, size = next(islice(batches_from(0, ramp, skipped), number, None))
        skipped.append((first, first + size))
    batches = list(islice(batches_from(0, ramp, skipped), steps))
    consumed = sum(batches[-1]) if batches else 0
    assert trained_samples(consumed, skipped) == sum(size for _, size in batches)


@pytest.mark.parametrize("step", [0, 1, 4, 5, 7])
def test_tokens_round_up_and_epochs_round_down_to_full_steps_from_any_step(step: int) -> None:
    consumed = sum(SIZES[:step])
    datasets: Any = SimpleNamespace(train=SimpleNamespace(samples_per_epoch=50))

    def steps(**length: Any) -> int:
        config = tiny_config(
            training={"micro_batch_size": 2, "steps": None, "global_batch_size": 16, "batch_ramp": RAMP, **length}
        )
        return total_steps(config, datasets, step, consumed)

    assert steps(tokens=48 * 16) == steps(tokens=47 * 16 + 1) == 8  # 8 steps have 56 samples, 7 have 44
    assert steps(tokens=44 * 16) == 7
    assert (steps(epochs=1), steps(epochs=1.12)) == (7, 8)


def test_a_run_shorter_than_its_first_step_is_refused() -> None:
    config = tiny_config(training={"micro_batch_size": 2, "steps": None, "epochs": 1, "batch_ramp": RAMP})
    datasets: Any = SimpleNamespace(train=SimpleNamespace(samples_per_epoch=3))
    with pytest.raises(ConfigError, match=r"3 samples are less than one step of training.batch_ramp.start 4"):
        total_steps(config, datasets)


@pytest.mark.parametrize(
    "ramp, message",
    [
        ({"start": 4, "increment": 4}, "batch_ramp.samples: goes with training.batch_ramp.start"),
        ({"samples": 4}, "batch_ramp.start: goes with training.batch_ramp.samples"),
        ({**RAMP, "start": 16}, "16 is not below training.global_batch_size 16"),
        ({**RAMP, "increment": 8}, "steps of 8 from 4 do not meet training.global_batch_size 16; 2, 4, 6, 12 would"),
        ({**RAMP, "start": 3, "increment": 13}, "start: 3 is not a multiple of training.micro_batch_size 2; nearest: 4"),
        ({**RAMP, "start": 10, "increment": 3}, "increment: 3 is not a multiple of training.micro_batch_size 2"),
        ({**RAMP, "strat": 1}, "strat: no such key; did you mean start?"),
    ],
)
def test_impossible_ramps_are_refused_with_the_reason(ramp: Tree, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_config(training={"micro_batch_size": 2, "batch_ramp": ramp})
    assert message in str(error.value)


def test_a_world_that_cannot_share_every_size_evenly_is_refused() -> None:
    assert data_parallel_size(tiny_config(training={"micro_batch_size": 2}), 8) == 8
    ramped = tiny_config(training={"micro_batch_size": 2, "batch_ramp": RAMP})
    assert data_parallel_size(ramped, 2) == 2  # 2, 4, 6 and 8 micro-batches
    with pytest.raises(ConfigError, match=r"for every size of training.batch_ramp\) to share; world sizes that fit: 1, 2$"):
        data_parallel_size(ramped, 4)


def test_null_means_no_ramp() -> None:
    assert tiny_config(training={"batch_ramp": None}) == tiny_config()


@pytest.mark.parametrize("dp_size", [1, 2])
def test_batches_of_changing_size_contain_every_sample_once_and_in_order(dp_size: int) -> None:
    class SampleIndices:
        def sample(self, index: int) -> Sample:
            return Sample(np.array([index, index]), np.zeros(2, bool))

    dataset: Any = SampleIndices()
    ranks = [GlobalBatches(dataset, 16, 2, rank, dp_size, 1000) for rank in range(dp_size)]
    read: list[int] = []
    for first, size in islice(batches_from(0, ramp_config(4, 4, 48, 16)), 10):
        batches = [batch for rank in ranks for batch in rank.micro_batches(first, size)]
        assert [batch.first_sample for batch in batches] == list(range(first, first + size, 2))
        read += [int(tokens[0]) for batch in batches for tokens in batch.tokens]
    assert read == list(range(sum(SIZES)))


def ramp_run(folder: Path, data: str, steps: int, parallel: Tree, stage: int) -> Config:
    """Return the config of a run with RAMP that stops after `steps` of 20 steps."""
    return tiny_config(
        model={"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
        data={"train": data},
        training={"micro_batch_size": 2, "steps": steps, "batch_ramp": RAMP},
        lr_schedule={"warmup_steps": 3, "decay_steps": 20},
        checkpoint={"dir": str(folder / "checkpoints")},
        logging={"interval": 1, "metrics_file": str(folder / "metrics.jsonl")},
        parallel=parallel,
        zero={"stage": stage},
    )


@pytest.mark.parametrize("world, parallel, stage", [(4, {"pipeline": 2}, 1), *more((2, {}, 2), (2, {"tensor": 2}, 0))])
def test_the_losses_of_a_ramp_do_not_depend_on_the_layout(
    world: int, parallel: Tree, stage: int, ranks: Pool, tmp_path: Path
) -> None:
    data = corpus(tmp_path)
    single = ranks.run(1, run_trainer, ramp_run(tmp_path / "single", data, 9, {}, 1))
    results = ranks.run(world, run_trainer, ramp_run(tmp_path / "parallel", data, 9, parallel, stage))
    assert [record["batch_size"] for record in results[0]["records"]] == SIZES[:9]
    assert [record["tokens"] for record in results[0]["records"]] == [16 * sum(SIZES[: step + 1]) for step in range(9)]
    assert results[0]["losses"] == pytest.approx(single[0]["losses"], rel=1e-5)
    weights, expected = full_weights(results), full_weights(single)
    for name, values in expected.items():
        assert float((weights[name] - values).abs().max()) < 5e-6, name


def test_a_run_resumed_within_its_ramp_equals_an_unbroken_run_bit_for_bit(ranks: Pool, tmp_path: Path) -> None:
    data = corpus(tmp_path)
    straight = ranks.run(2, run_trainer, ramp_run(tmp_path / "a", data, 9, {}, 1))
    ranks.run(2, run_trainer, ramp_run(tmp_path / "b", data, 5, {}, 1))
    halves = ranks.run(2, run_trainer, ramp_run(tmp_path / "b", data, 9, {}, 1))
    assert halves[0]["losses"] == straight[0]["losses"]
    for result, other in zip(halves, straight, strict=True):
        for (name, *_, values), (_, *_, wanted) in zip(result["weights"], other["weights"], strict=True):
            assert np.array_equal(values, wanted), name
