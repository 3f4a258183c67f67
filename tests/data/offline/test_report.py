"""Counts equal those of numpy over all tokens; an id that no vocabulary has is reported with its position."""

import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.indexed import IndexedCorpus, IndexedWriter
from megagpt.data.offline import document_blocks
from megagpt.data.offline import report as module
from megagpt.data.offline.report import corpus_report, document_start, sample_documents
from megagpt.errors import DataError
from megagpt.progress import NoProgress

TYPES = [np.uint8, np.int16, np.uint16, np.int32, np.int64]


def corpus_of(prefix: Path, documents: list[list[list[int]]], dtype: type = np.int32) -> IndexedCorpus:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(*document)
    return IndexedCorpus(prefix)


SEQUENCES = st.lists(st.integers(0, 20) | st.integers(0, 127), max_size=9)
CORPORA = st.lists(st.lists(SEQUENCES, max_size=3) | SEQUENCES.map(lambda tokens: [tokens]), max_size=12)


@settings(max_examples=100, deadline=None)
@given(
    documents=CORPORA,
    dtype=st.sampled_from(TYPES),
    chunk=st.integers(1, 12),
    window=st.integers(1, 5),
    top=st.integers(0, 6),
)
def test_counts_and_lengths_equal_those_of_numpy(
    documents: list[list[list[int]]], dtype: type, chunk: int, window: int, top: int
) -> None:
    documents = [*documents, [[3, 5]]]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(module, "CHUNK_TOKENS", chunk),
        mock.patch.object(document_blocks, "WINDOW_DOCUMENTS", window),
    ):
        report = corpus_report(corpus_of(Path(folder, "a"), documents, dtype), 128, 5, top, NoProgress())
    flat = [[token for sequence in document for token in sequence] for document in documents]
    tokens = np.array([token for document in flat for token in document])
    lengths = [len(document) for document in flat]
    assert (report.sequences, report.documents, report.tokens) == (sum(map(len, documents)), len(documents), len(tokens))
    assert (report.empty_documents, report.dtype) == (lengths.count(0), np.dtype(dtype).name)
    statistics = report.tokens_per_document
    assert (statistics.min, statistics.max) == (min(lengths), max(lengths))
    assert [statistics.median, statistics.mean, statistics.p95] == pytest.approx(
        [np.median(lengths), np.mean(lengths), np.percentile(lengths, 95)], abs=1e-9
    )
    assert (report.smallest_id, report.largest_id) == (tokens.min(), tokens.max())
    counts = Counter(tokens.tolist())
    assert report.distinct_ids == len(counts)
    expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:top]
    assert [(token.id, token.count) for token in report.most_frequent] == expected
    assert [token.share for token in report.most_frequent] == pytest.approx([count / len(tokens) for _, count in expected])
    assert report.documents_ending_in_eod == sum(document[-1:] == [5] for document in flat)
    assert report.bin_bytes == len(tokens) * np.dtype(dtype).itemsize


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_the_first_wrong_id_is_reported_with_its_position(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(module, "WINDOW_SEQUENCES", 2)
    corpus = corpus_of(tmp_path / "a", [[[1, 2], []], [], [[3]], [[], [4, 50, 5]], [[60, 1]]])
    with pytest.raises(
        DataError, match="a: 2 of 8 token ids are outside the vocabulary of 50, the first is 50, at position 1 of"
    ):
        corpus_report(corpus, 50, None, 1, NoProgress())
    with pytest.raises(DataError, match="first is 50, at position 1 of sequence 4:"):
        corpus_report(corpus, 50, None, 1, NoProgress())
    with pytest.raises(DataError, match="1 of 8 token ids .* first is 60, at position 0 of sequence 5:"):
        corpus_report(corpus, 51, None, 1, NoProgress())
    assert corpus_report(corpus, 61, None, 1, NoProgress()).largest_id == 60


@pytest.mark.parametrize("dtype, wrong", [(np.int32, 2**31 - 1), (np.int32, -(2**31)), (np.int64, 2**62), (np.int8, -1)])
@pytest.mark.parametrize("vocab_size", [100, None])
def test_a_huge_id_in_a_damaged_file_does_not_take_memory(
    dtype: type, wrong: int, vocab_size: int | None, tmp_path: Path
) -> None:
    corpus = corpus_of(tmp_path / "a", [[[1, wrong, 2]]], dtype)
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=f"1 of 3 token ids are outside .*, the first is {wrong}, at position 1 of sequence 0"
        ):
            corpus_report(corpus, vocab_size, None, 1, NoProgress())
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_memory_is_limited_to_a_chunk_of_a_long_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 1 << 13)
    corpus = corpus_of(tmp_path / "a", [[np.zeros(4_000_000, np.uint16)]], np.uint16)  # type: ignore[list-item]
    tracemalloc.start()
    try:
        report = corpus_report(corpus, 1, None, 1, NoProgress())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (report.tokens, report.tokens_per_document.max) == (4_000_000, 4_000_000)
    assert peak < 1_000_000, "the tokens take 8 MB"


def test_samples_are_the_first_document_and_others_that_depend_on_the_seed(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a", [[[n]] for n in range(50)])
    drawn = [sample_documents(corpus, 4, seed) for seed in range(20)]
    assert drawn == [sample_documents(corpus, 4, seed) for seed in range(20)]
    assert all(documents[0] == 0 and len(set(documents)) == 4 and documents == sorted(documents) for documents in drawn)
    assert len({document for documents in drawn for document in documents}) > 25
    assert sample_documents(corpus, 99, 0) == list(range(50))
    assert (sample_documents(corpus, 0, 0), sample_documents(corpus, 1, 0)) == ([], [0])


def test_the_start_of_a_document_has_the_tokens_of_its_first_sequences(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a", [[[9]], [[1, 2], [], [3, 4, 5]], [], [[6]]])
    assert [document_start(corpus, 1, n).tolist() for n in (0, 1, 2, 3, 9)] == [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5]]
    assert [document_start(corpus, n, 9).tolist() for n in (2, 3)] == [[], [6]]
