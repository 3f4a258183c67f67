"""tools/quickstart.py: choice of the text, order of the steps, check of the result; its commands are replaced by stubs."""

import json
import math
import struct
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megagpt.commands import quickstart, quickstart_steps, quickstart_text, train_tokenizer
from megagpt.data.tokenizer import load_tokenizer
from megagpt.errors import DataError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run each test in a folder without runs/quickstart."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_corpus(prefix: Path, sequences: list[list[int]]) -> None:
    """Write one document per sequence, as uint16 tokens in Megatron's .bin/.idx format, without using megagpt."""
    sizes = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * 2
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1)
    Path(f"{prefix}.idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + np.arange(len(sizes) + 1).tobytes())
    Path(f"{prefix}.bin").write_bytes(np.concatenate(sequences).astype(np.uint16).tobytes())


def test_the_default_text_is_the_standard_library_without_its_tests() -> None:
    documents = quickstart_text.read_documents(None)
    assert quickstart_text.MIN_CHARACTERS < sum(map(len, documents)) <= quickstart_text.MAX_CHARACTERS
    library = Path(sysconfig.get_path("stdlib"))
    chosen = set(documents)
    modules = [path for path in library.glob("[a-z]*.py") if path.read_bytes().decode() in chosen]
    assert len(modules) > 50
    assert not [path for path in library.glob("**/test/test_j*.py") if path.read_bytes().decode() in chosen]


def test_the_documents_are_the_same_in_every_run() -> None:
    assert quickstart_steps.text_hash(quickstart_text.read_documents(None)) == quickstart_steps.text_hash(
        quickstart_text.read_documents(None)
    )


def test_the_hash_depends_on_the_documents_and_their_order() -> None:
    hashes = {quickstart_steps.text_hash(documents) for documents in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"])}
    assert len(hashes) == 4
    assert quickstart_steps.text_hash(["ab", "c"]) in hashes


def test_a_large_file_is_divided_into_documents_that_have_all_its_lines(tmp_path: Path) -> None:
    lines = [f"line {number} of a text with an é\n" for number in range(10_000)]
    (tmp_path / "text.txt").write_text("".join(lines))
    documents = quickstart_text.read_documents(tmp_path / "text.txt")
    assert len(documents) > 100
    assert sorted(line for document in documents for line in document.splitlines(keepends=True)) == sorted(lines)


def test_files_of_a_folder_that_are_not_text_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "good.txt").write_text("a good line\n" * 20_000)
    (tmp_path / "text" / "zeros.bin").write_bytes(b"\0" * 1000)
    (tmp_path / "text" / "latin.txt").write_bytes("é".encode("latin-1") * 1000)
    assert set("".join(quickstart_text.read_documents(tmp_path / "text"))) == set("a good line\n")


def test_a_file_longer_than_the_limit_can_be_cut_within_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart_text, "MAX_CHARACTERS", 4)
    (tmp_path / "text.txt").write_text("abcé")
    assert quickstart_text.read_text(tmp_path / "text.txt") == "abc"


def test_a_text_that_is_missing_or_too_short_is_refused_with_the_needed_length(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        quickstart_text.read_documents(tmp_path / "nowhere")
    (tmp_path / "short.txt").write_text("too little")
    with pytest.raises(DataError, match=r"short\.txt: 10 characters of UTF-8 text; at least 200,000 are needed"):
        quickstart_text.read_documents(tmp_path / "short.txt")


def test_the_prompts_are_the_most_frequent_beginnings_of_lines_of_the_text() -> None:
    code = "def __init__(self, a):\n    pass\n" * 3 + "class Example(Base): ...\n\n" + "import os, sys and re\n" * 2
    assert quickstart_text.choose_prompts([code, "12345 67890 12345\n" * 9]) == ("def __init__(self,", "import os,")
    play = ["KING RICHARD III:\nNow is the winter\n", "KING RICHARD III:\n", "The winter of it\n", "The winter of us\n"]
    assert quickstart_text.choose_prompts(play) == ("KING RICHARD", "The winter")


def test_the_prompts_of_a_text_without_spaces_are_its_first_characters() -> None:
    line = "却说司马懿在" + "天" * 50
    assert quickstart_text.choose_prompts([line, line, "且说曹操引军" + "地" * 50]) == ("却说司马懿在", "且说曹操引军")


def test_a_text_without_any_usual_line_gets_its_own_start_as_the_prompt() -> None:
    assert quickstart_text.choose_prompts(["a\nb\n"]) == ("a\nb", "a\nb")


def test_a_chinese_text_gets_a_vocabulary_that_its_tokenizer_can_have(tmp_path: Path) -> None:
    """A few thousand equally frequent characters: the default vocabulary has no room for them at any coverage."""
    characters = np.random.default_rng(0).integers(0x4E00, 0x4E00 + 4000, 300_000)
    (tmp_path / "chinese.txt").write_text("".join(map(chr, characters)).replace("一", "\n"), encoding="utf-8")
    documents = quickstart_text.read_documents(tmp_path / "chinese.txt")
    quickstart.FOLDER.prepare(documents)
    train = ["--input", str(quickstart.FOLDER.text), "--output", str(quickstart.FOLDER.tokenizer), "--vocab-size"]
    size = train_tokenizer.vocab_size_for(documents, quickstart_steps.MIN_VOCAB_SIZE)
    assert train_tokenizer.main([*train, str(quickstart_steps.MIN_VOCAB_SIZE)]) == 2
    assert train_tokenizer.main([*train, str(size)]) == 0
    tokenizer = load_tokenizer(f"{quickstart.FOLDER.tokenizer}.model")
    assert tokenizer.vocab_size == size
    (ids,) = tokenizer.encode_batch([documents[0]])
    assert tokenizer.decode(ids) == documents[0]
    assert len(ids) < 1.1 * len(documents[0])  # characters, not bytes


def test_a_second_run_keeps_only_the_tokens_and_only_of_the_same_text() -> None:
    documents = ["one\n", "two\n"]
    assert not quickstart.FOLDER.prepare(documents)
    assert [path.read_text() for path in sorted(quickstart.FOLDER.text.iterdir())] == documents
    quickstart.FOLDER.text_hash.write_text(quickstart_steps.text_hash(documents))
    quickstart.FOLDER.metrics.write_text("old")
    quickstart.FOLDER.checkpoints.mkdir()
    assert quickstart.FOLDER.prepare(documents)
    assert len(list(quickstart.FOLDER.text.iterdir())) == 2
    assert not quickstart.FOLDER.metrics.exists()
    assert not quickstart.FOLDER.checkpoints.exists()
    assert not quickstart.FOLDER.prepare(["other\n"])
    assert not quickstart.FOLDER.text_hash.exists()


def test_the_unigram_entropy_of_equally_frequent_tokens_is_the_logarithm_of_their_number(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [[5, 6], [7, 8, 5, 6, 7, 8], [8, 7, 6, 5]])
    tokens, entropy = quickstart_steps.corpus_entropy(tmp_path / "corpus")
    assert tokens == 12
    assert entropy == pytest.approx(math.log(4))


def test_the_unigram_entropy_of_tokens_in_the_ratio_3_to_1_is_that_of_the_formula(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [[1, 1], [1, 9]])
    assert quickstart_steps.corpus_entropy(tmp_path / "corpus")[1] == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def test_the_loss_is_that_of_the_last_evaluation(tmp_path: Path) -> None:
    records = [{"step": 1, "loss": 9.0}, {"step": 2, "eval_loss": 5.0}, {"step": 4, "eval_loss": 4.0}, {"step": 4, "loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert quickstart_steps.last_eval_loss(tmp_path / "metrics.jsonl") == 4.0
    with pytest.raises(quickstart_steps.StepError, match=r"none\.jsonl: no line with eval_loss"):
        quickstart_steps.last_eval_loss(tmp_path / "none.jsonl")


def test_a_failed_step_shows_the_end_of_its_output_and_names_its_log_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quickstart.FOLDER.logs.mkdir(parents=True)
    (tmp_path / "broken.py").write_text("import sys\nprint('why it failed')\nsys.exit(3)\n")
    with pytest.raises(quickstart_steps.StepError, match=r"'Break' failed with exit code 3; its full output: .*broken\.log"):
        quickstart.FOLDER.run("Break", "python broken.py --flag 'two words'")
    shown = capfd.readouterr()
    assert "Break: python broken.py --flag 'two words'" in shown.out
    assert "why it failed" in shown.err
    assert (quickstart.FOLDER.logs / "broken.log").read_text() == "why it failed\n"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose commands only record that they were called; its training writes the file `loss` as its metrics."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.json").touch()
    (tmp_path / "text.txt").write_text("a line of text\n" * 20_000)
    write_corpus(tmp_path / "ready", [[0, 1, 2, 3] * 5])
    record = "import sys, shutil, pathlib\nwith open('calls', 'a') as file: file.write(pathlib.Path(sys.argv[0]).stem + ' ')\n"
    copy = "for end in '.bin', '.idx': shutil.copy('ready' + end, 'runs/quickstart/data/corpus_text_document' + end)\n"
    for name in ("train_tokenizer", "preprocess_data", "generate_text", "plot_losses"):
        (tmp_path / "tools" / f"{name}.py").write_text(record + (copy if name == "preprocess_data" else ""))
    (tmp_path / "pretrain_gpt.py").write_text(record + "shutil.copy('loss', 'runs/quickstart/metrics.jsonl')\n")
    (tmp_path / "deepspeed").write_text('#!/bin/sh\nshift 4\nexec python "$@"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"
    monkeypatch.setattr(quickstart_steps, "child_environment", lambda: {"PATH": path})
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    return tmp_path


def test_all_steps_run_and_a_second_time_those_of_the_text_are_left_out(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (clone / "loss").write_text('{"step": 1, "eval_loss": 1.0}\n')
    assert quickstart.main(["--text", "text.txt"]) == 0
    assert (clone / "calls").read_text().split() == [
        "train_tokenizer", "preprocess_data", "pretrain_gpt", "generate_text", "plot_losses",
    ]  # fmt: skip
    printed = capfd.readouterr().out
    assert "held-out loss 1.000 nats per token, unigram entropy 1.386" in printed
    assert "\nDone in " in printed and "a GPT with held-out loss 1.000" in printed
    (clone / "calls").unlink()
    assert quickstart.main(["--text", "text.txt"]) == 0
    assert (clone / "calls").read_text().split() == ["pretrain_gpt", "generate_text", "plot_losses"]


def test_the_quickstart_fails_if_the_model_has_not_learned_from_context(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (clone / "loss").write_text('{"step": 1, "eval_loss": 1.35}\n')
    assert quickstart.main(["--text", "text.txt"]) == 2
    assert "error: the held-out loss 1.350 is not below 95% of the unigram entropy 1.386" in capfd.readouterr().err


def test_the_quickstart_ends_at_the_first_step_that_fails(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (clone / "tools" / "preprocess_data.py").write_text("raise SystemExit('preprocess_data: no such tokenizer')")
    assert quickstart.main(["--text", "text.txt"]) == 2
    assert "preprocess_data: no such tokenizer" in capfd.readouterr().err
    assert (clone / "calls").read_text().split() == ["train_tokenizer"]
