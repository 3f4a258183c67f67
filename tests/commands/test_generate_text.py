"""The generate_text command: text on standard output, notes on standard error, one sentence for what cannot be."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from support.commands import run_command
from support.runs import full_model, tiny_config
from support.saved import rewrite_file

from megagpt.checkpoint.tokenizer_files import read_tokenizer
from megagpt.checkpoint.write import TensorSource, write_checkpoint
from megagpt.commands.generate_text import main
from megagpt.config import to_json
from megagpt.parallel.parameter import shard_of

POSITIONS = 16


def write(directory: Path, tokenizer: str | None, vocab_size: int) -> Path:
    """Write a checkpoint with random weights, whose config names a tokenizer that does not exist."""
    config = tiny_config(model={"vocab_size": vocab_size, "n_positions": POSITIONS}, data={"tokenizer": "gone/t.model"})
    sources = []
    for parameter in full_model(config).parameters():
        shard = shard_of(parameter)
        values = parameter.detach()[: shard.shape[0]]  # without vocabulary padding
        sources.append(TensorSource(shard.name, shard.shape, {"master": values}))
    state = {"consumed_samples": 0, "optimizer": "adamw", "optimizer_step": 0, "loss_scaler": {}}
    carried = None if tokenizer is None else read_tokenizer(tokenizer)
    return write_checkpoint(directory, 0, sources, json.loads(to_json(config)), state, tokenizer=carried)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokens are bytes."""
    return write(tmp_path_factory.mktemp("bytes"), "byte", 257)


def generate(checkpoint: Path, *arguments: str) -> int:
    return main(["--checkpoint", str(checkpoint), "--prompt", "abc", "--max-tokens", "4", *arguments])


def refused(checkpoint: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail; return the only line that it prints."""
    assert generate(checkpoint, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_prompt_and_its_continuation_are_printed(dtype: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(checkpoint, "--dtype", dtype, "--device", "cpu") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("abc") and printed.err == ""


def test_equal_arguments_give_equal_texts(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for arguments in ([], [], ["--seed", "5"], ["--skip-checksums"]):
        assert generate(checkpoint, "--max-tokens", "13", *arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[3] != texts[2]


def test_a_text_can_be_longer_than_the_context_and_notes_say_what_the_model_sees(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(checkpoint, "--prompt", "x" * 40, "--max-tokens", "60", "--temperature", "5") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("x" * 40) and len(printed.out.encode()) > 60
    assert "note: the prompt has 40 tokens; the model sees its last 16 (model.n_positions)\n" in printed.err
    assert "note: text beyond 16 tokens (model.n_positions) is predicted from the last 16" in printed.err
    assert generate(checkpoint, "--prompt", "x", "--max-tokens", "15") == 0
    assert capsys.readouterr().err == ""


def test_ids_that_the_tokenizer_lacks_are_never_generated_and_a_note_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The vocabulary of the model is 100 times that of the tokenizer, so a sample without the mask would meet such an id."""
    vocab = {"[UNK]": 0, "abc": 1, "d": 2, "</s>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    checkpoint = write(tmp_path / "run", str(tmp_path), 400)
    assert generate(checkpoint, "--temperature", "9") == 0
    printed = capsys.readouterr()
    assert set(printed.out.split()) <= set(vocab)
    assert generate(checkpoint, "--prompt", "abc\n  other", "--max-tokens", "1") == 0
    assert capsys.readouterr().out.startswith("abc\n  other")  # the tokenizer has neither the line end nor the word
    assert printed.err == "note: model.vocab_size is 400, and the tokenizer has 4 tokens: ids from 4 on are never generated\n"


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_when_the_prompt_needs_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write(tmp_path, "byte", 98)
    assert "token id 98 is not in the model's vocabulary of 98; give the tokenizer" in refused(checkpoint, capsys)


def test_an_empty_prompt_starts_a_new_document(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(checkpoint, "--prompt", "", "--temperature", "5") == 0
    assert capsys.readouterr().out.strip()


def test_the_tokenizer_of_the_checkpoint_can_be_replaced(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))  # the tokenizer that its config names is gone
    assert generate(moved) == 0
    text = capsys.readouterr().out
    assert generate(moved, "--tokenizer", "byte") == 0
    assert capsys.readouterr().out == text
    assert "gone.model: no such tokenizer" in refused(moved, capsys, "--tokenizer", "gone.model")
    nameless = write(tmp_path / "without", None, 257)
    assert "(named in the checkpoint " in (line := refused(nameless, capsys)) and "give --tokenizer" in line
    assert generate(nameless, "--tokenizer", "byte") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "--temperature -1: expected 0"),
        (["--temperature", "nan"], "--temperature nan: expected 0"),
        (["--temperature", "inf"], "--temperature inf: expected 0"),
        (["--max-tokens", "0"], "--max-tokens 0: expected 1 to"),
        (["--max-tokens", "99999999999999"], "--max-tokens 99999999999999: expected 1 to"),
        (["--top-k", "0"], "--top-k 0: expected 1 or more"),
        (["--top-k", "-3"], "--top-k -3: expected 1 or more"),
        (["--seed", "-1"], "--seed -1: expected 0 to"),
        (["--seed", str(2**64)], f"--seed {2**64}: expected 0 to"),
        (["--prompt", "caf\udce9"], "--prompt: byte 0xe9 after 'caf' is not UTF-8"),
        (["--device", "gpu"], "--device gpu: expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:999"], "--device cuda:999: this machine has "),
        (["--checkpoint", "nowhere"], "nowhere: no checkpoint here"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_expected(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(checkpoint, capsys, *arguments)


@pytest.mark.parametrize("temperature", ["1e-42", "1e-323", "0", "1e300"])
def test_every_temperature_gives_a_text(temperature: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(checkpoint, "--temperature", temperature) == 0
    assert capsys.readouterr().out.startswith("abc")


def test_weights_that_are_not_finite_are_an_error_of_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    rewrite_file(broken, 0, lambda tensors: tensors["master/final_norm.weight@0"].fill_(torch.nan))
    assert "the model's scores are not finite" in refused(broken, capsys)


def test_a_terminal_without_unicode_shows_escapes(checkpoint: Path) -> None:
    """In a process of its own, with the bytes of a Latin-1 terminal as arguments of a second one."""
    command = [sys.executable, "tools/generate_text.py", "--checkpoint", checkpoint, "--max-tokens", "1"]
    result = run_command(*command, "--prompt", "caf\u00e9", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout[:7]) == (0, "caf\\xe9")
    result = run_command(*command, "--prompt", "caf\udce9", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --prompt: byte 0xe9 after 'caf' is not UTF-8; expected text in UTF-8\n"
