"""The training loop: the batches of a run, one step, the records, and the length of a run."""

import json
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pool import Pool
from support.reads import HostReads
from support.records import RecordList
from support.runs import Tree, corpus, create_topology, local_weights, open_trainer, tiny_config

from megagpt.checkpoint.run_lock import LOCK
from megagpt.config import Config
from megagpt.data.blend import build_datasets
from megagpt.data.indexed import IndexedWriter
from megagpt.distributed.phase import PhaseTracker
from megagpt.errors import ConfigError, TrainingError
from megagpt.resilience.health import OK
from megagpt.training.trainer import Trainer

SEQ = 16
"""Tokens of a sequence."""
FLOPS_PER_TOKEN = 6 * (4 * 12 * 32**2 + 64 * 32) + 12 * 4 * 32 * SEQ
"""Of the tiny model: 4 layers of width 32 and 64 vocabulary entries; see megagpt/planner/flops.py."""
RECORD_KEYS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "step_seconds",
    "data_wait_fraction",
    "tflops_per_device",
    "peak_memory_gib",
}
STRAGGLER_KEYS = {"compute_seconds_min", "compute_seconds_median", "compute_seconds_max", "slowest_rank"}


def train_config(folder: Path, **sections: Tree) -> Config:
    """Return the config of a run of 6 steps of 8 sequences, with a record for each step."""
    tree: Tree = {
        "data": {"train": corpus(folder)},
        "training": {"steps": 6, "micro_batch_size": 2, "global_batch_size": 8},
        "logging": {"interval": 1},
    }
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return tiny_config(**tree)


def read_batches(config: Config, step: int, consumed: int, skipped: list[tuple[int, int]]) -> list[tuple[int, int, Any]]:
    """Return first sample, size and tokens of all batches of a run that is at `step`."""
    trainer = open_trainer(config)
    trainer.step = step
    trainer.consumed_samples = consumed
    trainer.skipped_ranges = skipped
    with trainer.batches() as batches:
        result = [(batch.first_sample, batch.size, batch.tokens.numpy()) for batch in batches]
    trainer.close()
    return result


def test_the_batches_of_a_run_follow_each_other_and_end_with_its_last_step(ranks: Pool, tmp_path: Path) -> None:
    config = train_config(tmp_path)
    results = ranks.run(2, read_batches, config, 0, 0, [])
    dataset = build_datasets(config.data, SEQ).train
    for rank, batches in enumerate(results):
        assert [(first, size) for first, size, _ in batches] == [(8 * step, 8) for step in range(6)]
        for first, _, tokens in batches:
            expected = [dataset.sample(first + 4 * rank + row).tokens[:-1].tolist() for row in range(4)]
            assert tokens.tolist() == expected


def test_a_resumed_run_reads_the_remaining_batches_without_skipped_ranges(ranks: Pool, tmp_path: Path) -> None:
    (batches,) = ranks.run(1, read_batches, train_config(tmp_path), 3, 24, [(8, 16), (32, 40)])
    assert [first for first, *_ in batches] == [24, 40, 48]


def stop_reading(config: Config) -> tuple[list[int], int, list[str]]:
    """Read two batches; return their first samples, this run's progress, and the threads that are left."""
    trainer = open_trainer(config)
    with trainer.batches() as batches:
        firsts = [batch.first_sample for batch in islice(batches, 2)]
    names = [thread.name for thread in threading.enumerate()]
    consumed = trainer.consumed_samples
    trainer.close()
    return firsts, consumed, names


def test_batches_that_are_only_prefetched_do_not_count_and_their_thread_ends(ranks: Pool, tmp_path: Path) -> None:
    firsts, consumed, threads = ranks.run(1, stop_reading, train_config(tmp_path))[0]
    assert (firsts, consumed) == ([0, 8], 0)
    assert "prefetch" not in threads


def train_two_steps(config: Config) -> list[Tree]:
    """Train two steps; return what this rank knows after each of them."""
    trainer = open_trainer(config)
    facts = []
    with trainer.batches() as batches:
        for batch, rate in zip(batches, (1e-2, 3e-3), strict=False):
            outcome = trainer.train_step(batch, rate)
            facts.append(
                {
                    "outcome": tuple(outcome),
                    "rate": trainer.engine.deepspeed.optimizer.param_groups[0]["lr"],
                    "progress": (trainer.step, trainer.consumed_samples),
                    "window": (trainer.phase.step, trainer.health.recent_losses),
                    "verdict_is_ok": outcome.verdict == OK,
                }
            )
    trainer.close()
    return facts


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (4, {"pipeline": 2}), (4, {"tensor": 2, "context": 2})])
def test_a_step_has_the_same_outcome_on_all_ranks(world: int, parallel: Tree, ranks: Pool, tmp_path: Path) -> None:
    results = ranks.run(world, train_two_steps, train_config(tmp_path, parallel=parallel))
    assert all(result == results[0] for result in results)
    for number, (fact, rate) in enumerate(zip(results[0], (1e-2, 3e-3), strict=True), start=1):
        result, learning_rate, n_tokens, loss, _, stop_requested = fact["outcome"]
        assert learning_rate == fact["rate"] == rate
        assert n_tokens == 8 * SEQ
        assert fact["progress"] == (number, 8 * number)
        assert fact["window"][0] == number and fact["window"][1][-1] == loss
        assert fact["verdict_is_ok"] and not stop_requested and not result.skipped
        assert result.grad_norm > 0


class ReadsByPhase(PhaseTracker):
    """Attributes the host's reads of tensors to the phases of a step."""

    def __init__(self, reads: HostReads) -> None:
        self.reads = reads
        self.by_phase: dict[str, int] = {}
        super().__init__()

    def enter(self, phase: str) -> None:
        if hasattr(self, "name"):
            previous = self.name.rpartition(": ")[2]
            self.by_phase[previous] = self.by_phase.get(previous, 0) + self.reads.count
        self.reads.count = 0
        super().enter(phase)


def count_reads(config: Config) -> dict[str, int]:
    """Return the host's reads in the third step, by phase."""
    reads = HostReads()
    phase = ReadsByPhase(reads)
    datasets = build_datasets(config.data, SEQ)
    trainer = Trainer(config, create_topology(config), datasets, torch.device("cpu"), phase)
    with trainer.batches() as batches:
        for number, batch in enumerate(islice(batches, 3)):
            phase.by_phase.clear()
            if number < 2:  # DeepSpeed creates the optimizer states in the first step
                trainer.train_step(batch, 1e-3)
            else:
                phase.enter("start")
                with reads:
                    trainer.train_step(batch, 1e-3)
                phase.enter("end")
    trainer.close()
    return phase.by_phase


@pytest.mark.parametrize(
    ("world", "parallel", "stage"),
    [(1, {}, 0), (1, {}, 1), (1, {}, 2), (2, {}, 3), (2, {"pipeline": 2}, 1), (2, {"tensor": 2}, 1), (2, {"context": 2}, 2)],
)
def test_a_step_reads_one_value_from_the_device_before_the_update(
    world: int, parallel: Tree, stage: int, ranks: Pool, tmp_path: Path
) -> None:
    """On a GPU each read waits for the work so far. The optimizer step of DeepSpeed has reads of its own."""
    config = train_config(tmp_path, parallel=parallel, zero={"stage": stage}, data={"mask_document_ends": True})
    for by_phase in ranks.run(world, count_reads, config):
        in_update = by_phase.pop("optimizer step")
        assert by_phase["reduction of the loss"] == 1
        assert sum(by_phase.values()) == 1, by_phase
        assert in_update <= 4


def run_logged(config: Config) -> list[Tree]:
    """Train to the last step; return the records that this rank logs."""
    trainer = open_trainer(config)
    trainer.logger = log = RecordList()
    trainer.train()
    trainer.close()
    return log.records


@pytest.mark.parametrize(
    ("world", "parallel", "keys"),
    [(1, {}, RECORD_KEYS), (4, {"pipeline": 2}, RECORD_KEYS | STRAGGLER_KEYS)],
)
def test_every_training_record_has_loss_speed_and_memory(
    world: int, parallel: Tree, keys: set[str], ranks: Pool, tmp_path: Path
) -> None:
    records = ranks.run(world, run_logged, train_config(tmp_path, parallel=parallel))[0]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert record.keys() == keys  # no mfu: the peak of a CPU is unknown
        assert record["tokens"] == record["step"] * 8 * SEQ
        assert record["tokens_per_second"] == pytest.approx(8 * SEQ / record["step_seconds"])
        assert record["tokens_per_second_per_device"] == pytest.approx(record["tokens_per_second"] / world)
        tflops = FLOPS_PER_TOKEN * record["tokens_per_second"] / world / 1e12
        assert record["tflops_per_device"] == pytest.approx(tflops)
        assert 0 <= record["data_wait_fraction"] <= 1
        assert 0.01 < record["peak_memory_gib"] < 1000


def test_the_mfu_is_the_share_of_the_peak_of_the_config(ranks: Pool, tmp_path: Path) -> None:
    (first, *_) = ranks.run(1, run_logged, train_config(tmp_path, training={"steps": 1}, logging={"peak_tflops": 0.5}))[0]
    assert first["mfu"] == pytest.approx(first["tflops_per_device"] / 0.5)


def test_a_record_covers_the_steps_since_the_last_one(ranks: Pool, tmp_path: Path) -> None:
    """At the first step, every logging.interval steps, and at the last step."""
    records = ranks.run(1, run_logged, train_config(tmp_path, training={"steps": 7}, logging={"interval": 3}))[0]
    assert [record["step"] for record in records] == [1, 3, 6, 7]
    assert [record["tokens"] for record in records] == [step * 8 * SEQ for step in (1, 3, 6, 7)]
    for record in records:
        assert record["tokens_per_second"] == pytest.approx(8 * SEQ / record["step_seconds"])


def test_the_logged_loss_is_the_mean_over_the_tokens_since_the_last_record(ranks: Pool, tmp_path: Path) -> None:
    """Compared with a run that logs each step. The number of labels differs from step to step."""
    changes: Tree = {"training": {"steps": 7}, "data": {"mask_document_ends": True}}
    every = ranks.run(2, run_logged, train_config(tmp_path, **changes))[0]
    some = ranks.run(2, run_logged, train_config(tmp_path, **changes, logging={"interval": 3}))[0]
    dataset = build_datasets(train_config(tmp_path, **changes).data, SEQ).train
    tokens = [sum(int((~dataset.sample(8 * step + row).starts[1:]).sum()) for row in range(8)) for step in range(7)]
    assert len(set(tokens)) > 1
    losses = [record["loss"] for record in every]
    for record, (first, end) in zip(some, ((0, 1), (1, 3), (3, 6), (6, 7)), strict=True):
        weighted = sum(n * loss for n, loss in zip(tokens[first:end], losses[first:end], strict=True))
        assert record["loss"] == pytest.approx(weighted / sum(tokens[first:end]), rel=1e-9)


def test_an_evaluation_and_a_save_between_two_records_drop_no_step_from_the_mean_loss(ranks: Pool, tmp_path: Path) -> None:
    sections: Tree = {"training": {"steps": 3}, "logging": {"interval": 3}}
    plain = ranks.run(1, run_logged, train_config(tmp_path, **sections))[0]
    busy = train_config(
        tmp_path,
        **sections,
        data={"valid": corpus(tmp_path)},
        evaluation={"interval": 2, "samples": 8},
        checkpoint={"dir": str(tmp_path / "checkpoints"), "interval": 2},
    )
    records = [record for record in ranks.run(1, run_logged, busy)[0] if "loss" in record]
    assert [record["loss"] for record in records] == [record["loss"] for record in plain]


def masked_run(config: Config) -> tuple[int, str, bool]:
    """Train on documents of one token with all labels masked; return the steps, the error, and whether a weight changed."""
    trainer = open_trainer(config)
    before = local_weights(trainer.engine)
    with pytest.raises(TrainingError) as error:
        trainer.train()
    after = local_weights(trainer.engine)
    trainer.close()
    changed = any((one[-1] != other[-1]).any() for one, other in zip(before, after, strict=True))
    return trainer.step, str(error.value), changed


def test_steps_without_any_label_change_nothing_and_end_the_run_after_max_skipped(ranks: Pool, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "ones", np.dtype(np.uint16)) as writer:
        writer.add_documents(np.arange(2000, dtype=np.uint16) % 61, [1] * 2000)
    data = {"train": str(tmp_path / "ones"), "mask_document_ends": True}
    config = train_config(tmp_path, data=data, resilience={"max_skipped": 2})
    ((steps, error, changed),) = ranks.run(1, masked_run, config)
    assert steps == 3 and not changed
    assert error.startswith("step 3: every label of the global batch is masked")


class SlowDataset:
    """A dataset whose samples take 20 ms each."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.samples_per_epoch = dataset.samples_per_epoch

    def sample(self, index: int) -> Any:
        time.sleep(0.02)
        return self._dataset.sample(index)


def run_with_slow_data(config: Config) -> list[Tree]:
    datasets = build_datasets(config.data, SEQ)
    slow: Any = datasets._replace(train=SlowDataset(datasets.train))
    trainer = Trainer(config, create_topology(config), slow, torch.device("cpu"))
    trainer.logger = log = RecordList()
    trainer.train()
    trainer.close()
    return log.records


def test_a_run_that_waits_for_data_reports_it(ranks: Pool, tmp_path: Path) -> None:
    config = train_config(tmp_path, model={"n_layer": 1})
    slow, fast = (ranks.run(1, function, config)[0] for function in (run_with_slow_data, run_logged))
    assert slow[-1]["data_wait_fraction"] > max(0.5, fast[-1]["data_wait_fraction"])


def test_evaluations_come_at_their_interval_and_after_the_last_step(ranks: Pool, tmp_path: Path) -> None:
    prefix = corpus(tmp_path)
    data = {"valid": prefix, "test": prefix}
    config = train_config(tmp_path, data=data, evaluation={"interval": 4, "samples": 8, "test_samples": 8})
    records = ranks.run(2, run_logged, config)[0]
    assert [record["step"] for record in records if "eval_loss" in record] == [4, 6]
    assert [record["step"] for record in records if "test_loss" in record] == [6]
    assert records[-1].keys() == {"step", "test_loss", "test_perplexity"}
    assert records[-1]["test_loss"] == records[-2]["eval_loss"]  # the same data


def test_a_rank_other_than_0_writes_no_metrics_file(ranks: Pool, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    ranks.run(2, train_only, train_config(tmp_path, logging={"interval": 2, "metrics_file": str(path)}))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4, 6]


def train_only(config: Config) -> None:
    trainer = open_trainer(config)
    trainer.train()
    trainer.close()


def test_replicas_are_checked_at_their_interval(ranks: Pool, tmp_path: Path) -> None:
    config = train_config(tmp_path, zero={"stage": 0}, resilience={"replica_check_interval": 4})
    assert ranks.run(2, train_with_different_replicas, config) == [4, 4]


def train_with_different_replicas(config: Config) -> int:
    """Change a weight of the optimizer on rank 1; return the step at which the run stops."""
    trainer = open_trainer(config)
    if trainer.topology.rank == 1:
        next(iter(trainer.engine.zero_state().partitions())).master[0] += 1e-3
    with pytest.raises(TrainingError, match="resilience.replica_check_interval"):
        trainer.train()
    trainer.close()
    return trainer.step


def test_a_run_that_is_complete_trains_no_step(ranks: Pool, tmp_path: Path) -> None:
    checkpoint = {"dir": str(tmp_path / "checkpoints")}
    assert len(ranks.run(1, run_logged, train_config(tmp_path, checkpoint=checkpoint))[0]) == 6
    assert ranks.run(1, run_logged, train_config(tmp_path, checkpoint=checkpoint))[0] == []


def test_a_complete_run_evaluates_its_test_data_once(ranks: Pool, tmp_path: Path) -> None:
    """Again only for other test data or another number of samples."""
    sections: Tree = {"data": {"test": corpus(tmp_path)}, "checkpoint": {"dir": str(tmp_path / "checkpoints")}}

    def test_losses(**more: Tree) -> list[float]:
        records = ranks.run(2, run_logged, train_config(tmp_path, **sections, **more))[0]
        return [record["test_loss"] for record in records if "test_loss" in record]

    first = test_losses()
    assert len(first) == 1
    assert test_losses() == []
    assert test_losses(evaluation={"test_samples": 3}) != first
    assert test_losses(evaluation={"test_samples": 3}) == []


def refused_resume(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        open_trainer(config)
    return str(error.value)


def test_fewer_steps_than_the_checkpoint_has_end_every_rank_with_an_error(ranks: Pool, tmp_path: Path) -> None:
    sections: Tree = {"checkpoint": {"dir": str(tmp_path / "checkpoints")}}
    ranks.run(2, train_only, train_config(tmp_path, **sections))
    errors = ranks.run(2, refused_resume, train_config(tmp_path, **sections, training={"steps": 4}))
    assert [error.split(",")[0] for error in errors] == ["training.steps: 4"] * 2
    assert not (tmp_path / "checkpoints" / LOCK).exists()  # another run may start at once
