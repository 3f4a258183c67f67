"""tools/preprocess_data.py writes the reference library's ids, in order, for any number of workers."""

import json
import re
from pathlib import Path

import pytest

from megagpt.commands import preprocess_data
from megagpt.data.indexed import IndexedCorpus

SHARED = Path(__file__).parents[3] / "shared" / "data"
TEXTS = [
    "Hello world",
    "",
    "Grüße, 世界!\n\ttabs  and   spaces",
    "a" * 300,
    "日本語 \U0001f600 <|endoftext|>",
    "x = {'y': 1}\n",
]


def write_jsonl(folder: Path, lines: int = 40) -> Path:
    """Write a file of JSON lines; some of its texts are empty."""
    path = folder / "corpus.jsonl"
    path.write_text(
        "".join(json.dumps({"text": TEXTS[i % len(TEXTS)] + str(i) * (i % 6 != 1), "n": i}) + "\n" for i in range(lines))
    )
    return path


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def documents_of(prefix: Path) -> list[list[int]]:
    corpus = IndexedCorpus(prefix)
    return [[int(token) for token in corpus.read(i)] for i in range(len(corpus.sizes))]


def test_each_document_ends_with_the_end_of_document_token_and_empty_ones_are_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path)
    arguments = ["--input", str(path), "--tokenizer", "byte", "--output-prefix", str(tmp_path / "o"), "--append-eod"]
    assert preprocess_data.main(arguments) == 0
    texts = texts_of(path)
    assert documents_of(tmp_path / "o_text_document") == [[*text.encode(), 256] for text in texts if text]
    assert f"{texts.count('')} empty ones dropped" in capsys.readouterr().out


def test_the_number_of_workers_does_not_change_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megagpt.data.offline.preprocess.BATCH_BYTES", 200)
    path = write_jsonl(tmp_path, 100)
    for workers in ("1", "3"):
        arguments = ["--input", str(path), "--tokenizer", "byte", "--workers", workers]
        assert preprocess_data.main([*arguments, "--output-prefix", str(tmp_path / workers)]) == 0
    for suffix in (".bin", ".idx"):
        one, three = ((tmp_path / f"{workers}_text_document{suffix}").read_bytes() for workers in "13")
        assert one == three


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
def test_gpt2_ids_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    files = SHARED / "gpt2"
    reference = transformers.GPT2Tokenizer(vocab=str(files / "vocab.json"), merges=str(files / "merges.txt"))
    path = write_jsonl(tmp_path)
    arguments = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(files / "vocab.json")]
    arguments += ["--merge-file", str(files / "merges.txt")]
    assert preprocess_data.main(["--input", str(path), *arguments, "--output-prefix", str(tmp_path / "o")]) == 0
    assert documents_of(tmp_path / "o_text_document") == [
        reference(text, split_special_tokens=True)["input_ids"] for text in texts_of(path) if text
    ]


def test_a_separator_with_escapes_divides_plain_text_into_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\nlines\n\nthree")
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", "byte", "--output-prefix", str(tmp_path / "o")]
    assert preprocess_data.main([*arguments, "--text-separator", r"\n\n"]) == 0
    assert [bytes(document) for document in documents_of(tmp_path / "o_text_document")] == [b"one", b"two\nlines", b"three"]
    assert "only" not in capsys.readouterr().out


def test_a_text_that_is_one_document_is_noted_with_the_flag_that_divides_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", "byte", "--output-prefix", str(tmp_path / "o")]
    assert preprocess_data.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "note: only 1 document: data.split divides by documents" in printed and "--text-separator" in printed
    assert "note: documents do not end with the end-of-document token" in printed and "--append-eod" in printed
    assert f"in a config: data.train or data.paths = {tmp_path}/o_text_document\n" in printed


def test_files_of_a_folder_that_are_not_documents_are_skipped_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    (tmp_path / "in" / "README.md").write_text("about the text")
    arguments = ["--input", str(tmp_path / "in"), "--tokenizer", "byte", "--output-prefix", str(tmp_path / "o")]
    assert preprocess_data.main(arguments) == 0
    assert documents_of(tmp_path / "o_text_document") == [[*b"text"]]
    assert f"skipped 1 files that are not documents: {tmp_path}/in/README.md\n" in capsys.readouterr().out


def test_an_existing_output_is_replaced_only_with_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", "byte", "--output-prefix", str(tmp_path / "o")]
    (tmp_path / "a.txt").write_text("old")
    assert preprocess_data.main(arguments) == 0
    (tmp_path / "a.txt").write_text("new")
    capsys.readouterr()
    assert preprocess_data.main(arguments) == 2
    error = capsys.readouterr().err
    assert "o_text_document.bin: already exists; choose another --output-prefix, or" in error and error.count("\n") == 1
    assert documents_of(tmp_path / "o_text_document") == [[*b"old"]]
    assert preprocess_data.main([*arguments, "--overwrite"]) == 0
    assert documents_of(tmp_path / "o_text_document") == [[*b"new"]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "nowhere*.txt", "--tokenizer", "byte"], "nowhere"),
        (["--input", "broken.jsonl", "--tokenizer", "byte"], "broken.jsonl:2: not valid JSON"),
        (
            ["--input", "broken.jsonl", "--tokenizer", "byte", "--json-keys", "body"],
            "no key 'body'; nearest: 'text'",
        ),
        (["--input", "latin.txt", "--tokenizer", "byte"], "latin.txt: not UTF-8"),
        (["--input", "latin.txt", "--tokenizer", "gone.model"], "gone.model: no such tokenizer"),
        (["--input", "latin.txt"], "set either --tokenizer PATH, or --tokenizer-type"),
        (["--input", "latin.txt", "--tokenizer", "byte", "--split-sentences"], "leave it out"),
        (["--input", "latin.txt", "--tokenizer", "byte", "--text-separator", ""], "--text-separator: is empty"),
        (["--input", "latin.txt", "--tokenizer-type", "GPT2BPETokenizer"], "needs --vocab-file"),
    ],
)
def test_a_wrong_input_is_reported_in_one_line_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    assert preprocess_data.main([*arguments, "--output-prefix", "out/o"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(Path().glob("out/*"))


def chats(folder: Path) -> list[str]:
    """Write an example, and return the arguments of a command that converts it."""
    (folder / "chats.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    return ["--task", "chat", "--input", str(folder / "chats.jsonl"), "--output-prefix", str(folder / "o")]


def test_chats_become_a_pair_and_a_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*chats(tmp_path), "--tokenizer", "byte", "--chat-template", "chatml"]
    assert preprocess_data.main(arguments) == 0
    tokens, mask = documents_of(tmp_path / "o_chat"), documents_of(tmp_path / "o_chat.mask")
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert bytes(tokens[0]).decode() == text
    assert [token for token, learned in zip(tokens[0], mask[0], strict=True) if learned] == list(b"b<|im_end|>\n")
    out = capsys.readouterr().out
    assert 'data.task = "chat"' in out and "1 example, 63 tokens, of which 12 are learned" in out
    assert "note: the tokenizer has no token <|im_start|>, <|im_end|>" in out
    assert preprocess_data.main(arguments) == 2
    assert "o_chat.bin: already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tokenizer", "byte"], "byte: has no chat template"),
        ([], "--tokenizer: is needed; name a tokenizer with a chat template"),
        (["--tokenizer", "byte", "--append-eod"], "--append-eod: is for --task text; leave it out with --task chat"),
        (["--tokenizer", "byte", "--chat-template", "chatlm"], "chatlm: No such file or directory; .*nearest: chatml"),
    ],
)
def test_arguments_that_do_not_fit_the_task_are_refused(
    arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preprocess_data.main([*chats(tmp_path), *arguments]) == 2
    assert re.search(problem, capsys.readouterr().err)


def test_the_text_of_a_special_token_is_the_token_only_if_asked(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a<|endoftext|>b"}\n')
    arguments = ["--input", str(tmp_path / "x.jsonl"), "--tokenizer", "byte", "--output-prefix"]
    assert preprocess_data.main([*arguments, str(tmp_path / "text")]) == 0
    assert preprocess_data.main([*arguments, str(tmp_path / "parsed"), "--parse-special-tokens"]) == 0
    assert documents_of(tmp_path / "text_text_document") == [list(b"a<|endoftext|>b")]
    assert documents_of(tmp_path / "parsed_text_document") == [[ord("a"), 256, ord("b")]]
