"""Text to token files: workers tokenize batches of documents, the parent writes them in order."""

import multiprocessing as mp
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.data.documents import read_documents
from megagpt.data.indexed import IndexedWriter, token_dtype
from megagpt.data.tokenizer import Tokenizer, load_tokenizer

BATCH_BYTES = 2**20
"""Text in one piece of work: large against the cost of handing it over, small against memory."""
AHEAD = 4
"""Pieces of work in flight for each worker; bounds what is in memory."""

Batch = list[dict[str, str]]
Encoded = dict[str, tuple[npt.NDArray[np.generic], npt.NDArray[np.int32]]]


@dataclass
class Counts:
    """What one run read and wrote."""

    documents: int = 0
    """Documents written, over all keys."""
    dropped: int = 0
    """Documents without a token, which are not written (as Megatron does)."""
    tokens: int = 0
    text_bytes: int = 0
    seconds: float = 0.0


class Encoder:
    """Tokenizes batches in a worker process: the tokenizer is loaded there, once."""

    def __init__(self, tokenizer: str, append_eod: bool) -> None:
        self._path, self._append_eod = tokenizer, append_eod
        self._tokenizer: Tokenizer | None = None

    def __call__(self, batch: Batch) -> Encoded:
        """By key: the tokens of the batch's documents joined, and the number of each (0 for an empty document)."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._path)
        dtype = token_dtype(self._tokenizer.vocab_size)
        encoded: Encoded = {}
        for key in batch[0]:
            ids = self._tokenizer.encode_batch([document[key] for document in batch])
            if self._append_eod:
                ids = [[*tokens, self._tokenizer.eod_id] if tokens else tokens for tokens in ids]
            sizes = np.array([len(tokens) for tokens in ids], np.int32)
            encoded[key] = np.fromiter((token for tokens in ids for token in tokens), dtype, int(sizes.sum())), sizes
        return encoded


def preprocess(
    files: Sequence[Path],
    tokenizer: str,
    output_prefix: str,
    keys: Sequence[str],
    append_eod: bool,
    workers: int,
    separator: str | None = None,
    progress: Any = None,
) -> Counts:
    """Write OUTPUT_PREFIX_KEY_document.bin and .idx for every key (plain text: OUTPUT_PREFIX_text_document).

    `progress`: an object with `update(bytes)`, such as a tqdm bar. Raises DataError; nothing half-written keeps a final name.
    """
    start, counts = time.monotonic(), Counts()
    vocab_size = load_tokenizer(tokenizer).vocab_size  # fails here, not in a worker
    writers = {key: IndexedWriter(f"{output_prefix}_{key}_document", token_dtype(vocab_size)) for key in keys}
    try:
        for batch, encoded in _encode(_batches(files, keys, separator), Encoder(tokenizer, append_eod), workers):
            for key, (tokens, sizes) in encoded.items():
                kept = sizes[sizes > 0]
                writers[key].add_documents(tokens, kept)
                counts.dropped += len(sizes) - len(kept)
            read = sum(len(text.encode()) for document in batch for text in document.values())
            counts.text_bytes += read
            if progress is not None:
                progress.update(read)
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    for writer in writers.values():
        writer.close()
        counts.documents += writer.n_documents
        counts.tokens += writer.n_tokens
    counts.seconds = time.monotonic() - start
    return counts


def _batches(files: Iterable[Path], keys: Sequence[str], separator: str | None) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for path in files:
        for document in read_documents(path, keys, separator):
            batch.append(document)
            size += sum(map(len, document.values()))
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode(batches: Iterator[Batch], encoder: Encoder, workers: int) -> Iterator[tuple[Batch, Encoded]]:
    """Batches with their tokens, in order; at most `AHEAD` for each worker are in memory."""
    if workers <= 1:
        for batch in batches:
            yield batch, encoder(batch)
        return
    with mp.get_context("spawn").Pool(workers, _set_encoder, (encoder,)) as pool:
        waiting: deque[tuple[Batch, AsyncResult[Encoded]]] = deque()
        for batch in batches:
            waiting.append((batch, _submit(pool, batch)))
            if len(waiting) >= AHEAD * workers:
                done, result = waiting.popleft()
                yield done, result.get()
        while waiting:
            done, result = waiting.popleft()
            yield done, result.get()


def _submit(pool: Pool, batch: Batch) -> "AsyncResult[Encoded]":
    return pool.apply_async(_encode_here, (batch,))


_worker: list[Encoder] = []
"""The worker process's encoder: a pool has no other place for what its tasks share."""


def _set_encoder(encoder: Encoder) -> None:
    _worker[:] = [encoder]


def _encode_here(batch: Batch) -> Encoded:
    return _worker[0](batch)
