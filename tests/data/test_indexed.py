"""The index file against bytes laid out by hand; every kind of damage is told by its own sentence."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megagpt.data import indexed
from megagpt.data.indexed import IndexedCorpus, IndexedWriter, check_corpus, token_dtype
from megagpt.errors import DataError


def by_hand(
    prefix: Path, version: int = 1, code: int = 4, offsets: tuple[int, ...] = (0, 12), bounds: tuple[int, ...] = (0, 1, 2)
) -> None:
    """Documents [1, 2, 3] and [70000, 5] as int32."""
    prefix.with_suffix(".bin").write_bytes(struct.pack("<5i", 1, 2, 3, 70000, 5))
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", version, code, 2, 3) + struct.pack("<2i", 3, 2)
    prefix.with_suffix(".idx").write_bytes(index + struct.pack("<2q", *offsets) + struct.pack("<3q", *bounds))


def test_bytes_laid_out_by_hand_are_read_and_written_alike(tmp_path: Path) -> None:
    by_hand(tmp_path / "a")
    corpus = IndexedCorpus(tmp_path / "a")
    assert (corpus.n_tokens, corpus.sizes.tolist(), corpus.document_indices.tolist()) == (5, [3, 2], [0, 1, 2])
    assert corpus.read(1).tolist() == [70000, 5] and corpus.read(0, 1, 1).tolist() == [2]
    with IndexedWriter(tmp_path / "b", np.int32) as writer:
        writer.add_document([1, 2, 3])
        writer.add_documents(np.array([70000, 5]), [2])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"version": 2}, "version 2 of the index format"),
        ({"code": 7}, "dtype code 7 is not one of tokens"),
        ({"code": 99}, "dtype code 99 is not one of tokens"),
        ({"offsets": (0, 8)}, "sizes and offsets contradict"),
        ({"bounds": (0, 1, 7)}, "do not cover its 2 sequences"),
    ],
)
def test_a_header_or_table_that_is_wrong_is_told(tmp_path: Path, wrong: dict, message: str) -> None:
    by_hand(tmp_path / "a", **wrong)
    with pytest.raises(DataError, match=message):
        IndexedCorpus(tmp_path / "a")


def test_the_bin_of_another_corpus_is_told(tmp_path: Path) -> None:
    by_hand(tmp_path / "a")
    (tmp_path / "a.bin").write_bytes(b"\0" * 16)
    with pytest.raises(DataError, match="16 bytes, shorter than the 20"):
        IndexedCorpus(tmp_path / "a")


def test_a_missing_corpus_names_the_nearest(tmp_path: Path) -> None:
    by_hand(tmp_path / "corpus_text_document")
    with pytest.raises(DataError, match="nearest prefix there: .*corpus_text_document"):
        IndexedCorpus(tmp_path / "corpus_text_documents")


def test_an_id_that_does_not_fit_is_refused_and_an_older_pair_survives(tmp_path: Path) -> None:
    by_hand(tmp_path / "a")
    before = (tmp_path / "a.bin").read_bytes()
    with (
        pytest.raises(DataError, match="token id 65536 does not fit uint16"),
        IndexedWriter(tmp_path / "a", np.uint16) as writer,
    ):
        writer.add_document([65536])
    assert (tmp_path / "a.bin").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("place", [0, 4, 8])
def test_one_id_above_the_vocabulary_is_found_wherever_it_stands(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_CHECK_TOKENS", 2)
    tokens = [5] * 9
    tokens[place] = 700
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(tokens)
    check_corpus(IndexedCorpus(tmp_path / "a"), 701)
    with pytest.raises(DataError, match=r"a: token id 700, but the vocabulary has the ids 0 to 699"):
        check_corpus(IndexedCorpus(tmp_path / "a"), 700)


def test_a_negative_id_is_found(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        writer.add_document([5, -1, 5])
    with pytest.raises(DataError, match="token id -1"):
        check_corpus(IndexedCorpus(tmp_path / "a"), 700)


def test_of_a_very_large_corpus_the_check_reads_an_even_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_CHECK_TOKENS", 10)
    seen: list[int] = []
    monkeypatch.setattr(indexed, "check_ids", lambda tokens, *rest: seen.extend(tokens.tolist()))
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(range(1000))
    check_corpus(IndexedCorpus(tmp_path / "a"), 60_000, most_bytes=200)
    assert len(seen) <= 110 and max(np.diff(sorted({0, *seen, 999}))) <= 101


def test_tokens_take_two_bytes_below_megatron_s_limit() -> None:
    assert [token_dtype(size).name for size in (65499, 65500)] == ["uint16", "int32"]


def test_a_file_cut_short_while_it_is_open_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    by_hand(tmp_path / "a")
    corpus = IndexedCorpus(tmp_path / "a")
    os.truncate(tmp_path / "a.bin", 2)
    with pytest.raises(DataError, match=r"a.bin: ends before byte \d+: it was cut short since it was opened"):
        for sequence in range(len(corpus.sizes)):
            corpus.read(sequence)


def test_a_disk_that_fills_ends_in_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """No file may grow beyond 4,000 bytes, as on a disk with so much left."""
    code = (
        "import resource; from megagpt.data.indexed import IndexedWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        f"with IndexedWriter({str(tmp_path / 'a')!r}, 'uint16') as writer:\n"
        "    writer.add_document(range(3000))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "DataError" in done.stderr.splitlines()[-1] and "a.bin: cannot be written: File too large" in done.stderr
    assert not list(tmp_path.iterdir())
