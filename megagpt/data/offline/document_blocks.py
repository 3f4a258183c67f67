"""Read a corpus from its first document to its last in bounded memory: blocks of documents, and their tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.data.indexed import IndexedCorpus, Tokens, files_of
from megagpt.errors import DataError

WINDOW_DOCUMENTS = 1 << 16
"""Documents whose sequences are summed at a time."""


@dataclass(frozen=True)
class DocumentBlock:
    """Consecutive documents of a corpus."""

    sizes: npt.NDArray[Any]
    """Tokens in each sequence, [sequences]."""
    bounds: npt.NDArray[np.int64]
    """First sequence of each document within the block, then the number of sequences, [documents + 1]."""
    token_bounds: npt.NDArray[np.int64]
    """First token of each document within the block, then the number of tokens, [documents + 1]."""

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents in the block."""
        return int(self.token_bounds[-1])


def document_blocks(corpus: IndexedCorpus, max_tokens: int) -> Iterator[DocumentBlock]:
    """Yield all documents in order, in blocks of at most `max_tokens`; a longer document is a block of its own."""
    for start in range(0, len(corpus.document_indices) - 1, WINDOW_DOCUMENTS):
        bounds = corpus.document_indices[start : start + WINDOW_DOCUMENTS + 1]
        sizes = corpus.sizes[bounds[0] : bounds[-1]]
        bounds = bounds - bounds[0]
        tokens = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[bounds]
        first, n_documents = 0, len(bounds) - 1
        while first < n_documents:
            fitting = int(np.searchsorted(tokens, tokens[first] + max_tokens, side="right")) - 1
            end = max(first + 1, fitting)
            block = slice(first, end + 1)
            yield DocumentBlock(
                sizes[bounds[first] : bounds[end]], bounds[block] - bounds[first], tokens[block] - tokens[first]
            )
            first = end


class TokenReader:
    """Reads the tokens of a corpus sequentially.

    It reads instead of mapping: memory is released after use, and a disk error or a file that shrinks raises DataError,
    while the kernel would end a process that touches such a mapped page.
    """

    def __init__(self, corpus: IndexedCorpus) -> None:
        self._path = files_of(corpus.prefix)[0]
        self._dtype = corpus.dtype
        try:
            self._file = self._path.open("rb")
        except OSError as error:
            raise self._unreadable(error.strerror) from None

    def take(self, n_tokens: int) -> Tokens:
        """Return the next `n_tokens`, [n_tokens]."""
        tokens = np.empty(n_tokens, self._dtype)
        try:
            n_bytes = self._file.readinto(tokens.data)
        except OSError as error:
            raise self._unreadable(error.strerror) from None
        if n_bytes < tokens.nbytes:
            raise self._unreadable("it became shorter while it was read")
        return tokens

    def __enter__(self) -> "TokenReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _unreadable(self, reason: str | None) -> DataError:
        return DataError(f"{self._path}: cannot be read: {reason}")
