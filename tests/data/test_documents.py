"""Documents against Python's own split and json; what cannot be read is named, or left out and counted."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from megagpt.commands import preprocess_data, train_tokenizer
from megagpt.data.documents import input_files, read_documents
from megagpt.data.indexed import IndexedCorpus
from megagpt.data.preprocess import preprocess
from megagpt.data.tokenizer import ByteTokenizer
from megagpt.errors import DataError


class KilledTokenizer(ByteTokenizer):
    """Ends its process as the kernel does that of one which takes too much memory."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def test_a_separator_cuts_plain_text_as_split_does_even_across_blocks(tmp_path: Path) -> None:
    text = "x" * (2**20 - 1) + "<->" + "é\r\n" * 5 + "<-><-" + "y" * 2**20
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert [document["text"] for document in read_documents(path, ["text"], "<->")] == text.split("<->")


def test_a_folder_is_all_its_files_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/z.txt", "a.txt", "b/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("t")
    assert [str(path.relative_to(tmp_path)) for path in input_files([str(tmp_path)])] == ["a.txt", "b/c.txt", "b/z.txt"]


def test_unreadable_documents_are_left_out_and_counted_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(b'{"text": "ab"}\n{"text": 3}\n\n[1]\n{"text": "\xff"}\n' + json.dumps({"text": "é"}).encode())
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    arguments = ["--input", "a.jsonl", "latin.txt", "--tokenizer", "byte", "--output-prefix", "o", "--on-error", "skip"]
    assert preprocess_data.main(arguments) == 0
    corpus = IndexedCorpus("o_text_document")
    assert [bytes(corpus.read(i).astype("uint8")).decode() for i in range(len(corpus.sizes))] == ["ab", "é"]
    output = capsys.readouterr()
    assert "4 unreadable ones skipped" in output.out
    assert all(f"a.jsonl:{line}: " in output.err for line in (2, 4, 5)) and "latin.txt: not UTF-8" in output.err


def test_keys_are_refused_for_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("t")
    with pytest.raises(DataError, match="plain text has no keys"):
        list(read_documents(tmp_path / "a.txt", ["content"]))


def test_every_key_gets_its_own_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "t", "body": "one"}\n{"title": "uu", "body": ""}\n')
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--json-keys", "title", "body", "--tokenizer", "byte"]
    assert preprocess_data.main([*arguments, "--output-prefix", str(tmp_path / "o")]) == 0
    assert IndexedCorpus(tmp_path / "o_title_document").sizes.tolist() == [1, 2]
    assert IndexedCorpus(tmp_path / "o_body_document").sizes.tolist() == [3]


def test_input_without_a_token_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", "byte", "--output-prefix", str(tmp_path / "out" / "o")]
    assert preprocess_data.main(arguments) == 2
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_worker_ends_the_run_with_a_reason_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="killed, probably for want of memory"):
        preprocess([tmp_path / "a.txt"], KilledTokenizer, str(tmp_path / "out" / "o"), ["text"], False, workers=2)
    assert not list((tmp_path / "out").iterdir())


def test_a_sampled_training_makes_the_same_tokenizer_again(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text(Path(__file__).read_text() + Path(json.__file__).read_text())
    for name in "ab":
        arguments = ["--input", str(source), "--output", str(tmp_path / name), "--vocab-size", "400", "--max-sentences", "120"]
        assert train_tokenizer.main(arguments) == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_a_broken_line_under_training_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a b c"}\n{"tex": 1}\n')
    assert (
        train_tokenizer.main(["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "t"), "--vocab-size", "300"])
        == 2
    )
    error = capsys.readouterr().err
    assert "a.jsonl:2: " in error and error.count("\n") == 1
    assert not (tmp_path / "t.model").exists()
