"""Responses to bad steps: stop, skip and rollback, decided equally on all ranks. Each fault really happens in a run."""

import contextlib
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import run_config
from support.exhaustive import more
from support.pool import Pool
from support.precision import allow_fp16
from support.records import RecordList
from support.runs import Tree, corpus, create_topology, local_weights, open_trainer

from megagpt.config import Config
from megagpt.config.schema import ResilienceConfig
from megagpt.data.blend import build_datasets
from megagpt.engine import deepspeed_internals
from megagpt.errors import TrainingError
from megagpt.resilience.health import OK, Health, Verdict
from megagpt.training.micro_batches import HostBatch
from megagpt.training.trainer import StepOutcome, Trainer

BAD = 24
"""First sample of the batch with the fault: step 4 of batches of 8."""
STEPS = 8

Fault = Callable[[torch.Tensor], torch.Tensor]
"""Changes the output of the last chunk, which is the sum of the token losses."""
WeightList = list[np.ndarray]


def loss_is_nan(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def loss_is_infinite(loss: torch.Tensor) -> torch.Tensor:
    return loss + float("inf")


def loss_is_a_spike(loss: torch.Tensor) -> torch.Tensor:
    return loss * 20


def gradient_is_infinite(loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss


class FaultyTrainer(Trainer):
    """Applies a fault to the batches that start at the samples `bad`, on the last data-parallel rank only."""

    def __init__(self, config: Config, fault: Fault, bad: set[int]) -> None:
        datasets = build_datasets(config.data, config.model.n_positions)
        super().__init__(config, create_topology(config), datasets, torch.device("cpu"))
        self.first_sample = -1
        self.weights_after: dict[int, WeightList] = {}
        """Step -> the weights that this rank stores."""
        on_last_rank = self.topology.dp_cp_rank == self.topology.layout.dp_cp - 1

        def after_forward(chunk: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            has_fault = on_last_rank and self.first_sample in bad and chunk.is_last and chunk.training
            return fault(out) if has_fault else out

        for chunk in self.engine.chunks.values():
            chunk.register_forward_hook(after_forward)

    def train_step(self, batch: HostBatch, learning_rate: float, seconds_waited: float = 0.0) -> StepOutcome:
        self.first_sample = batch.first_sample
        outcome = super().train_step(batch, learning_rate, seconds_waited)
        parameters = self.engine.parameters
        self.weights_after[self.step] = [deepspeed_internals.local_weights(p).float().numpy().copy() for p in parameters]
        return outcome


def run_with(config: Config, fault: Fault, bad: set[int], skipped_ranges: list[tuple[int, int]] | None = None) -> Tree:
    """Train with the fault, on the ranks of the pool; return what happened."""
    if config.training.precision == "fp16":
        allow_fp16()
    stderr, error, log = io.StringIO(), "", RecordList()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        trainer = FaultyTrainer(config, fault, bad)
        trainer.skipped_ranges = skipped_ranges or trainer.skipped_ranges
        trainer.logger = log
        try:
            trainer.train()
        except TrainingError as stop:
            error = str(stop)
    result = {
        "step": trainer.step,
        "consumed_samples": trainer.consumed_samples,
        "records": log.records,
        "error": error,
        "stderr": stderr.getvalue(),
        "weights_after": trainer.weights_after,
        "weights": local_weights(trainer.engine) if not error else [],
    }
    trainer.close()
    return result


def same(one: WeightList, other: WeightList) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def fault_config(tmp_path: Path, **sections: Tree) -> Config:
    """Return the config of a run of `STEPS` steps that saves every second step, with ZeRO-1 and two stages by default."""
    parallel, stage = sections.pop("parallel", {"pipeline": 2}), sections.pop("zero", {"stage": 1})["stage"]
    checkpoint = {"checkpoint": {"dir": str(tmp_path / "checkpoints"), "interval": 2}}
    return run_config(tmp_path, corpus(tmp_path), parallel, stage, STEPS, **{**checkpoint, **sections})


def agreed(results: list[Tree]) -> Tree:
    """Return the first rank's result. All ranks must have ended at the same step, sample and error."""
    keys = ("step", "consumed_samples", "error")
    for result in results[1:]:
        assert [result[key] for key in keys] == [results[0][key] for key in keys]
    return results[0]


@pytest.mark.parametrize("fault", [loss_is_nan, loss_is_infinite, gradient_is_infinite])
def test_a_run_stops_and_its_last_checkpoint_stays(fault: Fault, ranks: Pool, tmp_path: Path) -> None:
    results = ranks.run(4, run_with, fault_config(tmp_path), fault, {BAD})
    result = agreed(results)
    assert result["step"] == 4
    reason = "the gradient is not finite" if fault is gradient_is_infinite else "the loss is "
    assert result["error"].startswith(f"step 4: {reason}")
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002\n"


@pytest.mark.parametrize(
    ("fault", "precision"), [(loss_is_nan, "fp32"), (gradient_is_infinite, "fp32"), (gradient_is_infinite, "bf16")]
)
def test_a_skipped_step_changes_no_weight_on_any_rank(fault: Fault, precision: str, ranks: Pool, tmp_path: Path) -> None:
    training = {"steps": STEPS, "micro_batch_size": 2, "global_batch_size": 8, "precision": precision}
    config = fault_config(tmp_path, training=training, resilience={"on_nonfinite": "skip"})
    results = ranks.run(4, run_with, config, fault, {BAD})
    assert agreed(results)["step"] == STEPS
    for result in results:
        assert same(result["weights_after"][4], result["weights_after"][3])
        assert not same(result["weights_after"][5], result["weights_after"][4])
    assert "step 4: the " in results[0]["stderr"] and "its update is skipped" in results[0]["stderr"]
    losses = [record["loss"] for record in results[0]["records"]]
    assert [math.isfinite(loss) for loss in losses].count(False) == (fault is loss_is_nan)


@pytest.mark.parametrize(("parallel", "stage"), [({"pipeline": 2}, 2), ({}, 3), *more(({"tensor": 2}, 0))])
def test_a_spike_is_skipped_before_it_reaches_the_weights(parallel: Tree, stage: int, ranks: Pool, tmp_path: Path) -> None:
    config = fault_config(
        tmp_path,
        parallel=parallel,
        zero={"stage": stage},
        resilience={"on_spike": "skip", "spike_window": 2, "spike_num_std": 30.0},
    )
    results = ranks.run(4, run_with, config, loss_is_a_spike, {BAD})
    assert agreed(results)["step"] == STEPS
    for result in results:
        assert same(result["weights_after"][4], result["weights_after"][3])
        assert not same(result["weights_after"][5], result["weights_after"][4])
    assert "is a spike: above" in results[0]["stderr"]
    if stage == 3:  # slow, and the other stages show what follows
        return
    unprotected = fault_config(tmp_path / "other", parallel=parallel, zero={"stage": stage})
    without = ranks.run(4, run_with, unprotected, loss_is_a_spike, {BAD})
    assert not same(without[0]["weights_after"][4], without[0]["weights_after"][3])  # the spike would reach them


@pytest.mark.parametrize("fault", [loss_is_a_spike, gradient_is_infinite, *more(loss_is_nan)])
def test_a_run_with_a_rollback_equals_a_run_that_never_saw_the_batch(fault: Fault, ranks: Pool, tmp_path: Path) -> None:
    """Bit for bit the weights of a run that skips the batch from the start."""
    resilience = {"on_nonfinite": "rollback", "on_spike": "rollback", "spike_window": 2, "spike_num_std": 30.0}
    config = fault_config(tmp_path, resilience=resilience)
    results = ranks.run(4, run_with, config, fault, {BAD})
    result = agreed(results)
    without = ranks.run(4, run_with, fault_config(tmp_path / "without"), fault, set(), [(BAD, BAD + 8)])
    assert result["step"] == STEPS and result["consumed_samples"] == (STEPS + 1) * 8
    for rolled_back, other in zip(results, without, strict=True):
        for (name, *_, values), (_, *_, expected) in zip(rolled_back["weights"], other["weights"], strict=True):
            assert np.array_equal(values, expected), name
    assert "rolled back to step 2; skipping samples 24-31" in result["stderr"]


def test_logged_tokens_do_not_count_samples_that_a_rollback_skips(ranks: Pool, tmp_path: Path) -> None:
    """Each step trains on 8 sequences of 16 tokens."""
    config = fault_config(tmp_path, resilience={"on_nonfinite": "rollback"})
    records = ranks.run(2, run_with, config, loss_is_nan, {BAD})[0]["records"]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 3, 4, 5, 6, 7, 8]
    assert all(record["tokens"] == record["step"] * 8 * 16 for record in records)


def test_skipped_samples_stay_skipped_after_a_restart(ranks: Pool, tmp_path: Path) -> None:
    config = fault_config(tmp_path, resilience={"on_nonfinite": "rollback"})
    two_steps = config.training.model_copy(update={"steps": 2})
    ranks.run(2, run_with, config.model_copy(update={"training": two_steps}), loss_is_nan, set())
    three_steps = config.training.model_copy(update={"steps": 3})
    ranks.run(2, train_with_skipped_range, config.model_copy(update={"training": three_steps}))
    result = ranks.run(2, run_with, config, loss_is_nan, {BAD})[0]  # the bad batch is not read any more
    assert (result["step"], result["consumed_samples"], result["error"]) == (STEPS, (STEPS + 1) * 8, "")
    assert "rolled back" not in result["stderr"]
    assert result["records"][-1]["tokens"] == STEPS * 8 * 16


def train_with_skipped_range(config: Config) -> None:
    trainer = open_trainer(config)
    trainer.skipped_ranges = [(BAD, BAD + 8)]
    trainer.train()
    trainer.close()


def test_a_rollback_uses_only_checkpoints_of_this_run(ranks: Pool, tmp_path: Path) -> None:
    """The folder also has later checkpoints, of an earlier run that this run does not continue."""
    ranks.run(2, run_with, fault_config(tmp_path), loss_is_nan, set())  # saves steps 2 to 8
    middle = {"dir": str(tmp_path / "checkpoints"), "interval": 100, "resume": str(tmp_path / "checkpoints" / "step_00000002")}
    config = fault_config(tmp_path, checkpoint=middle, resilience={"on_nonfinite": "rollback"})
    result = agreed(ranks.run(2, run_with, config, loss_is_nan, {BAD}))
    assert "rolled back to step 2; skipping samples 24-31" in result["stderr"]
    assert (result["step"], result["error"]) == (STEPS, "")


def test_too_many_bad_steps_end_the_run(ranks: Pool, tmp_path: Path) -> None:
    all_samples = set(range(16, 200, 8))
    skips = fault_config(tmp_path / "a", resilience={"on_nonfinite": "skip", "max_skipped": 3})
    result = agreed(ranks.run(2, run_with, skips, loss_is_nan, all_samples))
    assert "4 steps in a row had no update; resilience.max_skipped is 3" in result["error"]
    assert result["step"] == 6
    rollbacks = fault_config(tmp_path / "b", resilience={"on_nonfinite": "rollback", "max_rollbacks": 2})
    result = agreed(ranks.run(2, run_with, rollbacks, loss_is_nan, all_samples))
    assert "after 2 rollbacks; resilience.max_rollbacks is 2" in result["error"]


def test_a_rollback_without_a_checkpoint_stops_the_run(ranks: Pool, tmp_path: Path) -> None:
    config = fault_config(tmp_path, resilience={"on_nonfinite": "rollback"})
    result = agreed(ranks.run(2, run_with, config, loss_is_nan, {8}))
    assert "step 2: the loss is nan, and there is no checkpoint yet to roll back to" in result["error"]


@pytest.mark.parametrize("response", ["skip", "stop"])
def test_an_overflow_in_fp16_has_its_own_response(response: str, ranks: Pool, tmp_path: Path) -> None:
    config = fault_config(
        tmp_path,
        training={"precision": "fp16", "steps": 5, "micro_batch_size": 2, "global_batch_size": 4},
        model={"n_layer": 2},
        resilience={"on_overflow": response},
        deepspeed={"fp16": {"initial_scale_power": 8}},
    )
    results = ranks.run(2, run_with, config, gradient_is_infinite, {8})
    result = agreed(results)
    if response == "stop":
        assert result["error"] == "step 3: the gradient overflowed in fp16"
        return
    assert result["step"] == 5
    assert all(same(r["weights_after"][3], r["weights_after"][2]) for r in results)


def actions(health: Health, losses: list[float]) -> list[str]:
    return [judge(health, loss).action for loss in losses]


def judge(health: Health, loss: float) -> Verdict:
    return health.record(loss, health.check_loss(loss))


def test_a_spike_is_measured_against_the_window_of_recent_losses() -> None:
    config = ResilienceConfig(on_spike="skip", spike_window=4, spike_num_std=3.0)
    assert actions(Health(config), [9, 1, 1, 1]) == ["none"] * 4  # the window is not full yet
    health = Health(config)
    actions(health, [2.0, 2.2, 2.0, 2.2])  # mean 2.1, standard deviation 0.1
    assert health.check_loss(2.39) is OK
    assert health.check_loss(2.41).action == "skip"
    assert actions(health, [2.41, 2.41]) == ["skip", "skip"]  # a spike does not enter the window
    steady = Health(config)
    actions(steady, [2.0] * 4)  # standard deviation 0, which counts as 1% of the mean
    assert (steady.check_loss(2.059) is OK, steady.check_loss(2.061).action) == (True, "skip")


def test_a_gradient_is_judged_by_the_precision() -> None:
    health = Health(ResilienceConfig(on_nonfinite="rollback", on_overflow="skip"))
    assert health.check_gradient(skipped=False, fp16=True) is OK
    assert health.check_gradient(skipped=True, fp16=True) == Verdict("skip", "the gradient overflowed in fp16")
    assert health.check_gradient(skipped=True, fp16=False) == Verdict("rollback", "the gradient is not finite")


def test_a_step_with_an_update_resets_the_number_of_consecutive_skips() -> None:
    health = Health(ResilienceConfig(on_nonfinite="skip", max_skipped=2))
    nan = float("nan")
    assert actions(health, [nan, nan, 2.0, nan, nan, nan]) == ["skip", "skip", "none", "skip", "skip", "stop"]
    assert health.consecutive_skips == 3


def test_a_resumed_run_decides_like_an_unbroken_run() -> None:
    config = ResilienceConfig(on_spike="stop", on_nonfinite="skip", spike_window=3, max_skipped=2)
    unbroken = Health(config)
    actions(unbroken, [2.0, 2.1, 2.2, float("nan")])
    resumed = Health(config)
    resumed.restore(unbroken.recent_losses, unbroken.consecutive_skips)
    for loss in (2.3, 9.0, float("nan"), float("nan")):
        assert judge(unbroken, loss) == judge(resumed, loss)
