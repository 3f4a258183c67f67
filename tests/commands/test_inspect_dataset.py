"""tools/inspect_dataset.py reports to people and to programs; an error is one line with exit code 2."""

import json
from pathlib import Path

import numpy as np
import pytest

from megagpt.commands import inspect_dataset
from megagpt.commands.inspect_dataset import piece_of
from megagpt.data.indexed import IndexedWriter
from megagpt.data.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
MEGATRON = SHARED / "megatron_indexed"
TEXTS = ["abcabca\n", "", "\U0001f600" * 30, "no end"]
"""Documents of bytes: the first and the third end with the end-of-document token, the second is empty."""


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        for text, end in zip(TEXTS, ([256], [], [256], []), strict=True):
            writer.add_document([*text.encode(), *end])
    return str(tmp_path / "a")


def test_the_report_has_sizes_lengths_frequencies_and_samples(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_dataset.main([prefix, "--tokenizer", "byte", "--top", "6", "--samples", "9", "--width", "8"]) == 0
    printed = capsys.readouterr().out
    rows = dict(line[2:].split("  ", 1) for line in printed.splitlines()[1:9])
    assert {name: value.strip() for name, value in rows.items()} == {
        "files": ".bin 272 bytes, .idx 122 bytes",
        "type": "uint16",
        "sequences": "4",
        "documents": "4, 1 of them empty",
        "tokens": "136",
        "tokens per document": "min 0, median 7.5, mean 34.0, p95 104.2, max 121",
        "token ids": "10 to 256, 14 distinct",
        "end of document": "ends 2 of 4 documents (50.0%)",
    }
    tokens = [line.split() for line in printed.split("most frequent tokens\n")[1].split("\n\n")[0].splitlines()]
    assert tokens == [
        ["id", "count", "share", "piece"],
        *([str(byte), "30", "22.06%", "'\ufffd'"] for byte in sorted("\U0001f600".encode())),
        ["97", "3", "2.21%", "'a'"],
        ["98", "2", "1.47%", "'b'"],
    ]
    assert printed.endswith(
        "document 0, 9 tokens\n  'abcabca\\n'\n\n"
        "document 1, 0 tokens\n  ''\n\n"
        "document 2, 121 tokens\n  '" + "\U0001f600" * 8 + "'...\n\n"
        "document 3, 6 tokens\n  'no end'\n"
    )


def test_json_has_the_same_values(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_dataset.main([prefix, "--tokenizer", "byte", "--top", "1", "--samples", "1", "--width", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "prefix": prefix,
        "bin_bytes": 272,
        "idx_bytes": 122,
        "dtype": "uint16",
        "sequences": 4,
        "documents": 4,
        "empty_documents": 1,
        "tokens": 136,
        "tokens_per_document": {"min": 0, "median": 7.5, "mean": 34.0, "p95": pytest.approx(104.2), "max": 121},
        "smallest_id": 10,
        "largest_id": 256,
        "distinct_ids": 14,
        "most_frequent": [{"id": 128, "count": 30, "share": 30 / 136, "piece": "\ufffd"}],
        "eod_id": 256,
        "documents_ending_in_eod": 2,
        "samples": [{"document": 0, "tokens": 9, "text": "abc", "cut": True}],
    }


def test_without_a_tokenizer_nothing_is_decoded(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_dataset.main([prefix, "--vocab-size", "257"]) == 0
    printed = capsys.readouterr().out
    assert "piece" not in printed and "end of document" not in printed


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
def test_a_piece_is_the_text_that_the_token_adds_to_other_text() -> None:
    tokenizer = load_tokenizer(str(SHARED / "spm" / "test_model.model"))
    pieces = [piece_of(tokenizer, token) for token in tokenizer.encode("the thethe.")]
    assert "".join(pieces) == " the thethe." and pieces[0] == " the"


@pytest.mark.skipif(not MEGATRON.exists(), reason="../shared is absent")
def test_a_pair_written_by_megatron_is_reported_correctly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(MEGATRON / f"gpt2-tiny-{name}")
    arguments = [str(MEGATRON / "meg-gpt2-openwebtext_text_document"), "--tokenizer", str(tmp_path), "--samples", "2", "--json"]
    assert inspect_dataset.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    tokens = np.fromfile(MEGATRON / "meg-gpt2-openwebtext_text_document.bin", np.uint16)
    ids, counts = np.unique(tokens, return_counts=True)
    assert (report["tokens"], report["distinct_ids"], report["largest_id"]) == (len(tokens), len(ids), ids[-1])
    assert [token["count"] for token in report["most_frequent"]] == np.sort(counts)[::-1][:10].tolist()
    assert report["documents_ending_in_eod"] == report["documents"] == 1000
    assert [token["piece"] for token in report["most_frequent"]][:3] == [",", " the", "\n"]
    assert report["samples"][0]["text"].startswith("A magazine supplement with an image of Adolf Hitler")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--vocab-size", "256"],
            "a: 2 of 136 token ids are outside the vocabulary of 256, the first is 256, at position 8 of sequence 0",
        ),
        (["--vocab-size", "0"], "--vocab-size 0: expected 1 to"),
        (["--tokenizer", "gone.model"], "gone.model: no such tokenizer"),
        (["--samples", "1"], "--samples 1: needs a --tokenizer"),
        (["--top", "-1"], "--top -1: expected 0 or more"),
        (["--tokenizer", "byte", "--width", "0"], "--width 0: expected 1 or more"),
    ],
)
def test_a_wrong_argument_or_token_id_is_reported_in_one_line(
    arguments: list[str], message: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect_dataset.main([prefix, *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize(
    "suffix, keep, message",
    [
        (".bin", 100, "a.bin: 100 bytes, shorter than the 272 that a.idx describes"),
        (".idx", 100, "a.idx: 100 bytes, but its header describes 122: it is truncated"),
        (".idx", 0, "a.idx: not an index file in Megatron's format"),
    ],
)
def test_a_damaged_pair_is_reported_in_one_line(
    suffix: str, keep: int, message: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path(f"{prefix}{suffix}").open("r+b") as file:
        file.truncate(keep)
    assert inspect_dataset.main([prefix]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
