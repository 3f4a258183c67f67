"""The state of a run in a checkpoint: names of older versions are accepted, and changes on resume are reported."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from support.pool import Pool, RankError
from support.precision import allow_fp16
from support.runs import Tree, corpus, create_engine, run_trainer, tiny_config
from support.saved import rewrite_manifest

from megagpt.checkpoint.boxes import Box
from megagpt.config import Config
from megagpt.training.train_state import RunProgress, RunState, entries, run_state, state_changes

OLD_NAMES = {"consumed_samples": "samples", "skipped_sample_ranges": "passed_over", "consecutive_skips": "skipped_in_a_row"}
"""Names of megagpt 0.1."""
PROGRESS: Tree = {
    "consumed_samples": 48,
    "skipped_sample_ranges": [(8, 16), (24, 32)],
    "recent_losses": [2.5, 2.25],
    "consecutive_skips": 1,
    "data": {
        "seed": 1234,
        "task": "text",
        "long_examples": "drop",
        "split": None,
        "sequence_length": 16,
        "source_length": None,
        "parts": {"train": [{"prefix": "data/a", "weight": 1.0, "sequences": 60, "tokens": 1800, "fingerprint": "0f"}]},
    },
}
REST: Tree = {"optimizer_step": 4, "optimizer": "adamw", "loss_scaler": {}}


def with_old_names(state: Tree) -> Tree:
    return {OLD_NAMES.get(name, name): value for name, value in state.items()}


def test_the_names_of_older_checkpoints_are_accepted() -> None:
    assert RunProgress.model_validate(with_old_names(PROGRESS)) == RunProgress(**PROGRESS)
    assert RunState.model_validate(with_old_names({**PROGRESS, **REST})) == RunState(**PROGRESS, **REST)


def test_a_state_is_written_with_the_new_names() -> None:
    assert RunState.model_validate(with_old_names({**PROGRESS, **REST})).model_dump() == {**PROGRESS, **REST}


def test_a_checkpoint_from_before_a_feature_has_the_defaults() -> None:
    state = RunState.model_validate({"samples": 48, **REST})
    assert (state.consumed_samples, state.skipped_sample_ranges, state.recent_losses) == (48, [], [])
    assert state.consecutive_skips == 0


@pytest.mark.parametrize("wrong", [{"consumed_samples": "many"}, {"seed": 3}])
def test_an_invalid_or_unknown_value_is_an_error(wrong: Tree) -> None:
    with pytest.raises(ValidationError):
        RunState.model_validate({**PROGRESS, **REST, **wrong})


def collect(config: Config) -> tuple[Tree, list[tuple[str, tuple[int, ...], Box, list[str]]]]:
    """Return the run state and this rank's entries of a new engine."""
    engine = create_engine(config)
    state = run_state(engine, RunProgress(**PROGRESS))
    local = [(entry.name, entry.shape, entry.box, sorted(entry.values)) for entry in entries(engine)]
    for entry in entries(engine):
        assert all(tuple(values.shape) == entry.box.size for values in entry.values.values())
    engine.close()
    return state, local


@pytest.mark.parametrize(
    ("parallel", "stage"), [({}, 0), ({"tensor": 2}, 1), ({"pipeline": 2}, 2), ({}, 3), ({"context": 2, "tensor": 2}, 3)]
)
def test_every_value_is_written_by_exactly_one_rank(parallel: Tree, stage: int, ranks: Pool) -> None:
    results = ranks.run(4, collect, tiny_config(parallel=parallel, zero={"stage": stage}))
    counts: dict[str, np.ndarray] = {}
    for state, local in results:
        assert state == {**PROGRESS, **REST, "optimizer_step": 0}
        for name, shape, box, states in local:
            assert states == ["exp_avg", "exp_avg_sq", "master"]
            region = tuple(slice(start, start + size) for start, size in zip(box.offset, box.size, strict=True))
            counts.setdefault(name, np.zeros(shape, int))[region] += 1
    assert counts
    assert all((count == 1).all() for count in counts.values())
    if stage == 0:
        assert [bool(local) for _, local in results] == [True, False, False, False]


@pytest.fixture(scope="module")
def saved(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run's folder with a checkpoint of step 2, and its data."""
    folder = tmp_path_factory.mktemp("saved")
    data = corpus(folder)
    ranks.run(2, run_trainer, run_of(folder, data, 2))
    return folder, data


def run_of(folder: Path, data: str, steps: int, **sections: Tree) -> Config:
    tree: Tree = {
        "data": {"train": data},
        "training": {"steps": steps, "micro_batch_size": 2, "global_batch_size": 8},
        "checkpoint": {"dir": str(folder / "checkpoints")},
        "logging": {"interval": 1, "metrics_file": str(folder / "metrics.jsonl")},
    }
    return tiny_config(**{**tree, **sections})


def resume(saved: tuple[Path, str], folder: Path, ranks: Pool, change: Any, **sections: Tree) -> list[Tree]:
    """Resume from a copy of the checkpoint whose manifest has been changed."""
    shutil.copytree(saved[0], folder, dirs_exist_ok=True)
    rewrite_manifest(folder / "checkpoints" / "step_00000002", change)
    return ranks.run(2, run_trainer, run_of(folder, saved[1], 4, **sections))


def test_a_checkpoint_of_an_older_version_resumes_bit_for_bit(saved: tuple[Path, str], ranks: Pool, tmp_path: Path) -> None:
    def use_old_names(manifest: Tree) -> None:
        manifest["state"] = with_old_names(manifest["state"]) | {"passed_over": [[24, 32]]}
        resilience = manifest["config"]["resilience"]
        resilience["most_skipped"] = resilience.pop("max_skipped")

    def skip_a_range(manifest: Tree) -> None:
        manifest["state"]["skipped_sample_ranges"] = [[24, 32]]

    older = resume(saved, tmp_path / "older", ranks, use_old_names)
    newer = resume(saved, tmp_path / "newer", ranks, skip_a_range)
    assert older[0]["losses"] == newer[0]["losses"] and len(older[0]["losses"]) == 4
    for one, other in zip(older, newer, strict=True):
        for (name, *_, values), (_, *_, expected) in zip(one["weights"], other["weights"], strict=True):
            assert np.array_equal(values, expected), name
    assert [record["tokens"] for record in older[0]["records"]] == [step * 8 * 16 for step in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda manifest: manifest["state"].update(moon="full"), "moon: extra inputs are not permitted, not 'full'"),
        (
            lambda manifest: manifest["state"].update(consumed_samples=-1),
            "consumed_samples: input should be greater than or equal to 0, not -1",
        ),
        (lambda manifest: manifest["state"].pop("optimizer_step"), "optimizer_step: field required"),
        (lambda manifest: manifest["config"].pop("model"), "KeyError('model')"),
        (lambda manifest: manifest["config"]["training"].pop("precision"), "KeyError('precision')"),
    ],
)
def test_a_state_of_an_unknown_version_is_refused_with_the_reason(
    change: Any, reason: str, saved: tuple[Path, str], ranks: Pool, tmp_path: Path
) -> None:
    with pytest.raises(RankError) as error:
        resume(saved, tmp_path, ranks, change)
    assert "its config or state is of another version of megagpt: " in str(error.value)
    assert reason in str(error.value)


def changes(saved: Tree, now: Tree) -> str:
    """Return all notes for a run saved with some keys of training and optimizer, and resumed with others."""

    def config(keys: Tree) -> Config:
        optimizer = {"type": keys["optimizer"]} if "optimizer" in keys else {}
        return tiny_config(training={k: v for k, v in keys.items() if k != "optimizer"}, optimizer=optimizer)

    return "; ".join(state_changes(config(saved).model_dump(mode="json"), config(now)))


@pytest.mark.parametrize(
    ("saved_keys", "keys", "note"),
    [
        ({}, {}, ""),
        ({"precision": "bf16"}, {"precision": "fp32"}, "training.precision bf16 -> fp32: the optimizer's fp32 weights"),
        ({"precision": "bf16"}, {"precision": "fp32"}, "fp32 weights were saved beside the bf16 ones"),
        ({"precision": "fp32"}, {"precision": "bf16"}, "forwards use the weights rounded to bf16 (8 bits of precision)"),
        (
            {"precision": "fp32"},
            {"precision": "fp16"},
            "rounded to fp16 (11 bits of precision), and the loss scale starts again",
        ),
        ({"precision": "fp16"}, {"precision": "bf16"}, "the loss scale of fp16 is dropped"),
        (
            {"precision": "fp32", "freeze": ["embedding.*"]},
            {"precision": "bf16", "freeze": ["embedding.*"]},
            "frozen weights have no fp32 copy: they are rounded to bf16 permanently",
        ),
        (
            {"precision": "bf16", "freeze": ["embedding.*"]},
            {"precision": "fp32"},
            "frozen weights had no fp32 copy: they stay rounded to bf16",
        ),
        ({"optimizer": "adamw"}, {"optimizer": "sgd"}, "optimizer.type adamw -> sgd: moments that were not saved start at 0"),
    ],
)
def test_what_is_lost_on_resume_is_reported(saved_keys: Tree, keys: Tree, note: str) -> None:
    text = changes(saved_keys, keys)
    assert note in text if note else text == ""


def run_with_fp16(config: Config) -> Tree:
    allow_fp16()
    return run_trainer(config)


def test_the_loss_scale_continues_under_fp16_and_is_dropped_under_other_precisions(ranks: Pool, tmp_path: Path) -> None:
    data, scale = corpus(tmp_path), {"fp16": {"initial_scale_power": 8, "loss_scale_window": 1}}

    def steps_3_and_4(first: str, second: str) -> list[Tree]:
        """Save step 2 with one precision and return the records of the next steps with another.

        The loss scale of a new run doubles in each step from its third one.
        """
        folder = tmp_path / f"{first}_{second}"
        for precision, steps in ((first, 2), (second, 4)):
            training: Tree = {"precision": precision, "steps": steps, "micro_batch_size": 2, "global_batch_size": 4}
            half: Tree = {"training": training, "model": {"n_layer": 1}}
            if precision == "fp16":
                half["deepspeed"] = scale
            records = ranks.run(1, run_with_fp16, run_of(folder, data, steps, **half))[0]["records"]
        return records[2:]

    unchanged = steps_3_and_4("fp32", "fp32")
    assert [record["loss_scale"] for record in steps_3_and_4("fp32", "fp16")] == [256, 256]
    assert [record["loss_scale"] for record in steps_3_and_4("fp16", "fp16")] == [512, 1024]
    for record, expected in zip(steps_3_and_4("fp16", "fp32"), unchanged, strict=True):
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
