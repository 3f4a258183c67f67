"""Documents equal those of Python's own split, json, gzip and of pyarrow; unreadable ones are reported or skipped."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megagpt.commands import preprocess_data, train_tokenizer
from megagpt.data.indexed import IndexedCorpus
from megagpt.data.offline import documents
from megagpt.data.offline.documents import InputFile, input_files, select_input_files, unescape_separator
from megagpt.errors import DataError

TEXTS = ["one", "", "Grüße\u2028 世界\r\n", "\U0001f600" * 50, "x" * 5000, "nul\x00 tab\t"] * 30


def texts_of(path: Path, keys: tuple[str, ...] = ("text",), separator: str | None = None) -> list[str]:
    return [texts[0].decode() for texts in InputFile(path, keys, separator)]


def write(path: Path, kind: str) -> Path:
    """Write TEXTS to a file of the format that the suffixes `kind` name."""
    inner = path.with_suffix("") if kind.endswith((".gz", ".zst")) else path
    if ".parquet" in kind:
        parquet.write_table(pyarrow.table({"n": range(len(TEXTS)), "text": TEXTS}), inner, row_group_size=50)
    elif ".jsonl" in kind:
        inner.write_text("".join(json.dumps({"n": 1, "text": text}, ensure_ascii=False) + "\n" for text in TEXTS))
    else:
        inner.write_bytes("<->".join(TEXTS).encode())
    if kind.endswith(".gz"):
        half = len(inner.read_bytes()) // 2  # two members in one file, as pigz and cat write them
        path.write_bytes(gzip.compress(inner.read_bytes()[:half]) + gzip.compress(inner.read_bytes()[half:]))
    elif kind.endswith(".zst"):
        path.write_bytes(pyarrow.Codec("zstd").compress(inner.read_bytes(), asbytes=True))
    return path


KINDS = [inner + outer for inner in (".jsonl", ".parquet", ".txt") for outer in ("", ".gz", ".zst")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_documents_also_compressed(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.b{kind}", kind)
    file = InputFile(path, ["text"], "<->")
    assert [texts[0].decode() for texts in file] == TEXTS
    assert file.position == path.stat().st_size


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (".jsonl", ".txt")])
def test_a_truncated_file_is_an_error_and_never_a_shorter_corpus(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{kind}", kind)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"a{kind}: "):
        texts_of(path, separator="<->")


@pytest.mark.parametrize("kind", [".jsonl.gz", ".txt.zst", ".parquet"])
def test_a_file_of_another_format_than_its_name_says_is_an_error(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"a{kind}").write_text("plain text, not the format of the name\n" * 10)
    with pytest.raises(DataError, match=rf"a{kind}: "):
        texts_of(tmp_path / f"a{kind}")


def test_a_separator_divides_plain_text_as_split_does_also_across_blocks(tmp_path: Path) -> None:
    text = "x" * (2**20 - 1) + "<->" + "é\r\n" * 5 + "<-><-" + "y" * 2**20
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert texts_of(path, separator="<->") == text.split("<->")
    assert texts_of(path) == [text]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "ab"}\n')
    assert texts_of(tmp_path / "a.txt") == texts_of(tmp_path / "a.jsonl") == ["ab"]


def test_a_file_without_line_ends_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 2**21)
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(b'{"text": "' + b"a" * 2**22)
    with pytest.raises(DataError, match=r"a.jsonl:1: a line longer than 2 MiB"):
        texts_of(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a.txt: a document longer than 2 MiB.*--text-separator"):
        texts_of(tmp_path / "a.txt")


def test_a_folder_gives_all_its_files_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/z.txt", "a.txt", "b/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("t")
    assert [str(path.relative_to(tmp_path)) for path in input_files([str(tmp_path)])] == ["a.txt", "b/c.txt", "b/z.txt"]


def test_a_file_that_is_named_twice_is_read_once_at_its_first_position(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text("t")
    files = input_files([str(tmp_path / "b.txt"), str(tmp_path / "*.txt"), str(tmp_path)])
    assert [path.name for path in files] == ["b.txt", "a.txt"]


def selected_names(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the files of a folder that are selected, and of those that are skipped."""
    selection = select_input_files([str(folder)])
    return [path.name for path in selection.files], [path.name for path in selection.skipped]


def test_files_of_a_folder_that_describe_the_dataset_are_hidden_or_binary_are_skipped(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE", ".hidden.txt", "a.txt.md5", "_SUCCESS", "a.txt", "b", "code.py"):
        (tmp_path / name).write_text("t")
    (tmp_path / "image").write_bytes(b"P\0\0")
    assert selected_names(tmp_path) == (
        ["a.txt", "b", "code.py"],
        [".hidden.txt", "LICENSE", "README.md", "_SUCCESS", "a.txt.md5", "image"],
    )


def test_a_folder_with_json_lines_or_parquet_gives_only_these(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.parquet", "c.JSON", "notes.txt", "script.py"):
        (tmp_path / name).write_text("t")
    assert selected_names(tmp_path) == (["a.jsonl.gz", "b.parquet", "c.JSON"], ["notes.txt", "script.py"])


def test_a_file_that_is_named_itself_is_never_skipped(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("t")
    assert select_input_files([str(tmp_path / "README.md")]).files == [tmp_path / "README.md"]


@pytest.mark.parametrize("name", ["a.JSONL", "a.jsonl.00", "a.jsonl.aa", "a.txt", "a"])
def test_json_lines_are_recognized_by_name_or_content(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"text": "ab"}\n{"text": "c"}\n')
    assert texts_of(tmp_path / name) == ["ab", "c"]


@pytest.mark.parametrize("text", ['{"title": "ab"}\n', "[1]\n", '{"text": broken\n'])
def test_text_whose_first_line_is_no_json_object_with_the_key_stays_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert texts_of(tmp_path / "a.txt") == [text]


def test_a_gzip_file_may_end_with_zero_padding(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text") + b"\0" * 512)
    assert texts_of(tmp_path / "a.txt.gz") == ["text"]


def test_a_key_with_dots_reads_a_nested_value(tmp_path: Path) -> None:
    records = [{"doc": {"body": "ab", "n": 1}}, {"doc": {"body": "c", "n": 2}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.jsonl", ("doc.body",)) == texts_of(tmp_path / "a.parquet", ("doc.body",)) == ["ab", "c"]
    with pytest.raises(DataError, match=r"a.jsonl:1: no key 'doc.title'; nearest: 'doc'"):
        texts_of(tmp_path / "a.jsonl", ("doc.title",))
    with pytest.raises(DataError, match=r"a.parquet: no column 'doc.title': doc has no field 'title'"):
        texts_of(tmp_path / "a.parquet", ("doc.title",))


def test_a_key_that_contains_dots_itself_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"doc.body": "ab", "doc": {"body": "c"}}\n')
    assert texts_of(tmp_path / "a.jsonl", ("doc.body",)) == ["ab"]


@pytest.mark.parametrize(
    "escaped, separator",
    [(r"\n\n", "\n\n"), (r"\\n", "\\n"), (r"\x0c\u2028", "\x0c\u2028"), ("<->", "<->"), ("end\\", "end\\")],
)
def test_escapes_of_a_separator_are_resolved(escaped: str, separator: str) -> None:
    assert unescape_separator(escaped) == separator


@pytest.mark.parametrize("text, message", [("", "is empty"), (r"\q", r"unknown escape \q"), (r"\x1", r"unknown escape \x")])
def test_a_separator_that_is_empty_or_has_an_unknown_escape_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"--text-separator: {message}")):
        unescape_separator(text)


BROKEN: dict[bytes, str] = {
    b'{"text": 3}': "no text under the key 'text'; found a number",
    b"[1]": "expected a JSON object, found a list",
    b'{"text": "\xff"}': "not UTF-8 text: invalid start byte at byte 10",
    b'{"txt": "a"}': "no key 'text'; nearest: 'txt'",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b'{"text": "a"': "not valid JSON",
}


@pytest.mark.parametrize("line", BROKEN)
def test_the_error_for_a_broken_line_says_what_is_wrong(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as raised:
        texts_of(tmp_path / "a.jsonl")
    assert str(raised.value).startswith(f"{tmp_path}/a.jsonl:3: ") and BROKEN[line] in str(raised.value)


def test_unreadable_documents_are_skipped_and_counted_with_on_error_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(b'{"text": "ab"}\n' + b"\n".join(BROKEN) + b"\n" + json.dumps({"text": "é"}).encode())
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    parquet.write_table(pyarrow.table({"text": ["c", None]}), "p.parquet")
    arguments = ["--input", "a.jsonl", "latin.txt", "p.parquet", "--tokenizer", "byte", "--output-prefix", "o"]
    assert preprocess_data.main([*arguments, "--on-error", "skip"]) == 0
    corpus = IndexedCorpus("o_text_document")
    assert [bytes(corpus.read(i).astype("uint8")).decode() for i in range(len(corpus.sizes))] == ["ab", "é", "c"]
    output = capsys.readouterr()
    assert f"{len(BROKEN) + 2} unreadable ones skipped" in output.out
    assert all(f"a.jsonl:{line}: " in output.err for line in range(2, 2 + len(BROKEN)))
    assert "latin.txt: not UTF-8" in output.err and "p.parquet: row 2: no text" in output.err


@pytest.mark.parametrize(
    "column, key, message",
    [
        ([1, 2], "text", r"the column 'text' has no text; found int64"),
        (["a", "b"], "body", r"no column 'body'; nearest: 'text'"),
    ],
)
def test_a_parquet_column_without_text_is_an_error(column: list[Any], key: str, message: str, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / "a.parquet", (key,))


def test_keys_are_refused_for_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("t")
    with pytest.raises(DataError, match="plain text has no keys"):
        texts_of(tmp_path / "a.txt", ("content",))


def test_training_on_a_sample_twice_gives_the_same_tokenizer(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text(Path(__file__).read_text() + Path(json.__file__).read_text())
    for name in "ab":
        arguments = ["--input", str(source), "--output", str(tmp_path / name), "--vocab-size", "400", "--max-sentences", "120"]
        assert train_tokenizer.main(arguments) == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_a_broken_line_in_the_training_text_of_a_tokenizer_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a b c"}\n{"tex": 1}\n')
    assert (
        train_tokenizer.main(["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "t"), "--vocab-size", "300"])
        == 2
    )
    error = capsys.readouterr().err
    assert "a.jsonl:2: " in error and error.count("\n") == 1
    assert not (tmp_path / "t.model").exists()
