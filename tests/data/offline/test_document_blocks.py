"""Blocks contain every document of a corpus once; a file that cannot be read to its end is an error."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megagpt.data.indexed import IndexedCorpus, IndexedWriter
from megagpt.data.offline import document_blocks as module
from megagpt.data.offline.document_blocks import TokenReader, document_blocks
from megagpt.errors import DataError

DOCUMENTS: list[list[list[int]]] = [[[1, 2], [3]], [], [[4, 5, 6, 7, 8]], [[], [9]], [[10]], [[11]], [[12, 13]]]
"""Tokens, by document and sequence."""


@pytest.fixture
def corpus(tmp_path: Path) -> IndexedCorpus:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add_document(*document)
    return IndexedCorpus(tmp_path / "a")


@pytest.mark.parametrize("window", [1, 2, 3, 100])
@pytest.mark.parametrize("max_tokens", [1, 3, 4, 100])
def test_blocks_contain_every_document_once_and_have_a_limited_size(
    corpus: IndexedCorpus, window: int, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW_DOCUMENTS", window)
    documents = []
    with TokenReader(corpus) as reader:
        for block in document_blocks(corpus, max_tokens):
            assert block.n_tokens <= max_tokens or len(block.bounds) == 2
            tokens = iter(reader.take(block.n_tokens).tolist())
            sequences = [[next(tokens) for _ in range(size)] for size in block.sizes]
            block_documents = [sequences[start:end] for start, end in pairwise(block.bounds)]
            assert np.diff(block.token_bounds).tolist() == [sum(map(len, document)) for document in block_documents]
            documents += block_documents
    assert documents == DOCUMENTS


def test_a_block_has_as_many_documents_as_fit(corpus: IndexedCorpus) -> None:
    assert [len(block.bounds) - 1 for block in document_blocks(corpus, 5)] == [2, 1, 4]


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(np.zeros(100_000, np.uint16))
    with TokenReader(IndexedCorpus(tmp_path / "a")) as reader:
        reader.take(2)
        with (tmp_path / "a.bin").open("r+b") as file:
            file.truncate(199_998)
        with pytest.raises(DataError, match=r"a\.bin: cannot be read: it became shorter"):
            reader.take(99_998)
