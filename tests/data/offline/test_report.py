"""What is counted is what numpy counts over all tokens at once; an id that no vocabulary has is found at its place."""

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
from megagpt.data.offline.preprocess import Progress
from megagpt.data.offline.report import document_start, inspect, sample_documents
from megagpt.errors import DataError

TYPES = [np.uint8, np.int16, np.uint16, np.int32, np.int64]


def corpus_of(prefix: Path, documents: list[list[list[int]]], dtype: type = np.int32) -> IndexedCorpus:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(*document)
    return IndexedCorpus(prefix)


sequence = st.lists(st.integers(0, 20) | st.integers(0, 127), max_size=9)
documents_of_sequences = st.lists(st.lists(sequence, max_size=3) | sequence.map(lambda tokens: [tokens]), max_size=12)


@settings(max_examples=100, deadline=None)
@given(
    documents=documents_of_sequences,
    dtype=st.sampled_from(TYPES),
    chunk=st.integers(1, 12),
    window=st.integers(1, 5),
    top=st.integers(0, 6),
)
def test_counts_and_lengths_are_those_of_numpy(
    documents: list[list[list[int]]], dtype: type, chunk: int, window: int, top: int
) -> None:
    documents = [*documents, [[3, 5]]]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(module, "CHUNK_TOKENS", chunk),
        mock.patch.object(document_blocks, "_WINDOW", window),
    ):
        found = inspect(corpus_of(Path(folder, "a"), documents, dtype), 128, 5, top, Progress())
    flat = [[token for sequence in document for token in sequence] for document in documents]
    tokens = np.array([token for document in flat for token in document])
    lengths = [len(document) for document in flat]
    assert (found.sequences, found.documents, found.tokens) == (sum(map(len, documents)), len(documents), len(tokens))
    assert (found.empty_documents, found.dtype) == (lengths.count(0), np.dtype(dtype).name)
    spread = found.tokens_per_document
    assert (spread.min, spread.max) == (min(lengths), max(lengths))
    assert [spread.median, spread.mean, spread.p95] == pytest.approx(
        [np.median(lengths), np.mean(lengths), np.percentile(lengths, 95)], abs=1e-9
    )
    assert (found.smallest_id, found.largest_id) == (tokens.min(), tokens.max())
    counts = Counter(tokens.tolist())
    assert found.distinct_ids == len(counts)
    expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:top]
    assert [(token.id, token.count) for token in found.most_frequent] == expected
    assert [token.share for token in found.most_frequent] == pytest.approx([count / len(tokens) for _, count in expected])
    assert found.documents_ending_in_eod == sum(document[-1:] == [5] for document in flat)
    assert found.bin_bytes == len(tokens) * np.dtype(dtype).itemsize


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_the_first_wrong_id_is_told_with_its_place(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(module, "_SEQUENCES", 2)
    corpus = corpus_of(tmp_path / "a", [[[1, 2], []], [], [[3]], [[], [4, 50, 5]], [[60, 1]]])
    with pytest.raises(
        DataError, match="a: 2 of 8 token ids are outside the vocabulary of 50, the first is 50, at position 1 of"
    ):
        inspect(corpus, 50, None, 1, Progress())
    with pytest.raises(DataError, match="first is 50, at position 1 of sequence 4:"):
        inspect(corpus, 50, None, 1, Progress())
    with pytest.raises(DataError, match="1 of 8 token ids .* first is 60, at position 0 of sequence 5:"):
        inspect(corpus, 51, None, 1, Progress())
    assert inspect(corpus, 61, None, 1, Progress()).largest_id == 60


@pytest.mark.parametrize("dtype, wrong", [(np.int32, 2**31 - 1), (np.int32, -(2**31)), (np.int64, 2**62), (np.int8, -1)])
@pytest.mark.parametrize("vocab_size", [100, None])
def test_an_id_of_a_damaged_file_takes_no_memory(dtype: type, wrong: int, vocab_size: int | None, tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a", [[[1, wrong, 2]]], dtype)
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=f"1 of 3 token ids are outside .*, the first is {wrong}, at position 1 of sequence 0"
        ):
            inspect(corpus, vocab_size, None, 1, Progress())
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_memory_holds_a_chunk_and_not_a_long_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 1 << 13)
    corpus = corpus_of(tmp_path / "a", [[np.zeros(4_000_000, np.uint16)]], np.uint16)  # type: ignore[list-item]
    tracemalloc.start()
    try:
        found = inspect(corpus, 1, None, 1, Progress())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.tokens, found.tokens_per_document.max) == (4_000_000, 4_000_000)
    assert peak < 1_000_000, "the tokens are 8 MB"


def test_samples_are_the_first_document_and_others_by_the_seed(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a", [[[n]] for n in range(50)])
    drawn = [sample_documents(corpus, 4, seed) for seed in range(20)]
    assert drawn == [sample_documents(corpus, 4, seed) for seed in range(20)]
    assert all(documents[0] == 0 and len(set(documents)) == 4 and documents == sorted(documents) for documents in drawn)
    assert len({document for documents in drawn for document in documents}) > 25
    assert sample_documents(corpus, 99, 0) == list(range(50))
    assert (sample_documents(corpus, 0, 0), sample_documents(corpus, 1, 0)) == ([], [0])


def test_a_document_starts_with_its_first_sequences(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a", [[[9]], [[1, 2], [], [3, 4, 5]], [], [[6]]])
    assert [document_start(corpus, 1, n).tolist() for n in (0, 1, 2, 3, 9)] == [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5]]
    assert [document_start(corpus, n, 9).tolist() for n in (2, 3)] == [[], [6]]
