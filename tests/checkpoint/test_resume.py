"""Stopping and resuming under the same layout gives the bits of a run without a stop; test_resharding.py has the others."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import LayoutCase, run_config
from support.exhaustive import chosen
from support.pool import Pool, RankError
from support.runs import Tree, corpus, run_trainer

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.load import CheckpointReader
from megagpt.checkpoint.write import TensorSource, write_checkpoint

LAYOUTS = {
    "alone": LayoutCase(1, {}, 1),
    "ZeRO-0": LayoutCase(2, {}, 0),
    "ZeRO-2": LayoutCase(2, {}, 2),
    "ZeRO-3": LayoutCase(2, {}, 3),
    "2 x 2 x 2": LayoutCase(8, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 1),
}


def assert_equal_bits(results: list[Tree], expected: list[Tree]) -> None:
    for result, other in zip(results, expected, strict=True):
        for (name, *_, values), (_, *_, wanted) in zip(result["weights"], other["weights"], strict=True):
            assert np.array_equal(values, wanted), name


@pytest.mark.parametrize("name", chosen(LAYOUTS, "ZeRO-2", "ZeRO-3", "2 x 2 x 2"))
def test_two_steps_and_two_more_equal_four_bit_for_bit(name: str, ranks: Pool, tmp_path: Path) -> None:
    world, parallel, stage = LAYOUTS[name]
    data = corpus(tmp_path)
    straight = ranks.run(world, run_trainer, run_config(tmp_path / "straight", data, parallel, stage, 4))
    ranks.run(world, run_trainer, run_config(tmp_path / "halves", data, parallel, stage, 2))
    halves = ranks.run(world, run_trainer, run_config(tmp_path / "halves", data, parallel, stage, 4))
    assert len(straight[0]["losses"]) == 4
    assert halves[0]["losses"] == straight[0]["losses"]
    assert_equal_bits(halves, straight)


def test_sgd_with_momentum_resumes_bit_for_bit(ranks: Pool, tmp_path: Path) -> None:
    data, sgd = corpus(tmp_path), {"type": "sgd", "momentum": 0.9, "learning_rate": 0.1}
    straight = ranks.run(2, run_trainer, run_config(tmp_path / "a", data, {}, 1, 6, optimizer=sgd))
    ranks.run(2, run_trainer, run_config(tmp_path / "b", data, {}, 1, 3, optimizer=sgd))
    assert_equal_bits(ranks.run(2, run_trainer, run_config(tmp_path / "b", data, {}, 1, 6, optimizer=sgd)), straight)


@pytest.fixture(scope="module")
def saved(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run's folder with one checkpoint of two ranks, and its data."""
    folder = tmp_path_factory.mktemp("saved")
    data = corpus(folder)
    ranks.run(2, run_trainer, run_config(folder, data, {"tensor": 2}, 1, 2))
    return folder, data


def resume(saved: tuple[Path, str], folder: Path, ranks: Pool, **sections: Tree) -> Any:
    shutil.copytree(saved[0], folder, dirs_exist_ok=True)
    return ranks.run(2, run_trainer, run_config(folder, saved[1], {"tensor": 2}, 1, 3, **sections))


def test_another_model_is_refused_with_every_difference(saved: tuple[Path, str], ranks: Pool, tmp_path: Path) -> None:
    other: Tree = {"model": {"ffn_hidden": 64, "n_layer": 3}}
    with pytest.raises(RankError, match="of another model") as error:
        resume(saved, tmp_path, ranks, **other)
    assert "model.n_layer is 4 in the checkpoint and 3 in the config" in str(error.value)
    assert "model.ffn_hidden is 128 in the checkpoint and 64 in the config" in str(error.value)


def test_a_run_resumes_at_the_next_sample_with_another_batch_size_and_other_ranks(ranks: Pool, tmp_path: Path) -> None:
    """The weights hardly change, so the loss shows which samples a step has read."""
    data = corpus(tmp_path)

    def run(folder: str, world: int, steps: int, micro: int, size: int) -> Tree:
        sections: Tree = {
            "training": {"steps": steps, "micro_batch_size": micro, "global_batch_size": size},
            "optimizer": {"learning_rate": 1e-9, "weight_decay": 0.0},
            "model": {"embd_pdrop": 0.0},
        }
        return ranks.run(world, run_trainer, run_config(tmp_path / folder, data, {}, 1, steps, **sections))[0]

    fours = run("fours", 1, 12, 4, 4)["losses"]  # samples 0 to 48, four by four
    run("changed", 2, 2, 2, 8)  # samples 0 to 16
    run("changed", 4, 5, 1, 4)  # samples 16 to 28
    losses = run("changed", 1, 6, 3, 12)["losses"]  # samples 28 to 40
    expected = [sum(fours[0:2]) / 2, sum(fours[2:4]) / 2, *fours[4:7], sum(fours[7:10]) / 3]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert max(fours) - min(fours) > 1e-2  # an offset of one sample would show


def test_a_run_measured_in_tokens_ends_at_them_with_any_batch_size(ranks: Pool, tmp_path: Path) -> None:
    data = corpus(tmp_path)
    for size, steps, last_step in ((8, 2, 2), (4, None, 2 + 4)):  # 16 samples, then 16 of the 32 that 500 tokens need
        length: Tree = {"steps": steps} if steps else {"tokens": 500, "steps": None}
        training: Tree = {"training": {**length, "micro_batch_size": 2, "global_batch_size": size}}
        result = ranks.run(2, run_trainer, run_config(tmp_path, data, {}, 1, 2, **training))[0]
        assert result["step"] == last_step
    assert result["records"][-1]["tokens"] == 32 * 16


def test_a_checkpoint_that_a_converter_wrote_resumes_bit_for_bit(saved: tuple[Path, str], ranks: Pool, tmp_path: Path) -> None:
    """Copy every tensor by `write_checkpoint`, which knows no layout, and continue both runs."""
    reader = CheckpointReader(saved[0] / "checkpoints" / "step_00000002")
    manifest = reader.manifest

    def sources() -> Iterator[TensorSource]:
        for name, record in manifest.tensors.items():
            shape = tuple(record.shape)
            yield TensorSource(name, shape, {s: partial(reader.read, s, name, Box.full(shape)) for s in record.kinds})

    write_checkpoint(tmp_path / "copy" / "checkpoints", manifest.step, sources(), manifest.config, manifest.state, 100_000)
    assert len(list((tmp_path / "copy").rglob("*.safetensors"))) > 3
    expected = resume(saved, tmp_path / "original", ranks)
    copied = ranks.run(2, run_trainer, run_config(tmp_path / "copy", saved[1], {"tensor": 2}, 1, 3))
    assert copied[0]["step"] == 3 and len(copied[0]["records"]) == 1
    assert_equal_bits(copied, expected)


def test_vocabulary_padding_is_not_in_the_checkpoint(saved: tuple[Path, str]) -> None:
    manifest = json.loads(next(saved[0].rglob("manifest.json")).read_text())
    embedding = manifest["tensors"]["embedding.token.weight"]
    assert embedding["shape"] == [61, 32]
    assert sum(size[0] * size[1] for _, _, size in embedding["boxes"]) == 61 * 32


def test_the_checkpoint_contains_the_resolved_config_and_the_progress(saved: tuple[Path, str]) -> None:
    manifest = json.loads(next(saved[0].rglob("manifest.json")).read_text())
    assert manifest["config"]["parallel"]["tensor"] == 2
    assert manifest["state"]["consumed_samples"] == 2 * 8


def test_older_checkpoints_are_deleted_and_the_newest_are_kept(ranks: Pool, tmp_path: Path) -> None:
    keep: Tree = {"checkpoint": {"dir": str(tmp_path / "kept"), "interval": 1, "keep": 2}}
    ranks.run(1, run_trainer, run_config(tmp_path, corpus(tmp_path), {}, 1, 4, **keep))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["latest", "step_00000003", "step_00000004"]
    assert (tmp_path / "kept" / "latest").read_text().strip() == "step_00000004"
