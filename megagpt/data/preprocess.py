"""Text to token files: workers tokenize batches of documents, the parent writes them in order."""

import multiprocessing as mp
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.data.documents import Document, Reject, read_documents, stop
from megagpt.data.indexed import IndexedWriter, token_dtype
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import DataError

BATCH_BYTES = 2**20
"""Text in one piece of work: large against the cost of handing it over, small against memory."""
AHEAD = 4
"""Pieces of work in flight for each worker; bounds what is in memory."""

Batch = list[Document]
Encoded = dict[str, tuple[npt.NDArray[np.generic], npt.NDArray[np.int32]]]


@dataclass
class Counts:
    """What one run read and wrote."""

    documents: int = 0
    """Documents written, over all keys."""
    dropped: int = 0
    """Documents without a token, which are not written (as Megatron does)."""
    tokens: int = 0
    skipped: int = 0
    """Documents that could not be read and were left out (`--on-error skip`)."""
    text_bytes: int = 0
    seconds: float = 0.0


class Encoder:
    """Tokenizes batches in a worker process: the tokenizer is loaded there, once."""

    def __init__(self, load: Callable[[], Tokenizer], append_eod: bool) -> None:
        self._load, self._append_eod = load, append_eod
        self._tokenizer: Tokenizer | None = None

    def __call__(self, batch: Batch) -> Encoded:
        """By key: the tokens of the batch's documents joined, and the number of each (0 for an empty document)."""
        if self._tokenizer is None:
            self._tokenizer = self._load()
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
    load: Callable[[], Tokenizer],
    output_prefix: str,
    keys: Sequence[str],
    append_eod: bool,
    workers: int,
    separator: str | None = None,
    progress: Any = None,
    reject: Reject = stop,
) -> Counts:
    """Write OUTPUT_PREFIX_KEY_document.bin and .idx for every key (plain text: OUTPUT_PREFIX_text_document).

    `load` makes the tokenizer, in each worker anew: it must be picklable. `progress`: an object with `update(bytes)`,
    such as a tqdm bar. Raises DataError; a pair gets its final name only when it is whole.
    """
    start, counts = time.monotonic(), Counts()
    dtype = token_dtype(load().vocab_size)  # a wrong tokenizer fails here, not in a worker

    def skip(error: DataError) -> None:
        reject(error)
        counts.skipped += 1

    with ExitStack() as stack:
        writers = {key: stack.enter_context(IndexedWriter(f"{output_prefix}_{key}_document", dtype)) for key in keys}
        batches = _batches(files, keys, separator, skip)
        for batch, encoded in stack.enter_context(closing(_encode(batches, Encoder(load, append_eod), workers))):
            for key, (tokens, sizes) in encoded.items():
                kept = sizes[sizes > 0]
                writers[key].add_documents(tokens, kept)
                counts.dropped += len(sizes) - len(kept)
            read = sum(len(text.encode()) for document in batch for text in document.values())
            counts.text_bytes += read
            if progress is not None:
                progress.update(read)
    counts.documents = sum(writer.n_documents for writer in writers.values())
    counts.tokens = sum(writer.n_tokens for writer in writers.values())
    counts.seconds = time.monotonic() - start
    return counts


def _batches(files: Iterable[Path], keys: Sequence[str], separator: str | None, reject: Reject) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for path in files:
        for document in read_documents(path, keys, separator, reject):
            batch.append(document)
            size += sum(map(len, document.values()))
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode(batches: Iterator[Batch], encoder: Encoder, workers: int) -> Generator[tuple[Batch, Encoded], None, None]:
    """Batches with their tokens, in order; at most `AHEAD` for each worker are in memory."""
    if workers <= 1:
        for batch in batches:
            yield batch, encoder(batch)
        return
    # An executor, not a Pool: when a worker is killed (out of memory), a Pool waits for its answer for ever.
    pool = ProcessPoolExecutor(workers, mp.get_context("spawn"), _start_worker, (encoder,))
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_here, batch)))
            if len(waiting) >= AHEAD * workers:
                done, result = waiting.popleft()
                yield done, result.result()
        while waiting:
            done, result = waiting.popleft()
            yield done, result.result()
    except BrokenProcessPool:
        raise DataError("a tokenizing process was killed, probably for want of memory; use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: list[Encoder] = []
"""The worker process's encoder: a pool has no other place for what its tasks share."""


def _start_worker(encoder: Encoder) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, once
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker[:] = [encoder]


def _encode_here(batch: Batch) -> Encoded:
    return _worker[0](batch)
