"""A batch that grows: the sizes, the samples that each step reads, the length of a run, resumption, any layout."""

from fractions import Fraction
from itertools import islice, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pool import Pool
from support.runs import Tree, corpus, run_trainer, tiny_config, whole_weights

from megagpt.config import Config, data_parallel_size
from megagpt.config.schema import BatchRampConfig, TrainingConfig
from megagpt.data.sampler import GlobalBatches
from megagpt.errors import ConfigError
from megagpt.training.batch_ramp import batch_size, batches_from, steps_between
from megagpt.training.trainer import total_steps

RAMP = {"start": 4, "increment": 4, "samples": 48}
SIZES = [4, 4, 4, 4, 8, 8, 12, 12, 16, 16]
"""Of RAMP to 16: three sizes below it, 16 samples for each, a size going on until a step begins in the next part."""


def training(start: int, increment: int, samples: int, full: int) -> TrainingConfig:
    ramp = BatchRampConfig(start=start, increment=increment, samples=samples)
    return TrainingConfig(steps=1, micro_batch_size=1, global_batch_size=full, batch_ramp=ramp)


@st.composite
def ramps(draw: st.DrawFn) -> TrainingConfig:
    start, increment, increments = (draw(st.integers(1, most)) for most in (5, 4, 6))
    return training(start, increment, draw(st.integers(1, 200)), start + increment * increments)


def test_the_sizes_of_a_ramp_by_hand() -> None:
    ramp = training(4, 4, 48, 16)
    assert [size for _, size in islice(batches_from(0, ramp), 10)] == SIZES
    assert [first for first, _ in islice(batches_from(0, ramp), 10)] == [sum(SIZES[:step]) for step in range(10)]
    assert next(batches_from(24, ramp)) == (24, 8)


@given(ramps(), st.integers(0, 300))
def test_a_size_holds_for_an_equal_part_of_the_samples(ramp: TrainingConfig, samples: int) -> None:
    sizes = list(range(ramp.batch_ramp.start or 0, ramp.global_batch_size + 1, ramp.batch_ramp.increment))
    part = Fraction(ramp.batch_ramp.samples, len(sizes) - 1)
    begun = [size for number, size in enumerate(sizes) if samples >= number * part]
    assert batch_size(samples, ramp) == begun[-1]


@given(ramps(), st.integers(0, 250), st.integers(0, 300))
def test_the_length_of_a_run_is_what_stepping_through_it_counts(ramp: TrainingConfig, samples: int, wanted: int) -> None:
    taken = list(takewhile(lambda batch: batch[0] < wanted, batches_from(samples, ramp)))
    assert steps_between(samples, wanted, ramp) == (len(taken), sum(taken[-1]) if taken else samples)


@pytest.mark.parametrize("step", [0, 1, 4, 5, 7])
def test_tokens_end_at_or_beyond_and_epochs_before_their_end_from_any_step(step: int) -> None:
    samples = sum(SIZES[:step])
    datasets: Any = SimpleNamespace(train=SimpleNamespace(samples_per_epoch=50))

    def steps(**length: Any) -> int:
        config = tiny_config(training={"steps": None, "global_batch_size": 16, "batch_ramp": RAMP, **length})
        return total_steps(config, datasets, step, samples)

    assert steps(tokens=48 * 16) == steps(tokens=47 * 16 + 1) == 8  # 56 samples, of which 7 steps have 44
    assert steps(tokens=44 * 16) == 7
    assert (steps(epochs=1), steps(epochs=1.12)) == (7, 8)


def test_an_epoch_below_the_first_step_is_refused() -> None:
    config = tiny_config(training={"steps": None, "epochs": 1, "batch_ramp": RAMP})
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
def test_ramps_that_cannot_be_are_refused(ramp: Tree, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_config(training={"batch_ramp": ramp})
    assert message in str(error.value)


def test_every_size_is_shared_out_evenly_or_the_world_is_refused() -> None:
    assert data_parallel_size(tiny_config(), 8) == 8
    ramped = tiny_config(training={"batch_ramp": RAMP})
    assert data_parallel_size(ramped, 2) == 2  # 2, 4, 6 and 8 micro-batches
    with pytest.raises(ConfigError, match=r"for every size of training.batch_ramp\) to share; world sizes that fit: 1, 2$"):
        data_parallel_size(ramped, 4)


def test_null_is_no_ramp() -> None:
    assert tiny_config(training={"batch_ramp": None}) == tiny_config()


@pytest.mark.parametrize("data_size", [1, 2])
def test_batches_of_changing_size_read_every_sample_once_in_order(data_size: int) -> None:
    class Counting:
        def sample(self, index: int) -> Any:
            return SimpleNamespace(tokens=np.array([index, index]), starts=np.zeros(2, bool))

    dataset: Any = Counting()
    ranks = [GlobalBatches(dataset, 16, 2, rank, data_size, 1000) for rank in range(data_size)]
    read: list[int] = []
    for first, size in islice(batches_from(0, training(4, 4, 48, 16)), 10):
        rows = [row for rank in ranks for row in rank.at(first, size)]
        assert [row.index for row in rows] == list(range(size // 2))
        read += [int(tokens[0]) for row in rows for tokens in row.tokens]
    assert read == list(range(sum(SIZES)))


def config_of(folder: Path, data: str, steps: int, parallel: Tree, stage: int, dropout: float) -> Config:
    return tiny_config(
        model={"embd_pdrop": dropout, "resid_pdrop": dropout},
        data={"train": data},
        training={"steps": steps, "batch_ramp": RAMP},
        lr_schedule={"warmup_steps": 3, "decay_steps": 20},
        checkpoint={"dir": str(folder / "checkpoints")},
        logging={"interval": 1, "metrics_file": str(folder / "metrics.jsonl")},
        parallel=parallel,
        zero={"stage": stage},
    )


@pytest.mark.parametrize("world, parallel, stage", [(2, {}, 2), (4, {"pipeline": 2}, 1), (2, {"tensor": 2}, 0)])
def test_losses_do_not_depend_on_the_layout(world: int, parallel: Tree, stage: int, ranks: Pool, tmp_path: Path) -> None:
    data, dropout = corpus(tmp_path), 0.1 if "tensor" not in parallel else 0.0
    alone = ranks.run(1, run_trainer, config_of(tmp_path / "alone", data, 9, {}, 1, dropout))
    results = ranks.run(world, run_trainer, config_of(tmp_path / "split", data, 9, parallel, stage, dropout))
    assert [record["batch_size"] for record in results[0]["records"]] == SIZES[:9]
    assert [record["tokens"] for record in results[0]["records"]] == [16 * sum(SIZES[: step + 1]) for step in range(9)]
    assert results[0]["losses"] == pytest.approx(alone[0]["losses"], rel=1e-5)
    weights, expected = whole_weights(results), whole_weights(alone)
    for name, values in expected.items():
        assert float((weights[name] - values).abs().max()) < 5e-6, name


def test_a_ramp_stopped_in_its_middle_goes_on_bit_for_bit(ranks: Pool, tmp_path: Path) -> None:
    data = corpus(tmp_path)
    straight = ranks.run(2, run_trainer, config_of(tmp_path / "a", data, 9, {}, 1, 0.1))
    ranks.run(2, run_trainer, config_of(tmp_path / "b", data, 5, {}, 1, 0.1))
    halves = ranks.run(2, run_trainer, config_of(tmp_path / "b", data, 9, {}, 1, 0.1))
    assert halves[0]["losses"] == straight[0]["losses"]
    for result, other in zip(halves, straight, strict=True):
        for (name, *_, values), (_, *_, wanted) in zip(result["weights"], other["weights"], strict=True):
            assert np.array_equal(values, wanted), name
