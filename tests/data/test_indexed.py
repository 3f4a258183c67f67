"""Index files are compared with bytes packed by hand; every kind of damage has its own error message."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megagpt.data.indexed import IndexedCorpus, IndexedWriter, check_corpus, token_dtype
from megagpt.errors import DataError


def write_by_hand(
    prefix: Path, version: int = 1, code: int = 4, offsets: tuple[int, ...] = (0, 12), bounds: tuple[int, ...] = (0, 1, 2)
) -> None:
    """Write the documents [1, 2, 3] and [70000, 5] as int32, without `IndexedWriter`."""
    prefix.with_suffix(".bin").write_bytes(struct.pack("<5i", 1, 2, 3, 70000, 5))
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", version, code, 2, 3) + struct.pack("<2i", 3, 2)
    prefix.with_suffix(".idx").write_bytes(index + struct.pack("<2q", *offsets) + struct.pack("<3q", *bounds))


def test_a_pair_packed_by_hand_is_read_and_written_again_byte_for_byte(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a")
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
        ({"code": 7}, "dtype code 7 is not a token type"),
        ({"code": 99}, "dtype code 99 is not a token type"),
        ({"offsets": (0, 8)}, "sizes and offsets contradict"),
        ({"bounds": (0, 1, 7)}, "do not cover its 2 sequences"),
    ],
)
def test_a_wrong_header_or_table_is_an_error_that_says_what_is_wrong(tmp_path: Path, wrong: dict, message: str) -> None:
    write_by_hand(tmp_path / "a", **wrong)
    with pytest.raises(DataError, match=message):
        IndexedCorpus(tmp_path / "a")


def test_the_bin_of_another_corpus_is_an_error(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a")
    (tmp_path / "a.bin").write_bytes(b"\0" * 16)
    with pytest.raises(DataError, match="16 bytes, shorter than the 20"):
        IndexedCorpus(tmp_path / "a")


def test_the_error_for_a_missing_corpus_names_the_nearest_one(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "corpus_text_document")
    with pytest.raises(DataError, match="nearest prefix there: .*corpus_text_document"):
        IndexedCorpus(tmp_path / "corpus_text_documents")


def test_an_id_that_does_not_fit_is_refused_and_an_older_pair_survives(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a")
    before = (tmp_path / "a.bin").read_bytes()
    with (
        pytest.raises(DataError, match="token id 65536 does not fit uint16"),
        IndexedWriter(tmp_path / "a", np.uint16) as writer,
    ):
        writer.add_document([65536])
    assert (tmp_path / "a.bin").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("position", [0, 4, 8])
def test_one_id_above_the_vocabulary_is_found_at_any_position(position: int, tmp_path: Path) -> None:
    tokens = [5] * 9
    tokens[position] = 700
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(tokens)
    check_corpus(IndexedCorpus(tmp_path / "a"), 701, block_tokens=2)
    with pytest.raises(DataError, match=r"a: token id 700, but the vocabulary has the ids 0 to 699"):
        check_corpus(IndexedCorpus(tmp_path / "a"), 700, block_tokens=2)


def test_a_negative_id_is_found(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        writer.add_document([5, -1, 5])
    with pytest.raises(DataError, match="token id -1"):
        check_corpus(IndexedCorpus(tmp_path / "a"), 700)


def test_the_check_of_a_very_large_corpus_reads_blocks_spread_evenly_over_it(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([5] * 1000)
    corpus = IndexedCorpus(tmp_path / "a")
    checked = [position for position in range(1000) if wrong_id_is_found(corpus, position)]
    assert len(checked) <= 110 and max(np.diff(sorted({0, *checked, 999}))) <= 101


def wrong_id_is_found(corpus: IndexedCorpus, position: int) -> bool:
    """Return whether a check of 200 bytes, in blocks of 10 tokens, finds a wrong id at `position`."""
    with Path(f"{corpus.prefix}.bin").open("r+b") as file:
        os.pwrite(file.fileno(), struct.pack("<H", 60_000), 2 * position)
        try:
            check_corpus(corpus, 60_000, max_bytes=200, block_tokens=10)
        except DataError:
            return True
        finally:
            os.pwrite(file.fileno(), struct.pack("<H", 5), 2 * position)
    return False


def test_ids_are_stored_in_two_bytes_below_megatrons_limit() -> None:
    assert [token_dtype(size).name for size in (65499, 65500)] == ["uint16", "int32"]


def test_a_bin_that_is_truncated_while_it_is_open_is_an_error_and_does_not_end_the_process(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a")
    corpus = IndexedCorpus(tmp_path / "a")
    os.truncate(tmp_path / "a.bin", 2)
    with pytest.raises(DataError, match=r"a.bin: ends before byte \d+: it was truncated since it was opened"):
        for sequence in range(len(corpus.sizes)):
            corpus.read(sequence)


def test_a_full_disk_is_an_error_in_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    """No file may grow beyond 4,000 bytes, as on a disk with 4,000 bytes free."""
    code = (
        "import resource; from megagpt.data.indexed import IndexedWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        f"with IndexedWriter({str(tmp_path / 'a')!r}, 'uint16') as writer:\n"
        "    writer.add_document(range(3000))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "DataError" in result.stderr.splitlines()[-1] and "a.bin: cannot be written: File too large" in result.stderr
    assert not list(tmp_path.iterdir())
