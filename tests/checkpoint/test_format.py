"""Checkpoints of format version 2 that earlier versions of megagpt wrote can still be read."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.format import checkpoint_folders, resolve_checkpoint
from megagpt.checkpoint.load import CheckpointReader
from megagpt.checkpoint.verify import local_problems
from megagpt.commands.inspect_checkpoint import main
from megagpt.errors import CheckpointError

MANIFEST_OF_0_1 = {
    "format": "megagpt-checkpoint",
    "version": 2,
    "step": 7,
    "config": {
        "model": {"n_layer": 1, "n_embd": 4, "n_head": 2, "n_positions": 8, "vocab_size": 61},
        "parallel": {"tensor": 2, "pipeline": 1, "context": 1},
        "zero": {"stage": 1},
        "data": {"train": "data/corpus"},
        "training": {"precision": "fp32", "steps": 10, "micro_batch_size": 2, "global_batch_size": 8},
        "resilience": {"most_skipped": 16},
    },
    "state": {"samples": 56, "passed_over": [], "optimizer": "adamw", "optimizer_step": 7, "loss_scaler": {}},
    "tensors": {"w": {"shape": [3, 4], "kinds": ["master", "exp_avg"], "boxes": [[0, [0, 0], [3, 2]], [1, [0, 2], [3, 2]]]}},
    "files": [],
}
"""Written key by key, so that a renamed key fails this test."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step_00000007"
    folder.mkdir()
    values = torch.arange(12.0).view(3, 4)
    files = []
    for number, columns in enumerate((slice(0, 2), slice(2, 4))):
        path = folder / f"rank_{number:05d}.safetensors"
        keys = [f"{state}/w@0,{columns.start}" for state in ("master", "exp_avg")]
        save_file({key: (values[:, columns] * (1 + n)).contiguous() for n, key in enumerate(keys)}, path)
        content = path.read_bytes()
        record = {"name": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "node": "n0"}
        files.append(record)
    text = json.dumps({**MANIFEST_OF_0_1, "files": files}).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")
    return folder


def test_tensors_of_an_older_checkpoint_are_read(checkpoint: Path) -> None:
    assert local_problems(checkpoint) == []
    reader = CheckpointReader(checkpoint)
    assert reader.has("exp_avg", "w") and not reader.has("exp_avg_sq", "w") and not reader.has("master", "v")
    assert torch.equal(reader.read("master", "w", Box.full((3, 4))), torch.arange(12.0).view(3, 4))
    assert torch.equal(reader.read("exp_avg", "w", Box((1, 1), (2, 2))), 2 * torch.tensor([[5.0, 6.0], [9.0, 10.0]]))


def test_an_older_checkpoint_is_inspected(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(checkpoint), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["step"], report["samples"], report["nodes"], report["tensors"][0]["kinds"]) == (
        7,
        56,
        ["n0"],
        ["master", "exp_avg"],
    )


def test_every_parameter_that_does_not_fit_is_named_up_to_eight(checkpoint: Path) -> None:
    shapes = {"w": (3, 5), **{f"v{number}": (2,) for number in range(9)}}
    with pytest.raises(CheckpointError) as error:
        CheckpointReader(checkpoint).check_shapes(shapes)
    text = str(error.value)
    assert "the checkpoint is of another model: v0 (saved: missing; model: [2]), v1 (" in text
    assert text.endswith("v7 (saved: missing; model: [2]) and 2 more")
    with pytest.raises(CheckpointError, match=r"another model: w \(saved: \[3, 4\]; model: \[3, 5\]\)$"):
        CheckpointReader(checkpoint).check_shapes({"w": (3, 5)})


def test_the_checkpoint_that_latest_names_is_first_and_then_the_newest(tmp_path: Path) -> None:
    for name in ("step_00000010", "step_00000020", "step_00000030", "step_00000040.writing-00", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest").write_text("step_00000020\n")
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step_00000020", "step_00000030", "step_00000010"]
    assert resolve_checkpoint(tmp_path).name == "step_00000020"
    assert resolve_checkpoint(tmp_path / "step_00000010").name == "step_00000010"
