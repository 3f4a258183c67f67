"""The convert_checkpoint command: both directions, the tokenizer, the check, and training from an imported model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.encoder_decoder import T5
from support.families import random_model
from support.pool import Pool
from support.runs import corpus, run_trainer, tiny_config
from support.saved import flip_bit, save_small
from support.trained import write_random

from megagpt.commands import generate_text, inspect_checkpoint
from megagpt.commands.convert_checkpoint import main
from megagpt.config import load_config
from megagpt.data.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny LLaMA with a tokenizer of 61 tokens."""
    folder = tmp_path_factory.mktemp("original") / "model"
    model = random_model("llama")
    model.generation_config.eos_token_id = [2, 60]
    model.save_pretrained(folder)
    letters = ["<unk>", "<s>", "</s>", *map(chr, range(ord("A"), ord("A") + 58))]
    words = tokenizers.models.BPE({letter: number for number, letter in enumerate(letters)}, [], unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("imported") / "checkpoints"
    assert main(["from-hf", str(original), "--output", str(output)]) == 0
    return output


def error(capsys: pytest.CaptureFixture, *arguments: Any) -> str:
    """Run a command that must fail; return the only line that it prints."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("error: ")
    return printed.err


def test_both_directions_print_what_they_wrote_and_check_it(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    assert main(["from-hf", str(original), "--output", str(checkpoint), "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{checkpoint}/step_00000000: LlamaForCausalLM, 34,912 parameters, from {original}"
    assert lines[1].startswith("peak memory for tensors: ") and lines[1].endswith(
        "the largest parameter in fp32 has 12,288 bytes"
    )
    assert lines[3].startswith("checked with transformers: logits of 128 tokens, up to ")
    assert main(["to-hf", str(checkpoint), "--output", str(exported), "--check", "--dtype", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{exported}: LlamaForCausalLM, 34,912 parameters, bf16, 69,824 bytes in 1 file, of step 0")
    assert lines[2].startswith("checked with transformers: ")


def test_the_check_finds_a_model_that_differs(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A weight that transformers would read, and megagpt has read in another way."""
    from megagpt.commands.convert_checkpoint import _check

    exported = tmp_path / "exported"
    assert main(["to-hf", str(imported), "--output", str(exported)]) == 0
    tensors = load_file(exported / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1.01
    save_file(tensors, exported / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match="are different models: logits of 128 tokens"):
        _check(imported / "step_00000000", exported, torch.float32)


def test_the_tokenizer_and_the_generation_config_go_along(original: Path, imported: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    assert main(["to-hf", str(imported), "--output", str(exported)]) == 0
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (original, exported))
    assert after.encode("HELLO") == before.encode("HELLO") and after.eos_token == "</s>"
    assert transformers.GenerationConfig.from_pretrained(exported).eos_token_id == [2, 60]
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == [2, 60]
    assert load_tokenizer(str(exported)).encode("HELLO") == before.encode("HELLO", add_special_tokens=False)


def test_the_imported_checkpoint_is_inspected_and_generates(
    original: Path, imported: Path, capsys: pytest.CaptureFixture
) -> None:
    assert inspect_checkpoint.main([str(imported)]) == 0
    capsys.readouterr()
    arguments = ["--checkpoint", str(imported), "--prompt", "HELLO", "--max-tokens", "8", "--temperature", "0"]
    assert generate_text.main(arguments) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(original)
    tokenizer = transformers.AutoTokenizer.from_pretrained(original)
    prompt = torch.tensor([tokenizer.encode("HELLO", add_special_tokens=False)])
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)[0]
    text = load_tokenizer(str(original)).decode(expected.tolist())
    assert len(text) > 10
    assert capsys.readouterr().out.rstrip("\n") == text


def test_a_run_starts_from_the_imported_weights_and_its_model_goes_back(
    imported: Path, tmp_path: Path, ranks: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config of the run extends the one beside the checkpoint; learning rate 0 keeps the weights."""
    tree = {
        "extends": str(imported / "model.json"),
        "model": {"n_positions": 16, "vocab_multiple": 16},
        "parallel": {"tensor": 2, "pipeline": 2},
        "data": {"train": corpus(tmp_path), "tokenizer": str(imported / "step_00000000" / "tokenizer")},
        "training": {"steps": 1, "micro_batch_size": 2, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-30},
        "checkpoint": {"dir": str(tmp_path / "run"), "initialize_from": str(imported)},
    }
    (tmp_path / "run.json").write_text(json.dumps(tree))
    ranks.run(4, run_trainer, load_config(tmp_path / "run.json"))
    assert main(["to-hf", str(tmp_path / "run"), "--output", str(tmp_path / "back"), "--check"]) == 0
    assert main(["to-hf", str(imported), "--output", str(tmp_path / "direct")]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("direct", "back"))
    assert all(torch.equal(values, after[name]) for name, values in before.items())
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == [2, 60]


def resume_error(config: Any) -> str:
    try:
        run_trainer(config)
    except Exception as error:
        return str(error)
    return "no error"


def test_a_run_cannot_resume_from_an_imported_checkpoint(imported: Path, tmp_path: Path, ranks: Pool) -> None:
    folder = shutil.copytree(imported, tmp_path / "run")
    (tmp_path / "run.json").write_text(
        json.dumps(
            {
                "extends": str(imported / "model.json"),
                "model": {"n_positions": 16},
                "data": {"train": corpus(tmp_path)},
                "training": {"steps": 1, "micro_batch_size": 2, "global_batch_size": 8},
                "checkpoint": {"dir": str(folder)},
            }
        )
    )
    (message,) = ranks.run(1, resume_error, load_config(tmp_path / "run.json"))
    assert "was imported and has weights alone" in message and "set checkpoint.initialize_from to it" in message


def test_a_trained_gpt2_checkpoint_of_four_ranks_becomes_a_model_of_transformers(
    ranks: Pool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_small(ranks, tmp_path)
    arguments = ["to-hf", str(tmp_path / "checkpoints"), "--output", str(tmp_path / "hf")]
    assert main([*arguments, "--check", "--max-file-bytes", "50000"]) == 0
    assert "GPT2LMHeadModel" in capsys.readouterr().out
    assert "exists already" in error(capsys, *arguments)
    assert main([*arguments, "--force"]) == 0
    assert not (tmp_path / "hf" / "model.safetensors.index.json").exists()
    flip_bit(tmp_path / "checkpoints" / "step_00000002" / "rank_00002.safetensors")
    assert "its SHA-256 differs" in error(capsys, *arguments, "--force")
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_a_weight_that_the_dtype_cannot_hold_leaves_no_folder(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The last tensor fails, after the others are written; an older model stays as it is."""
    source = Path(shutil.copytree(original, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][-1, -1] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert main(["from-hf", str(source), "--output", str(tmp_path / "checkpoint")]) == 0
    arguments = ["to-hf", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "hf")]
    assert "head.weight: 1 of 1952 values are too large for torch.float16" in error(capsys, *arguments, "--dtype", "fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "source"]
    assert main(arguments) == 0
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    error(capsys, *arguments, "--dtype", "fp16", "--force")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf", "source"]


def test_a_resized_vocabulary_is_checked_on_the_shared_tokens(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for size in (40, 100):
        arguments = ["from-hf", str(original), "--output", str(tmp_path / str(size)), "--resize-vocab", str(size), "--check"]
        assert main(arguments) == 0
        printed = capsys.readouterr()
        assert "checked with transformers" in printed.out
        assert ("the tokenizer has 61 tokens, and the model only the first 40" in printed.err) == (size == 40)


def test_a_model_that_no_family_covers_is_refused_with_what_the_nearest_one_lacks(
    ranks: Pool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = tiny_config(
        model={"attention_softcap": 5.0},
        data={"train": corpus(tmp_path)},
        training={"steps": 1, "micro_batch_size": 2, "global_batch_size": 8},
        checkpoint={"dir": str(tmp_path / "checkpoints")},
    )
    ranks.run(1, run_trainer, config)
    arguments = ["to-hf", tmp_path / "checkpoints", "--output", tmp_path / "hf"]
    line = error(capsys, *arguments)
    assert "the nearest family of Hugging Face, GPT2LMHeadModel has no counterpart for model.attention_softcap 5.0" in line
    assert "LlamaForCausalLM has no counterpart for" in error(capsys, *arguments, "--family", "llama")
    assert not (tmp_path / "hf").exists()


def test_the_nearest_family_of_a_model_with_an_encoder_has_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = write_random(tmp_path / "own", "byte", 257, **{**T5, "norm": "layernorm"})
    line = error(capsys, "to-hf", checkpoint, "--output", tmp_path / "hf")
    assert "the nearest family of Hugging Face, T5ForConditionalGeneration has no counterpart for model." in line


def test_wrong_arguments_are_errors_of_one_line(
    original: Path, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert "no such folder" in error(capsys, "from-hf", tmp_path / "gone", "--output", tmp_path / "out")
    assert "no checkpoint here" in error(capsys, "to-hf", tmp_path / "gone", "--output", tmp_path / "out")
    assert "is a file" in error(capsys, "from-hf", original, "--output", original / "config.json")
    assert "--resize-vocab 1: expected 2" in error(
        capsys, "from-hf", original, "--output", tmp_path / "out", "--resize-vocab", "1"
    )
    assert "--max-file-bytes 5: expected" in error(
        capsys, "to-hf", imported, "--output", tmp_path / "out", "--max-file-bytes", "5"
    )
    (tmp_path / "file").touch()
    assert "cannot be written" in error(capsys, "to-hf", imported, "--output", tmp_path / "file" / "out")
    assert error(capsys, "from-hf", original, "--output", tmp_path / "file" / "out")
