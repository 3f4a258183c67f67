"""The export_weights command: the file has the trained weights, bit for bit, and is complete or absent."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.pool import Pool
from support.runs import full_weights
from support.saved import flip_bit, rewrite_file, rewrite_manifest, save_small

from megagpt.commands.export_weights import main

Weights = dict[str, torch.Tensor]
NAME = "embedding.position.weight"


@pytest.fixture(scope="module")
def trained(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """A run's checkpoint folder, with one checkpoint of four ranks, and the final weights of the run."""
    folder = tmp_path_factory.mktemp("exported")
    results = save_small(ranks, folder)
    return folder / "checkpoints", full_weights(results)


@pytest.fixture
def checkpoint(trained: tuple[Path, Weights], tmp_path: Path) -> Path:
    """A copy of the checkpoint to alter."""
    return Path(shutil.copytree(trained[0] / "step_00000002", tmp_path / "run" / "step_00000002"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A file name in a folder that does not exist yet."""
    return tmp_path / "out" / "gpt.safetensors"


def export(checkpoint: Path, output: Path, *arguments: str) -> int:
    return main(["--checkpoint", str(checkpoint), "--output", str(output), *arguments])


def error(checkpoint: Path, output: Path, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Run a command that must fail; return the only line that it prints."""
    assert export(checkpoint, output, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def set_first(checkpoint: Path, value: float) -> None:
    """Set the first value of a weight; the checkpoint stays complete."""
    rewrite_file(checkpoint, 0, lambda tensors: tensors[f"master/{NAME}@0,0"][0].__setitem__(0, value))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_file_has_the_trained_weights(dtype: str, trained: tuple[Path, Weights], output: Path) -> None:
    run, weights = trained
    assert export(run, output, *(["--dtype", dtype] if dtype != "fp32" else [])) == 0
    exported = load_file(output)
    assert exported.keys() == weights.keys()
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, values in exported.items():
        assert values.dtype == torch_dtype and torch.equal(bits(values), bits(weights[name].to(torch_dtype))), name
    assert list(output.parent.iterdir()) == [output]


def test_the_metadata_has_the_model_config_and_the_step(trained: tuple[Path, Weights], output: Path) -> None:
    assert export(trained[0], output) == 0
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"megagpt_config", "step"} and metadata["step"] == "2"
    model = json.loads(metadata["megagpt_config"])
    assert (model["n_layer"], model["n_embd"], model["n_head"], model["vocab_size"]) == (4, 32, 4, 61)


def test_the_command_prints_what_it_wrote(trained: tuple[Path, Weights], output: Path, capsys: pytest.CaptureFixture) -> None:
    assert export(trained[0] / "step_00000002", output, "--dtype", "bf16") == 0
    size = output.stat().st_size
    assert capsys.readouterr().out == f"{output}: 53,344 parameters in 52 tensors, bf16, {size:,} bytes, of step 2\n"


def test_an_existing_file_is_replaced_only_with_force(
    trained: tuple[Path, Weights], output: Path, capsys: pytest.CaptureFixture
) -> None:
    output.parent.mkdir()
    output.write_text("existing")
    assert f"--output {output}: exists already" in error(trained[0], output, capsys)
    assert output.read_text() == "existing"
    assert export(trained[0], output, "--force") == 0
    assert len(load_file(output)) == 52 and list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("value", [65520.0, -1e30])
def test_a_weight_that_fp16_cannot_hold_is_named(
    value: float, checkpoint: Path, output: Path, capsys: pytest.CaptureFixture
) -> None:
    set_first(checkpoint, value)
    assert f"{NAME}: 1 of 512 values are too large for torch.float16" in error(checkpoint, output, capsys, "--dtype", "fp16")
    assert list(output.parent.iterdir()) == []
    assert export(checkpoint, output, "--dtype", "bf16") == 0
    before, _ = output.read_bytes(), capsys.readouterr()
    error(checkpoint, output, capsys, "--dtype", "fp16", "--force")
    assert output.read_bytes() == before and list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("value", [65519.0, float("inf")])
def test_values_that_fp16_can_hold_are_exported(value: float, checkpoint: Path, output: Path) -> None:
    set_first(checkpoint, value)
    assert export(checkpoint, output, "--dtype", "fp16") == 0
    assert load_file(output)[NAME][0, 0] == (65504.0 if value < 1e9 else value)


def test_a_damaged_checkpoint_is_not_exported(checkpoint: Path, output: Path, capsys: pytest.CaptureFixture) -> None:
    flip_bit(checkpoint / "rank_00002.safetensors")
    assert "rank_00002.safetensors: its SHA-256 differs from the manifest's" in error(checkpoint, output, capsys)
    assert not output.exists()
    assert export(checkpoint, output, "--skip-checksums") == 0


def test_a_truncated_file_is_detected_without_checksums(checkpoint: Path, output: Path, capsys: pytest.CaptureFixture) -> None:
    path = checkpoint / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "rank_00001.safetensors: cannot be read" in error(checkpoint, output, capsys, "--skip-checksums")
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["--skip-checksums"]])
def test_a_missing_file_and_a_gap_are_detected(
    arguments: list[str], checkpoint: Path, output: Path, capsys: pytest.CaptureFixture
) -> None:
    rewrite_manifest(checkpoint, lambda manifest: manifest["tensors"][NAME]["boxes"].pop())
    assert f"{NAME}: " in (line := error(checkpoint, output, capsys, *arguments)) and "of 512 values are in no box" in line
    (checkpoint / "rank_00003.safetensors").unlink()
    assert export(checkpoint, output, *arguments) == 2
    assert "rank_00003.safetensors: missing; node" in capsys.readouterr().err
    assert not output.exists()


def test_a_tensor_that_is_larger_than_its_file_is_refused_before_memory_is_allocated(
    checkpoint: Path, output: Path, capsys: pytest.CaptureFixture
) -> None:
    extra = {"shape": [2**40], "kinds": ["master"], "boxes": [[0, [0], [2**40]]]}
    rewrite_manifest(checkpoint, lambda manifest: manifest["tensors"].update(extra=extra))
    assert "rank_00000.safetensors has " in error(checkpoint, output, capsys)
    rewrite_manifest(checkpoint, lambda manifest: manifest["tensors"]["extra"].update(shape=[10**30]))
    assert "extra" in error(checkpoint, output, capsys)
    assert not output.exists()


def test_a_wrong_path_is_an_error_of_one_line(
    trained: tuple[Path, Weights], checkpoint: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert "gone: no checkpoint here" in error(tmp_path / "gone", output, capsys)
    assert "is a folder" in error(trained[0], tmp_path, capsys)
    (tmp_path / "file").touch()
    assert "cannot be written: " in error(trained[0], tmp_path / "file" / "gpt.safetensors", capsys)
    inside = checkpoint / "gpt.safetensors"
    assert "is in the checkpoint's folder" in error(checkpoint, inside, capsys) and not inside.exists()
    first = checkpoint / "rank_00000.safetensors"
    before = first.read_bytes()
    assert "is in the checkpoint's folder" in error(checkpoint, first, capsys, "--force") and first.read_bytes() == before
