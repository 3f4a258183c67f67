"""Stopping and going on under the same layout is as if nothing had happened, bit for bit; test_resharding.py has the others."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pool import Pool, RankError
from support.runs import Tree, corpus, run_trainer, tiny_config

from megagpt.config import Config

LAYOUTS: dict[str, tuple[int, Tree, int]] = {
    "alone": (1, {}, 1),
    "ZeRO-0": (2, {}, 0),
    "ZeRO-2": (2, {}, 2),
    "ZeRO-3": (2, {}, 3),
    "2 x 2 x 2": (8, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 1),
}


def config_of(folder: Path, data: str, parallel: Tree, stage: int, steps: int, **sections: Tree) -> Config:
    """20 steps of a fixed schedule, stopped after `steps`; dropout, so that random state matters."""
    tree: Tree = {
        "model": {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
        "data": {"train": data},
        "training": {"steps": steps, "micro_batch_size": 2, "global_batch_size": 8},
        "lr_schedule": {"warmup_steps": 3, "decay_steps": 20},
        "checkpoint": {"dir": str(folder / "checkpoints")},
        "logging": {"interval": 1, "metrics_file": str(folder / "metrics.jsonl")},
    }
    return tiny_config(parallel=parallel, zero={"stage": stage}, **{**tree, **sections})


def same_bits(results: list[Tree], expected: list[Tree]) -> None:
    for result, other in zip(results, expected, strict=True):
        for (name, *_, values), (_, *_, wanted) in zip(result["weights"], other["weights"], strict=True):
            assert np.array_equal(values, wanted), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_ten_steps_and_ten_more_equal_twenty_bit_for_bit(name: str, ranks: Pool, tmp_path: Path) -> None:
    world, parallel, stage = LAYOUTS[name]
    data = corpus(tmp_path)
    straight = ranks.run(world, run_trainer, config_of(tmp_path / "straight", data, parallel, stage, 20))
    ranks.run(world, run_trainer, config_of(tmp_path / "halves", data, parallel, stage, 10))
    halves = ranks.run(world, run_trainer, config_of(tmp_path / "halves", data, parallel, stage, 20))
    assert len(straight[0]["losses"]) == 20
    assert halves[0]["losses"] == straight[0]["losses"]
    same_bits(halves, straight)


def test_sgd_with_momentum_resumes_bit_for_bit(ranks: Pool, tmp_path: Path) -> None:
    data, sgd = corpus(tmp_path), {"type": "sgd", "momentum": 0.9, "learning_rate": 0.1}
    straight = ranks.run(2, run_trainer, config_of(tmp_path / "a", data, {}, 1, 6, optimizer=sgd))
    ranks.run(2, run_trainer, config_of(tmp_path / "b", data, {}, 1, 3, optimizer=sgd))
    same_bits(ranks.run(2, run_trainer, config_of(tmp_path / "b", data, {}, 1, 6, optimizer=sgd)), straight)


@pytest.fixture(scope="module")
def saved(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run's folder with one checkpoint of two ranks, and its data."""
    folder = tmp_path_factory.mktemp("saved")
    data = corpus(folder)
    ranks.run(2, run_trainer, config_of(folder, data, {"tensor": 2}, 1, 2))
    return folder, data


def resume(saved: tuple[Path, str], folder: Path, ranks: Pool, **sections: Tree) -> Any:
    shutil.copytree(saved[0], folder, dirs_exist_ok=True)
    return ranks.run(2, run_trainer, config_of(folder, saved[1], {"tensor": 2}, 1, 3, **sections))


def test_another_model_is_refused_with_every_difference(saved: tuple[Path, str], ranks: Pool, tmp_path: Path) -> None:
    other: Tree = {"model": {"ffn_hidden": 64, "n_layer": 3}}
    with pytest.raises(RankError, match="of another model") as error:
        resume(saved, tmp_path, ranks, **other)
    assert "model.n_layer is 4 in the checkpoint and 3 in the config" in str(error.value)
    assert "model.ffn_hidden is 128 in the checkpoint and 64 in the config" in str(error.value)


def test_a_run_goes_on_at_the_next_sample_with_another_batch_size_and_other_ranks(ranks: Pool, tmp_path: Path) -> None:
    """With weights that all but stand still, the loss tells which samples a step has read."""
    data = corpus(tmp_path)

    def run(folder: str, world: int, steps: int, micro: int, size: int) -> Tree:
        still: Tree = {
            "training": {"steps": steps, "micro_batch_size": micro, "global_batch_size": size},
            "optimizer": {"learning_rate": 1e-9, "weight_decay": 0.0},
            "model": {"embd_pdrop": 0.0},
        }
        return ranks.run(world, run_trainer, config_of(tmp_path / folder, data, {}, 1, steps, **still))[0]

    fours = run("fours", 1, 12, 4, 4)["losses"]  # samples 0 to 48, four by four
    run("changed", 2, 2, 2, 8)  # samples 0 to 16
    run("changed", 4, 5, 1, 4)  # samples 16 to 28
    losses = run("changed", 1, 6, 3, 12)["losses"]  # samples 28 to 40
    expected = [sum(fours[0:2]) / 2, sum(fours[2:4]) / 2, *fours[4:7], sum(fours[7:10]) / 3]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert max(fours) - min(fours) > 1e-2  # a sample too far would show


def test_a_run_measured_in_tokens_ends_at_them_with_any_batch_size(ranks: Pool, tmp_path: Path) -> None:
    data = corpus(tmp_path)
    for size, steps, stop in ((8, 2, 2), (4, None, 2 + 4)):  # 16 samples, then 16 of the 32 that 500 tokens take
        length: Tree = {"steps": steps} if steps else {"tokens": 500, "steps": None}
        training: Tree = {"training": {**length, "micro_batch_size": 2, "global_batch_size": size}}
        result = ranks.run(2, run_trainer, config_of(tmp_path, data, {}, 1, 2, **training))[0]
        assert result["step"] == stop
    assert result["records"][-1]["tokens"] == 32 * 16


def test_padding_rows_of_the_vocabulary_are_not_in_the_checkpoint(saved: tuple[Path, str]) -> None:
    manifest = json.loads(next(saved[0].rglob("manifest.json")).read_text())
    embedding = manifest["tensors"]["embedding.token.weight"]
    assert embedding["shape"] == [61, 32]
    assert sum(size[0] * size[1] for _, _, size in embedding["boxes"]) == 61 * 32


def test_the_checkpoint_keeps_the_resolved_config(saved: tuple[Path, str]) -> None:
    manifest = json.loads(next(saved[0].rglob("manifest.json")).read_text())
    assert manifest["config"]["parallel"]["tensor"] == 2
    assert manifest["state"]["samples"] == 2 * 8


def test_older_checkpoints_go_and_the_newest_stay(ranks: Pool, tmp_path: Path) -> None:
    keep: Tree = {"checkpoint": {"dir": str(tmp_path / "kept"), "interval": 1, "keep": 2}}
    ranks.run(1, run_trainer, config_of(tmp_path, corpus(tmp_path), {}, 1, 4, **keep))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["latest", "step_00000003", "step_00000004"]
    assert (tmp_path / "kept" / "latest").read_text().strip() == "step_00000004"
