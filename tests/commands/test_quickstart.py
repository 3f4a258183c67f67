"""The parts of the quickstart that choose the text and judge the result; the recipe as a whole is `make quickstart`."""

import json
import math
import struct
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megagpt.commands import quickstart
from megagpt.errors import DataError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs where runs/quickstart does not exist yet."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_corpus(prefix: Path, sequences: list[list[int]]) -> None:
    """One document for each sequence, uint16, in the Megatron .bin/.idx format, byte by byte."""
    sizes = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * 2
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1)
    Path(f"{prefix}.idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + np.arange(len(sizes) + 1).tobytes())
    Path(f"{prefix}.bin").write_bytes(np.concatenate(sequences).astype(np.uint16).tobytes())


def test_the_standard_library_gives_documents_of_code_without_its_tests() -> None:
    documents = quickstart.read_documents(None)
    assert quickstart.MIN_CHARACTERS < sum(map(len, documents)) <= quickstart.MAX_CHARACTERS
    library = Path(sysconfig.get_path("stdlib"))
    chosen = set(documents)
    modules = [path for path in library.glob("[a-z]*.py") if path.read_bytes().decode() in chosen]
    assert len(modules) > 50
    assert not [path for path in library.glob("**/test/test_j*.py") if path.read_bytes().decode() in chosen]


def test_the_documents_are_the_same_in_every_run() -> None:
    assert quickstart.fingerprint(quickstart.read_documents(None)) == quickstart.fingerprint(quickstart.read_documents(None))


def test_one_large_file_is_cut_into_documents_that_lose_nothing(tmp_path: Path) -> None:
    lines = [f"line {number} of a text with an é\n" for number in range(10_000)]
    (tmp_path / "text.txt").write_text("".join(lines))
    documents = quickstart.read_documents(tmp_path / "text.txt")
    assert len(documents) > 100
    assert sorted(line for document in documents for line in document.splitlines(keepends=True)) == sorted(lines)


def test_a_folder_is_read_without_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "good.txt").write_text("a good line\n" * 20_000)
    (tmp_path / "text" / "zeros.bin").write_bytes(b"\0" * 1000)
    (tmp_path / "text" / "latin.txt").write_bytes("é".encode("latin-1") * 1000)
    assert set("".join(quickstart.read_documents(tmp_path / "text"))) == set("a good line\n")


def test_a_file_longer_than_the_limit_may_end_within_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "MAX_CHARACTERS", 4)
    (tmp_path / "text.txt").write_text("abcé")
    assert quickstart.read_text(tmp_path / "text.txt") == "abc"


def test_text_that_is_missing_or_short_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        quickstart.read_documents(tmp_path / "nowhere")
    (tmp_path / "short.txt").write_text("too little")
    with pytest.raises(DataError, match=r"short\.txt: 10 characters of UTF-8 text; at least 200,000 are needed"):
        quickstart.read_documents(tmp_path / "short.txt")


def test_a_second_run_keeps_the_tokens_of_the_same_text_alone() -> None:
    documents = ["one\n", "two\n"]
    assert not quickstart.prepare_folder(documents)
    assert [path.read_text() for path in sorted(quickstart.SOURCES.iterdir())] == documents
    quickstart.FINGERPRINT.write_text(quickstart.fingerprint(documents))
    quickstart.METRICS.write_text("old")
    quickstart.CHECKPOINTS.mkdir()
    assert quickstart.prepare_folder(documents)
    assert not quickstart.METRICS.exists()
    assert not quickstart.CHECKPOINTS.exists()
    assert not quickstart.prepare_folder(["other\n"])
    assert not quickstart.FINGERPRINT.exists()


def test_the_unigram_entropy_of_equally_frequent_tokens_is_the_logarithm_of_their_number(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [[5, 6], [7, 8, 5, 6, 7, 8], [8, 7, 6, 5]])
    tokens, entropy = quickstart.unigram_entropy(tmp_path / "corpus")
    assert tokens == 12
    assert entropy == pytest.approx(math.log(4))


def test_the_unigram_entropy_of_three_to_one_is_that_of_the_formula(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [[1, 1], [1, 9]])
    assert quickstart.unigram_entropy(tmp_path / "corpus")[1] == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def test_the_last_evaluation_counts(tmp_path: Path) -> None:
    records = [{"step": 1, "loss": 9.0}, {"step": 2, "eval_loss": 5.0}, {"step": 4, "eval_loss": 4.0}, {"step": 4, "loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert quickstart.last_eval_loss(tmp_path / "metrics.jsonl") == 4.0
    with pytest.raises(quickstart.StepError, match=r"none\.jsonl: no line with eval_loss"):
        quickstart.last_eval_loss(tmp_path / "none.jsonl")


def test_a_step_that_fails_shows_its_output_and_names_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quickstart.LOGS.mkdir(parents=True)
    (tmp_path / "broken.py").write_text("import sys\nprint('why it failed')\nsys.exit(3)\n")
    with pytest.raises(quickstart.StepError, match=r"'Break' failed with exit code 3; all its output: .*broken\.log"):
        quickstart.run("Break", "python broken.py --flag 'two words'")
    shown = capfd.readouterr()
    assert "Break: python broken.py --flag 'two words'" in shown.out
    assert "why it failed" in shown.err
    assert (quickstart.LOGS / "broken.log").read_text() == "why it failed\n"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose scripts only record that they were called; its training reports the loss in the file `loss`."""
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
    (tmp_path / "deepspeed").write_text('#!/bin/sh\nshift 2\nexec python "$@"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"
    monkeypatch.setattr(quickstart, "environment", lambda: {"PATH": path})
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    return tmp_path


def test_the_recipe_runs_every_step_and_the_second_time_not_those_of_the_text(
    clone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (clone / "loss").write_text('{"step": 1, "eval_loss": 1.0}\n')
    assert quickstart.main(["--text", "text.txt"]) == 0
    assert (clone / "calls").read_text().split() == [
        "train_tokenizer", "preprocess_data", "pretrain_gpt", "generate_text", "plot_losses",
    ]  # fmt: skip
    assert "held-out loss 1.000 nats per token, unigram entropy 1.386" in capfd.readouterr().out
    (clone / "calls").unlink()
    assert quickstart.main(["--text", "text.txt"]) == 0
    assert (clone / "calls").read_text().split() == ["pretrain_gpt", "generate_text", "plot_losses"]


def test_the_recipe_fails_where_the_model_has_learned_little(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (clone / "loss").write_text('{"step": 1, "eval_loss": 1.3}\n')
    assert quickstart.main(["--text", "text.txt"]) == 1
    assert "quickstart: the held-out loss 1.300 is not below 90% of the unigram entropy 1.386" in capfd.readouterr().err


def test_the_recipe_ends_at_the_first_step_that_fails(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (clone / "tools" / "preprocess_data.py").write_text("raise SystemExit('preprocess_data: no such tokenizer')")
    assert quickstart.main(["--text", "text.txt"]) == 1
    assert "preprocess_data: no such tokenizer" in capfd.readouterr().err
    assert (clone / "calls").read_text().split() == ["train_tokenizer"]
