"""The generate_text command: text on standard output, notes on standard error, one sentence for what cannot be."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from support.commands import BIN, run_command
from support.encoder_decoder import T5
from support.families import random_model
from support.runs import Tree
from support.saved import rewrite_file
from support.trained import load_trained, write_random

from megagpt.commands.generate_text import main
from megagpt.inference.beam_search import BeamSearch, search
from megagpt.inference.generate import Completion, TextGenerator
from megagpt.inference.prompts import TASKS
from megagpt.inference.sampling import Sampling

POSITIONS = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokens are bytes."""
    return write_random(tmp_path_factory.mktemp("bytes"), "byte", 257)


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
    checkpoint = write_random(tmp_path / "run", str(tmp_path), 400)
    assert generate(checkpoint, "--temperature", "9") == 0
    printed = capsys.readouterr()
    assert set(printed.out.split()) <= set(vocab)
    assert generate(checkpoint, "--prompt", "abc\n  other", "--max-tokens", "1") == 0
    assert capsys.readouterr().out.startswith("abc\n  other")  # the tokenizer has neither the line end nor the word
    assert printed.err == "note: model.vocab_size is 400, and the tokenizer has 4 tokens: ids from 4 on are never generated\n"


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_when_the_prompt_needs_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_random(tmp_path, "byte", 98)
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
    nameless = write_random(tmp_path / "without", None, 257)
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
        (["--top-p", "0"], "--top-p 0: expected a probability"),
        (["--top-p", "nan"], "--top-p nan: expected a probability"),
        (["--min-p", "2"], "--min-p 2: expected 0 to 1"),
        (["--repetition-penalty", "0"], "--repetition-penalty 0: expected a number above 0"),
        (["--batch", "0"], "--batch 0: expected 1 to"),
        (["--stop", ""], "--stop: expected a text"),
        (["--stop", "caf\udce9"], "--stop: byte 0xe9 after 'caf' is not UTF-8"),
        (["--logprobs", "2"], "--logprobs: goes with --prompts"),
        (["--output", "x"], "--output: goes with --prompts"),
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


def test_a_text_that_is_streamed_is_the_same(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--temperature", "3"], ["--temperature", "3", "--top-p", "0.9", "--stop", "e"]):
        assert generate(checkpoint, *arguments, "--max-tokens", "40") == 0
        expected = capsys.readouterr().out
        assert generate(checkpoint, *arguments, "--max-tokens", "40", "--stream") == 0
        assert capsys.readouterr().out == expected


def records_of(checkpoint: Path, file: Path, *arguments: str) -> list[Tree]:
    output = file.with_suffix(".out")
    command = ["--checkpoint", str(checkpoint), "--prompts", str(file), "--output", str(output), "--max-tokens", "5"]
    assert main([*command, *arguments]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_every_prompt_of_a_file_gives_the_text_of_that_prompt_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five prompts of different lengths, two at a time; the records are in the order of the file."""
    prompts = ["abc", "a much longer one than that", "", "x", "caf\u00e9 "]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    records = records_of(checkpoint, tmp_path / "p.jsonl", "--temperature", "0", "--batch", "2")
    assert [record["prompt"] for record in records] == prompts
    assert [record["index"] for record in records] == [0, 1, 2, 3, 4]
    capsys.readouterr()
    for record in records:
        assert record["finish_reason"] == "length" and record["tokens"] == 5
        command = ["--checkpoint", str(checkpoint), "--prompt", record["prompt"], "--temperature", "0", "--max-tokens", "5"]
        assert main(command) == 0
        assert capsys.readouterr().out == f"{record['prompt']}{record['text']}\n"


def test_a_file_of_lines_and_log_probabilities(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("first line\n\nsecond line\n")
    records = records_of(checkpoint, tmp_path / "p.txt", "--logprobs", "2", "--temperature", "0")
    assert [record["prompt"] for record in records] == ["first line", "second line"]
    for token in [token for record in records for token in record["logprobs"]]:
        assert token["top"][0] == {key: token[key] for key in ("token", "id", "logprob")}  # greedy: the most likely one
        assert token["top"][1]["logprob"] <= token["logprob"] < 0
    command = ["--checkpoint", str(checkpoint), "--prompts", str(tmp_path / "p.txt"), "--max-tokens", "2"]
    capsys.readouterr()
    assert main(command) == 0
    assert [json.loads(line)["index"] for line in capsys.readouterr().out.splitlines()] == [0, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "p.jsonl: line 2: not valid JSON"),
        ("p.jsonl", b'{"question": "a"}\n', 'line 1: expected an object with a text under "prompt"'),
        ("p.jsonl", b"[1]\n", 'line 1: expected an object with a text under "prompt"'),
        ("p.txt", b"\n  \n", "p.txt: has no prompts"),
        ("p.txt", b"caf\xe9\n", "p.txt: byte 3 is not UTF-8"),
        ("p.txt", None, "p.txt: No such file or directory; expected a file of prompts"),
    ],
)
def test_a_file_that_has_no_prompts_is_refused(
    name: str, content: bytes | None, message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["--checkpoint", str(checkpoint), "--prompts", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_a_task_puts_examples_before_the_prompt_and_ends_at_a_blank_line(
    task: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    added: list[tuple[str, tuple[str, ...]]] = []
    plain = TextGenerator.add

    def add(self: TextGenerator, prompt: list[int], sampling: Sampling, stop: tuple[str, ...] = ()) -> Completion:
        added.append((self.tokenizer.decode(prompt), tuple(stop)))
        return plain(self, prompt, sampling, stop)

    monkeypatch.setattr(TextGenerator, "add", add)
    assert generate(checkpoint, "--task", task, "--prompt", "the sea\n\nis calm") == 0
    ((prompt, stop),) = added
    *examples, last = prompt.split("\n\n")
    assert len(examples) >= 3 and "the sea\nis calm" in last and stop == ("\n\n",)
    assert last.splitlines()[-1].endswith(":") and examples[-1].count(":") >= 2


def test_a_hugging_face_folder_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the BOS token that its tokenizer adds, and the end token that its generation_config.json declares."""
    transformers = pytest.importorskip("transformers")
    theirs = random_model("llama")
    theirs.generation_config.eos_token_id = [2, 9]
    theirs.save_pretrained(tmp_path)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(61)}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("w1 $A", special_tokens=[("w1", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(tmp_path)
    prompt = tokenizer.encode("w5 w6 w7").ids
    assert prompt == [1, 5, 6, 7]
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(prompt) :]
    assert main(["--checkpoint", str(tmp_path), "--prompt", "w5 w6 w7", "--max-tokens", "12", "--temperature", "0"]) == 0
    expected = [token for token in out.tolist() if token not in (1, 2, 9)]
    assert capsys.readouterr().out.split() == ["w5", "w6", "w7", *(f"w{token}" for token in expected)]


@pytest.mark.launch
def test_ranks_of_torchrun_print_the_text_of_one_process_once(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", checkpoint, "--prompt", "abc", "--temperature", "0"]
    both = run_command(BIN / "torchrun", "--nproc-per-node", "2", "tools/generate_text.py", *arguments, OMP_NUM_THREADS="1")
    assert main([*map(str, arguments)]) == 0
    assert (both.returncode, both.stdout) == (0, capsys.readouterr().out), both.stderr


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


@pytest.fixture(scope="module")
def with_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model with an encoder whose tokens are bytes."""
    return write_random(tmp_path_factory.mktemp("encoder"), "byte", 257, **T5)


def test_a_model_with_an_encoder_writes_targets_by_beam_search(
    with_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One prompt as text, several as records; both are what the search finds, and longer sources lose their end."""
    prompts = ["abc", "a source", "z" * 100]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    arguments = ["--checkpoint", str(with_encoder), "--max-tokens", "5", "--beams", "3", "--length-penalty", "2"]
    assert main([*arguments, "--prompts", str(tmp_path / "prompts.txt"), "--batch", "2"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == prompts
    trained = load_trained(with_encoder)
    how = BeamSearch(beams=3, max_tokens=5, length_penalty=2.0)
    for prompt, record in zip(prompts, records, strict=True):
        source = [*prompt.encode()[:23], 256]
        (found,) = search(trained.encoder_decoder, [source], how, {256}, 257)
        assert record["score"] == pytest.approx(found.score) and record["tokens"] == len(found.tokens)
        assert main([*arguments, "--prompt", prompt]) == 0
        assert capsys.readouterr().out == record["text"] + "\n"


def test_options_for_the_other_kind_of_model_are_errors(
    checkpoint: Path, with_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--beams: needs a model with an encoder" in refused(checkpoint, capsys, "--beams", "2")
    assert "--stream: does not work with a model with an encoder" in refused(with_encoder, capsys, "--stream")
    assert "--beams 0: expected 1 to" in refused(with_encoder, capsys, "--beams", "0")
