"""A checkpoint carries the tokenizer that its run started with: moved elsewhere it encodes the same, and damage is named."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import torch.distributed as dist
from support.pool import Pool
from support.runs import Tree, corpus, open_trainer, run_trainer, tiny_config
from support.saved import rewrite_manifest

from megagpt.checkpoint.format import Manifest, read_manifest
from megagpt.checkpoint.tokenizer_files import RunTokenizer, carried_path, read_tokenizer, tokenizer_change
from megagpt.checkpoint.verify import checkpoint_problems
from megagpt.checkpoint.write import TensorSource, write_checkpoint
from megagpt.commands import inspect_checkpoint
from megagpt.config import Config, to_json
from megagpt.data.tokenizer import load_tokenizer
from megagpt.errors import CheckpointError, DataError

TEXT = "the cat sat"
STATE = {"consumed_samples": 8, "optimizer": "adamw", "optimizer_step": 1, "loss_scaler": {}}


def hugging_face(folder: Path, *, stop: str = "<stop>") -> Path:
    """A tokenizer.json under another name, whose end-of-document token is declared beside it."""
    vocab = {word: number for number, word in enumerate(["[UNK]", *TEXT.split(), "</s>", stop])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "own.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": stop}))
    return folder / "own.json"


def gpt2(folder: Path) -> Path:
    """A folder with GPT-2's two files."""
    folder.mkdir()
    characters = dict.fromkeys(TEXT.replace(" ", "Ġ"))
    vocab = {token: number for number, token in enumerate([*characters, "th", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    return folder


def sentencepiece_model(folder: Path) -> Path:
    """A SentencePiece model under another name."""
    folder.mkdir()
    (folder / "text.txt").write_text(f"{TEXT}\n" * 50)
    options = {"vocab_size": 30, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text.txt"), model_prefix=str(folder / "own"), **options)
    return folder / "own.model"


KINDS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "tokenizer.json": (hugging_face, ["tokenizer.json", "tokenizer_config.json"]),
    "GPT-2": (gpt2, ["merges.txt", "vocab.json"]),
    "SentencePiece": (sentencepiece_model, ["tokenizer.model"]),
}


def write(folder: Path, tokenizer: RunTokenizer | None) -> Path:
    """Write a small checkpoint."""
    tensors = [TensorSource("w", (2,), {"master": torch.ones(2)})]
    return write_checkpoint(folder, 1, tensors, json.loads(to_json(tiny_config())), STATE, tokenizer=tokenizer)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer of two files."""
    return write(tmp_path / "run", read_tokenizer(str(hugging_face(tmp_path / "own"))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_checkpoint_encodes_as_the_original_tokenizer_did(kind: str, tmp_path: Path) -> None:
    build, files = KINDS[kind]
    path = build(tmp_path / "own")
    original = load_tokenizer(str(path))
    ids = original.encode(TEXT)
    written = write(tmp_path / "run", read_tokenizer(str(path)))
    shutil.rmtree(tmp_path / "own")
    moved = written.rename(tmp_path / written.name)
    assert sorted(file.name for file in (moved / "tokenizer").iterdir()) == files
    assert inspect_checkpoint.main([str(moved)]) == 0
    carried = load_tokenizer(str(carried_path(moved, read_manifest(moved))))
    assert carried.encode(TEXT) == ids and (carried.vocab_size, carried.eod_id) == (original.vocab_size, original.eod_id)


def test_the_byte_tokenizer_needs_no_files(tmp_path: Path) -> None:
    written = write(tmp_path, read_tokenizer("byte"))
    assert not (written / "tokenizer").exists() and inspect_checkpoint.main([str(written)]) == 0
    assert carried_path(written, read_manifest(written)) == "byte"


def test_a_checkpoint_without_a_tokenizer_has_no_folder_for_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    written = write(tmp_path, None)
    assert carried_path(written, read_manifest(written)) is None
    (written / "tokenizer").mkdir()
    assert inspect_checkpoint.main([str(written)]) == 2
    assert "tokenizer: not a file of this checkpoint" in capsys.readouterr().err


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda path: path.write_bytes(path.read_bytes().replace(b"cat", b"dog")), "its SHA-256 differs"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, expected "),
    "missing": (Path.unlink, "No such file or directory; a file of the checkpoint's tokenizer"),
    "no folder": (lambda path: shutil.rmtree(path.parent), "No such file or directory; a file of the checkpoint's tokenizer"),
    "pipe": (replace_by_pipe, "not a regular file"),
    "foreign": (lambda path: path.with_name("notes.txt").touch(), "notes.txt: not a file of this checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_checkpoint_is_not_sound(
    damage: str, checkpoint: Path, ranks: Pool, capsys: pytest.CaptureFixture
) -> None:
    apply, message = DAMAGES[damage]
    apply(checkpoint / "tokenizer" / "tokenizer.json")
    assert inspect_checkpoint.main([str(checkpoint), "--skip-checksums"]) == 2
    assert message in (line := capsys.readouterr().err) and str(checkpoint / "tokenizer") in line
    assert any(message in problem for problem in ranks.run(2, checkpoint_problems, checkpoint)[1])


@pytest.mark.parametrize("name", ["../manifest.json", "/etc/passwd", ".hidden", "a/b", "", "é"])
def test_a_manifest_cannot_name_a_tokenizer_file_in_another_folder(name: str, checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, lambda manifest: manifest["tokenizer"]["files"][0].update(name=name))
    with pytest.raises(CheckpointError, match=r"tokenizer.files.0.name"):
        read_manifest(checkpoint)


def test_a_file_that_is_no_tokenizer_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.model: no such tokenizer"):
        read_tokenizer(str(tmp_path / "gone.model"))


def test_only_another_tokenizer_than_the_checkpoints_is_a_change(tmp_path: Path, checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    same = hugging_face(tmp_path / "copy")
    other = hugging_face(tmp_path / "other", stop="<end>")
    assert tokenizer_change(checkpoint, manifest, read_tokenizer(str(same))) is None
    assert tokenizer_change(checkpoint, manifest, None) is None
    text = tokenizer_change(checkpoint, manifest, read_tokenizer(str(other)))
    assert text is not None and f"data.tokenizer: {other} is not the tokenizer of {checkpoint}" in text
    assert f"which is {tmp_path}/own/own.json" in text and "(different: tokenizer.json, tokenizer_config.json)" in text
    assert "byte is not" in str(tokenizer_change(checkpoint, manifest, read_tokenizer("byte")))


def test_without_a_copy_the_names_are_compared(tmp_path: Path) -> None:
    manifest = Manifest(step=1, config={"data": {"tokenizer": "a.model"}}, state={}, tensors={}, files=[])
    assert tokenizer_change(tmp_path, manifest, RunTokenizer("a.model", {})) is None
    assert "b.model, but" in str(tokenizer_change(tmp_path, manifest, RunTokenizer("b.model", {})))
    nameless = manifest.model_copy(update={"config": {}})
    assert tokenizer_change(tmp_path, nameless, RunTokenizer("b.model", {})) is None


def run_config(folder: Path, tokenizer: str | None, steps: int) -> Config:
    sections: dict[str, Tree] = {
        "data": {"train": str(folder / "corpus"), "tokenizer": tokenizer},
        "training": {"steps": steps, "global_batch_size": 4},
        "checkpoint": {"dir": str(folder / "checkpoints"), "interval": 1, "keep": 1},
    }
    return tiny_config(**sections)


def train_while_the_tokenizer_changes(config: Config, path: Path) -> None:
    """Replace the tokenizer's file after the start of the run."""
    trainer = open_trainer(config)
    if dist.get_rank() == 0:
        path.write_text("{}")
    trainer.train()
    trainer.close()


def warnings_of(config: Config) -> str:
    """Train, and return the warnings of this rank."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        run_trainer(config)
    return stderr.getvalue()


def test_every_checkpoint_of_a_run_has_the_tokenizer_that_the_run_started_with(ranks: Pool, tmp_path: Path) -> None:
    """Then a run without a tokenizer keeps it, and a run with another one warns once, on rank 0."""
    corpus(tmp_path)
    path = hugging_face(tmp_path / "own")
    content = path.read_bytes()
    ranks.run(2, train_while_the_tokenizer_changes, run_config(tmp_path, str(path), 2), path)
    assert sorted(file.name for file in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    assert (tmp_path / "checkpoints" / "step_00000002" / "tokenizer" / "tokenizer.json").read_bytes() == content

    assert not any("tokenizer" in text for text in ranks.run(2, warnings_of, run_config(tmp_path, None, 3)))
    folder = tmp_path / "checkpoints" / "step_00000003"
    assert (folder / "tokenizer" / "tokenizer.json").read_bytes() == content

    other = hugging_face(tmp_path / "other", stop="<end>")
    first, second = ranks.run(2, warnings_of, run_config(tmp_path, str(other), 4))
    assert first.count(f"warning: data.tokenizer: {other} is not the tokenizer of {folder}, which is {path}") == 1
    assert second == ""
