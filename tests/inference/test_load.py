"""One process loads a checkpoint of many ranks, bit for bit, in any dtype, with the tokenizer that it carries."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.pool import Pool
from support.runs import Tree, corpus, full_weights, run_trainer, tiny_config
from support.saved import flip_bit, rewrite_manifest

from megagpt.checkpoint.format import FileRecord, Manifest, TensorRecord, read_manifest, resolve_checkpoint, write_manifest
from megagpt.config import to_json
from megagpt.errors import CheckpointError, ConfigError, MegagptError
from megagpt.inference.load import load_model, load_run_tokenizer
from megagpt.model.meta_model import meta_model
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of

Trained = tuple[Path, dict[str, torch.Tensor]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def trained(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A checkpoint of tensor 2 x pipeline 2 x data 2, and its weights."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(
        data={"train": corpus(folder), "tokenizer": "byte"},
        parallel={"tensor": 2, "pipeline": 2},
        training={"steps": 2, "global_batch_size": 8},
        checkpoint={"dir": str(folder / "checkpoints")},
    )
    weights = full_weights(ranks.run(8, run_trainer, config))
    return resolve_checkpoint(folder / "checkpoints"), weights


@pytest.fixture
def checkpoint(trained: Trained, tmp_path: Path) -> Path:
    """A copy to alter."""
    return Path(shutil.copytree(trained[0], tmp_path / trained[0].name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_of_any_layout_loads_in_one_process_bit_for_bit(dtype: str, trained: Trained) -> None:
    model, config = load_model(trained[0], dtype=dtype)
    assert config.training.precision == dtype and not model.training
    assert model.loss.weight is model.tokens.weight  # the tied embedding is one tensor
    for parameter in model.parameters():
        expected = trained[1][shard_of(parameter).name].to(DTYPES[dtype])
        assert parameter.dtype == DTYPES[dtype]
        assert torch.equal(parameter[: len(expected)], expected), shard_of(parameter).name
        assert not parameter[len(expected) :].any()  # vocabulary padding


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@torch.no_grad()
def test_logits_in_half_precision_are_near_those_of_fp32(dtype: str, trained: Trained) -> None:
    """bf16 keeps 8 bits: each rounding is 2^-9 of a value, and a few dozen of them add up: 5% of the largest logit."""
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    expected = load_model(trained[0])[0].logits(tokens)
    actual = load_model(trained[0], dtype=dtype)[0].logits(tokens)
    assert actual.dtype == DTYPES[dtype] and not torch.equal(actual.float(), expected)
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_ranks_that_the_model_cannot_be_divided_by_are_refused(trained: Trained) -> None:
    with pytest.raises(ConfigError, match="3 ranks: parallel.tensor: 3 does not divide model.n_head 4"):
        load_model(trained[0], parallel=ParallelContext(tp_size=3))


def in_config(**model: object) -> Callable[[Tree], None]:
    return lambda manifest: manifest["config"]["model"].update(model)


def claim_tensor(manifest: Tree) -> None:
    """Add a tensor of 2^40 values, all of them in one box of the first file."""
    manifest["tensors"]["extra"] = {"shape": [2**40], "kinds": ["master"], "boxes": [[0, [0], [2**40]]]}


def first_box(manifest: Tree) -> list:
    return manifest["tensors"]["embedding.token.weight"]["boxes"][0]


DAMAGES: dict[str, tuple[Callable[[Tree], None], str]] = {
    "no vocabulary size": (in_config(vocab_size=None), "model.vocab_size: null"),
    "huge vocabulary": (in_config(vocab_size=10**12), "model.vocab_size: 1000000000000"),
    "large vocabulary": (in_config(vocab_size=2**31 - 1), "the checkpoint is of another model: embedding.token.weight"),
    "many layers": (in_config(n_layer=10**9), "model.n_layer: 1000000000"),
    "some layers more": (in_config(n_layer=9999), "model.n_layer: 9999, but it has only 52 tensors"),
    "wide": (in_config(n_embd=2**20), "the checkpoint is of another model"),
    "no model": (lambda manifest: manifest["config"].pop("model"), "model: required, but missing"),
    "unknown key": (in_config(n_experts=8), "model.n_experts: no such key"),
    "no config": (lambda manifest: manifest["config"].clear(), "required, but missing"),
    "no tensors": (lambda manifest: manifest["tensors"].clear(), "has no tensors"),
    "one tensor less": (lambda manifest: manifest["tensors"].pop("final_norm.weight"), "final_norm.weight (saved: missing"),
    "tensor larger than its file": (claim_tensor, "bytes, but its boxes need"),
    "huge shape": (lambda manifest: manifest["tensors"]["final_norm.weight"].update(shape=[10**30]), "final_norm.weight"),
    "box in no file": (lambda manifest: first_box(manifest).__setitem__(0, 9), "in file 9 of 8"),
    "box of other dims": (lambda manifest: first_box(manifest)[1].pop(), "is not inside its shape"),
    "no boxes": (lambda manifest: manifest["tensors"]["final_norm.weight"]["boxes"].clear(), "values are in no box"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_manifest_that_contradicts_the_files_is_refused_before_memory_is_allocated(damage: str, checkpoint: Path) -> None:
    change, message = DAMAGES[damage]
    rewrite_manifest(checkpoint, change)
    with pytest.raises(MegagptError) as error:
        load_model(checkpoint)
    assert message in str(error.value)


def test_a_model_that_is_too_large_for_the_memory_is_refused_with_both_numbers(tmp_path: Path) -> None:
    """12 h^2 parameters in each of 2 layers, h = 2^18: 1.65e12 of 2 bytes, and 4 h^2 of 4 bytes for the largest weight.

    The file is not read, so it may be empty.
    """
    config = tiny_config(model={"n_layer": 2, "n_embd": 2**18, "vocab_size": 61})
    tensors, n_bytes = {}, 0
    for parameter in meta_model(config).parameters():
        shape = list(shard_of(parameter).shape)
        tensors[shard_of(parameter).name] = TensorRecord(shape=shape, kinds=["master"], boxes=[(0, [0] * len(shape), shape)])
        n_bytes += 4 * math.prod(shape)
    file = FileRecord(name="rank_00000.safetensors", bytes=n_bytes, sha256="0" * 64, node="here")
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / file.name).touch()
    write_manifest(folder, Manifest(step=1, config=json.loads(to_json(config)), state={}, tensors=tensors, files=[file]))
    with pytest.raises(ConfigError, match=r"parameters in bf16: needs 4,398.1 GB of memory, and .* has .* GB free"):
        load_model(folder, dtype="bf16", checksums=False)


def test_a_damaged_file_is_refused_unless_checksums_are_skipped(checkpoint: Path) -> None:
    flip_bit(next(checkpoint.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match="its SHA-256 differs"):
        load_model(checkpoint)
    load_model(checkpoint, checksums=False)


def test_a_checkpoint_without_a_tokenizer_names_the_one_to_give(checkpoint: Path) -> None:
    def change(manifest: Tree, name: str | None) -> None:
        manifest["tokenizer"] = None
        manifest["config"]["data"]["tokenizer"] = name

    assert load_run_tokenizer(checkpoint, read_manifest(checkpoint), None).vocab_size == 257
    rewrite_manifest(checkpoint, lambda manifest: change(manifest, "gone/t.model"))
    with pytest.raises(ConfigError, match=r"gone/t.model: no such tokenizer.*\(named in the checkpoint .*; give --tokenizer\)"):
        load_run_tokenizer(checkpoint, read_manifest(checkpoint), None)
    assert load_run_tokenizer(checkpoint, read_manifest(checkpoint), "byte").vocab_size == 257
    rewrite_manifest(checkpoint, lambda manifest: change(manifest, None))
    with pytest.raises(ConfigError, match="has no tokenizer and names none; give --tokenizer"):
        load_run_tokenizer(checkpoint, read_manifest(checkpoint), None)


def test_a_checkpoint_of_a_version_without_tokenizers_loads(checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, lambda manifest: manifest.pop("tokenizer"))
    assert "tokenizer" not in json.loads((checkpoint / "manifest.json").read_text())
    load_model(checkpoint)
    assert load_run_tokenizer(checkpoint, read_manifest(checkpoint), None).vocab_size == 257  # config: "byte"
