"""Steps that go wrong: stop, skip and rollback, decided alike on all ranks, each with the fault made to happen."""

import contextlib
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from checkpoint.test_resume import config_of
from support.pool import Pool
from support.runs import Losses, Tree, corpus, local_weights, open_trainer
from training.test_precision import allow_fp16

from megagpt.config import Config
from megagpt.config.schema import ResilienceConfig
from megagpt.errors import TrainingError
from megagpt.resilience.health import FINE, Health, Verdict
from megagpt.training.trainer import Batch, Trainer

BAD = 24
"""First sample of the batch that does it: step 4 of batches of 8."""
STEPS = 8

# How a fault is made: what becomes of the output of the last chunk, the sum of the token losses.
Fault = Callable[[torch.Tensor], torch.Tensor]


def loss_is_nan(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def loss_is_infinite(loss: torch.Tensor) -> torch.Tensor:
    return loss + float("inf")


def loss_is_a_spike(loss: torch.Tensor) -> torch.Tensor:
    return loss * 20


def gradient_is_infinite(loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss


def run_with(config: Config, fault: Fault, bad: set[int], passed_over: list[tuple[int, int]] | None = None) -> Tree:
    """Train with the fault in the batches that begin at the samples `bad`, on the last data rank alone."""
    if config.training.precision == "fp16":
        allow_fp16()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        trainer = open_trainer(config)
        trainer.passed_over = passed_over or trainer.passed_over
        trainer.logger = losses = Losses()
        at, weights, advance = trainer.topology.at, {}, trainer.advance
        now: list[int] = []

        def step(batch: Batch) -> Verdict:
            now[:] = [batch.first]
            verdict = advance(batch)
            weights[trainer.step] = held(trainer)
            return verdict

        def after_forward(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            wrong = now[0] in bad and at.data == trainer.topology.layout.data - 1 and module.is_last and module.training
            return fault(out) if wrong else out

        for chunk in trainer.engine.chunks.values():
            chunk.register_forward_hook(after_forward)
        error = ""
        with mock.patch.object(trainer, "advance", step):
            try:
                trainer.train()
            except TrainingError as stopped:
                error = str(stopped)
    result = {
        "step": trainer.step,
        "samples": trainer.samples,
        "losses": losses.values,
        "error": error,
        "said": said.getvalue(),
        "by_step": weights,
        "weights": local_weights(trainer.engine) if not error else [],
    }
    trainer.close()
    return result


def held(trainer: Trainer) -> list[np.ndarray]:
    """This rank's weights; under ZeRO-3 its parts of them."""
    return [getattr(p, "ds_tensor", p).detach().float().numpy().copy() for p in trainer.engine.parameters]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def config_with(tmp_path: Path, **sections: Tree) -> Config:
    parallel, stage = sections.pop("parallel", {"pipeline": 2}), sections.pop("zero", {"stage": 1})["stage"]
    checkpoint = {"checkpoint": {"dir": str(tmp_path / "checkpoints"), "interval": 2}}
    return config_of(tmp_path, corpus(tmp_path), parallel, stage, STEPS, **{**checkpoint, **sections})


def alike(results: list[Tree]) -> Tree:
    """The first rank's result, if all ranks made the same steps, losses and errors."""
    for result in results[1:]:
        assert (result["step"], result["samples"], result["error"]) == tuple(
            results[0][k] for k in ("step", "samples", "error")
        )
    return results[0]


@pytest.mark.parametrize("fault", [loss_is_nan, loss_is_infinite, gradient_is_infinite])
def test_a_run_stops_and_leaves_its_last_checkpoint(fault: Fault, ranks: Pool, tmp_path: Path) -> None:
    results = ranks.run(4, run_with, config_with(tmp_path), fault, {BAD})
    result = alike(results)
    assert result["step"] == 4
    wrong = "the gradient is not finite" if fault is gradient_is_infinite else "the loss is "
    assert result["error"].startswith(f"step 4: {wrong}")
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002\n"


@pytest.mark.parametrize(
    ("fault", "precision"), [(loss_is_nan, "fp32"), (gradient_is_infinite, "fp32"), (gradient_is_infinite, "bf16")]
)
def test_a_skipped_step_changes_no_weight_on_any_rank(fault: Fault, precision: str, ranks: Pool, tmp_path: Path) -> None:
    training = {"steps": STEPS, "micro_batch_size": 2, "global_batch_size": 8, "precision": precision}
    config = config_with(tmp_path, training=training, resilience={"on_nonfinite": "skip"})
    results = ranks.run(4, run_with, config, fault, {BAD})
    assert alike(results)["step"] == STEPS
    for result in results:
        assert same(result["by_step"][4], result["by_step"][3])
        assert not same(result["by_step"][5], result["by_step"][4])
    assert "step 4: the " in results[0]["said"] and "its update is dropped" in results[0]["said"]
    assert [math.isfinite(loss) for loss in results[0]["losses"]].count(False) == (fault is loss_is_nan)


@pytest.mark.parametrize(("parallel", "stage"), [({"pipeline": 2}, 2), ({}, 3), ({"tensor": 2}, 0)])
def test_a_spike_is_refused_before_it_reaches_the_weights(parallel: Tree, stage: int, ranks: Pool, tmp_path: Path) -> None:
    config = config_with(
        tmp_path,
        parallel=parallel,
        zero={"stage": stage},
        resilience={"on_spike": "skip", "spike_window": 2, "spike_deviations": 30.0},
    )
    results = ranks.run(4, run_with, config, loss_is_a_spike, {BAD})
    assert alike(results)["step"] == STEPS
    for result in results:
        assert same(result["by_step"][4], result["by_step"][3])
        assert not same(result["by_step"][5], result["by_step"][4])
    assert "is a spike: above" in results[0]["said"]
    if stage == 3:  # slow; the other stages show what would have been
        return
    ignored = config_with(tmp_path / "other", parallel=parallel, zero={"stage": stage})
    without = ranks.run(4, run_with, ignored, loss_is_a_spike, {BAD})
    assert not same(without[0]["by_step"][4], without[0]["by_step"][3])  # it would have


@pytest.mark.parametrize("fault", [loss_is_nan, loss_is_a_spike, gradient_is_infinite])
def test_a_rollback_ends_as_if_the_data_had_never_been_there(fault: Fault, ranks: Pool, tmp_path: Path) -> None:
    """Bit for bit a run that passes over the batch from the beginning."""
    resilience = {"on_nonfinite": "rollback", "on_spike": "rollback", "spike_window": 2, "spike_deviations": 30.0}
    config = config_with(tmp_path, resilience=resilience)
    results = ranks.run(4, run_with, config, fault, {BAD})
    result = alike(results)
    without = ranks.run(4, run_with, config_with(tmp_path / "without"), fault, set(), [(BAD, BAD + 8)])
    assert result["step"] == STEPS and result["samples"] == (STEPS + 1) * 8
    for mine, other in zip(results, without, strict=True):
        for (name, *_, values), (_, *_, expected) in zip(mine["weights"], other["weights"], strict=True):
            assert np.array_equal(values, expected), name
    assert "gone back to step 2; samples 24 to 31 are passed over" in result["said"]


def test_what_is_passed_over_stays_so_after_a_restart(ranks: Pool, tmp_path: Path) -> None:
    config = config_with(tmp_path, resilience={"on_nonfinite": "rollback"})
    training = config.training.model_copy(update={"steps": 2})
    first = config.model_copy(update={"training": training})
    ranks.run(2, run_with, first, loss_is_nan, set())
    ranks.run(2, note_passed_over, first.model_copy(update={"training": training.model_copy(update={"steps": 3})}))
    result = ranks.run(2, run_with, config, loss_is_nan, {BAD})[0]  # whose batch is not read any more
    assert (result["step"], result["samples"], result["error"]) == (STEPS, (STEPS + 1) * 8, "")
    assert "gone back" not in result["said"]


def test_a_rollback_keeps_to_the_runs_own_checkpoints(ranks: Pool, tmp_path: Path) -> None:
    """Not to those of an earlier run in the same folder, of which it went on from the middle."""
    ranks.run(2, run_with, config_with(tmp_path), loss_is_nan, set())  # steps 2 to 8
    middle = {"dir": str(tmp_path / "checkpoints"), "interval": 100, "resume": str(tmp_path / "checkpoints" / "step_00000002")}
    config = config_with(tmp_path, checkpoint=middle, resilience={"on_nonfinite": "rollback"})
    result = alike(ranks.run(2, run_with, config, loss_is_nan, {BAD}))
    assert "gone back to step 2; samples 24 to 31" in result["said"]
    assert (result["step"], result["error"]) == (STEPS, "")


def note_passed_over(config: Config) -> None:
    trainer = open_trainer(config)
    trainer.passed_over = [(BAD, BAD + 8)]
    trainer.train()
    trainer.close()


def test_what_keeps_going_wrong_ends_the_run(ranks: Pool, tmp_path: Path) -> None:
    everything = set(range(16, 200, 8))
    skips = config_with(tmp_path / "a", resilience={"on_nonfinite": "skip", "most_skipped": 3})
    result = alike(ranks.run(2, run_with, skips, loss_is_nan, everything))
    assert "4 steps in a row had no update; resilience.most_skipped is 3" in result["error"]
    assert result["step"] == 6
    back = config_with(tmp_path / "b", resilience={"on_nonfinite": "rollback", "most_rollbacks": 2})
    result = alike(ranks.run(2, run_with, back, loss_is_nan, everything))
    assert "after 2 rollbacks; resilience.most_rollbacks is 2" in result["error"]


def test_without_a_checkpoint_a_rollback_stops(ranks: Pool, tmp_path: Path) -> None:
    config = config_with(tmp_path, resilience={"on_nonfinite": "rollback"})
    result = alike(ranks.run(2, run_with, config, loss_is_nan, {8}))
    assert "step 2: the loss is nan, and there is no checkpoint yet to go back to" in result["error"]


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_an_overflow_of_fp16_follows_its_own_rule(action: str, ranks: Pool, tmp_path: Path) -> None:
    config = config_with(
        tmp_path,
        training={"precision": "fp16", "steps": 5, "micro_batch_size": 2, "global_batch_size": 4},
        model={"n_layer": 2},
        resilience={"on_overflow": action},
        deepspeed={"fp16": {"initial_scale_power": 8}},
    )
    results = ranks.run(2, run_with, config, gradient_is_infinite, {8})
    result = alike(results)
    if action == "stop":
        assert result["error"] == "step 3: the gradient overflowed in fp16"
        return
    assert result["step"] == 5
    assert all(same(r["by_step"][3], r["by_step"][2]) for r in results)


def of_losses(health: Health, losses: list[float]) -> list[str]:
    return [health.settle(loss, health.of_loss(loss)).action for loss in losses]


def test_a_spike_is_measured_against_the_last_steps_alone() -> None:
    config = ResilienceConfig(on_spike="skip", spike_window=4, spike_deviations=3.0)
    assert of_losses(Health(config), [9, 1, 1, 1]) == ["none"] * 4  # too few to compare with
    health = Health(config)
    of_losses(health, [2.0, 2.2, 2.0, 2.2])  # mean 2.1, deviation 0.1
    assert health.of_loss(2.39) is FINE
    assert health.of_loss(2.41).action == "skip"
    assert of_losses(health, [2.41, 2.41]) == ["skip", "skip"]  # a spike is no part of what comes after
    steady = Health(config)
    of_losses(steady, [2.0] * 4)  # no deviation at all: a hundredth of the mean
    assert (steady.of_loss(2.059) is FINE, steady.of_loss(2.061).action) == (True, "skip")


def test_a_restart_decides_as_the_run_that_went_on() -> None:
    config = ResilienceConfig(on_spike="stop", on_nonfinite="skip", spike_window=3, most_skipped=2)
    before = Health(config)
    of_losses(before, [2.0, 2.1, 2.2, float("nan")])
    after = Health(config)
    after.load(*before.memory)
    for loss in (2.3, 9.0, float("nan"), float("nan")):
        assert before.settle(loss, before.of_loss(loss)) == after.settle(loss, after.of_loss(loss))
