"""Convert text to token files: read batches of documents, encode them, write them in order."""

import hashlib
import json
import multiprocessing as mp
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.data.indexed import IndexedWriter, WriterPosition, token_dtype
from megagpt.data.offline.documents import InputFile, Reject, Texts, stop
from megagpt.data.offline.encode import PROBES, Encoded, Encoder, ReferenceEncoder, SpotCheck, fast_encoder
from megagpt.data.offline.resume_log import LogRecord, ResumeLog
from megagpt.data.prefetch import Prefetcher
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import DataError
from megagpt.progress import NoProgress, Progress

BATCH_BYTES = 2**20
"""Text in one batch: large compared with the cost of passing it on, small compared with memory."""
MAX_WAITING_BATCHES = 4
"""Batches read in advance, and in flight per worker process; limits the memory."""
SECONDS_BETWEEN_RESUME_POINTS = 1.0
"""Each resume point waits for the disk."""


@dataclass(frozen=True)
class PreprocessJob:
    """Settings of a preprocessing run."""

    files: Sequence[Path]
    tokenizer: Tokenizer
    load: Callable[[], Tokenizer]
    """Loads the tokenizer in a worker process; must be picklable."""
    output_prefix: str
    """The run writes OUTPUT_PREFIX_KEY_document.bin and .idx for each key."""
    keys: Sequence[str]
    before: Sequence[int] = ()
    """Ids to add before each document that has a token."""
    after: Sequence[int] = ()
    """Ids to add after it, such as the end-of-document token."""
    separator: str | None = None
    """Text between documents in plain-text files; without it a file is one document."""
    workers: int = 1
    """Threads of gigatoken, or processes of the reference library."""
    check_share: float = 0.001
    """Share of documents that are compared with the reference library."""
    reference: bool = False
    """Use the reference library for all documents."""
    resume: bool = False
    """Continue an earlier run with the same settings."""


@dataclass
class Counts:
    """What a run read and wrote, including the earlier runs that it continued."""

    documents: int = 0
    """Documents written, over all keys."""
    dropped: int = 0
    """Documents without a token; they are not written."""
    tokens: int = 0
    skipped: int = 0
    """Documents that could not be read and were skipped (`--on-error skip`)."""
    text_bytes: int = 0
    checked: int = 0
    """Documents compared with the reference library, in this run."""
    resumed_files: int = 0
    """Input files that an earlier run finished."""


@dataclass
class DocumentBatch:
    """Consecutive documents of the input."""

    texts: dict[str, list[bytes]]
    """UTF-8, by key."""
    n_bytes: int = 0
    """Bytes of the texts."""
    position: int = 0
    """Bytes of the input files up to the end of this batch."""
    skipped: int = 0
    """Documents skipped since the previous batch."""
    files_done: int | None = None
    """Number of finished input files, if the batch ends at the end of one."""

    @classmethod
    def of(cls, keys: Sequence[str]) -> "DocumentBatch":
        """Return an empty batch."""
        return cls({key: [] for key in keys})

    def add(self, texts: Texts) -> None:
        """Add one document's text under each key."""
        for key_texts, text in zip(self.texts.values(), texts, strict=True):
            key_texts.append(text)
            self.n_bytes += len(text)


def preprocess(job: PreprocessJob, progress: Progress | None = None, reject: Reject = stop) -> Counts:
    """Run the job and return its counts.

    `progress`: receives the bytes of input that are done; `reject`: receives documents that cannot be read.
    A pair gets its final name only when it is complete. A run that stops early keeps its temporary files for `resume` if at
    least one input file is finished, else it removes them. Raises DataError.
    """
    fingerprint = _tokenizer_fingerprint(job.tokenizer)  # before anything is created: it may fail
    log = ResumeLog(Path(f"{job.output_prefix}.preprocess.tmp"))
    point = _start(job, log, fingerprint)
    dtype = token_dtype(job.tokenizer.vocab_size)
    writers: dict[str, IndexedWriter] = {}
    try:
        for key in job.keys:
            writers[key] = IndexedWriter(f"{job.output_prefix}_{key}_document", dtype, point.positions.get(key))
        _write(job, writers, log, point, progress or NoProgress(), reject)
        empty = [writer.prefix for writer in writers.values() if not writer.n_tokens]
        if empty:
            point.files_done = 0  # there is nothing to continue
            raise DataError(
                f"{empty[0]}: not written, nor the other keys, because the input has no document with a token for it"
            )
        for writer in writers.values():
            writer.close()
    except BaseException:
        _suspend(writers, log, point)
        raise
    for writer in writers.values():
        writer.discard()
    log.remove()
    return point.counts


@dataclass
class _ResumePoint:
    """Where a later run can continue: after the last input file that is completely written."""

    files_done: int = 0
    positions: dict[str, WriterPosition] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def record(self) -> LogRecord:
        """Return the resume point as a line of the log."""
        return {"files_done": self.files_done, "positions": self.positions, "counts": vars(self.counts)}


def _start(job: PreprocessJob, log: ResumeLog, fingerprint: str) -> _ResumePoint:
    """Read the log, or start it. Raises DataError if the stopped run had different settings.

    `fingerprint`: of the tokenizer.
    """
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in job.files]
    settings: LogRecord = {
        "tokenizer": fingerprint,
        "tokens around a document": [list(job.before), list(job.after)],
        "separator": job.separator,
        "keys": list(job.keys),
        "input": files,
    }
    records = log.read() if job.resume else []
    if not records:
        log.start(settings)
        return _ResumePoint()
    for name, value in settings.items():
        if records[0].get(name) != value:
            log.close()
            raise DataError(f"{job.output_prefix}: the stopped run had {_difference(name, records[0].get(name), value)}")
    if len(records) == 1:
        return _ResumePoint()
    last = records[-1]
    positions = {key: WriterPosition._make(values) for key, values in last["positions"].items()}
    counts = Counts(**{**last["counts"], "checked": 0, "resumed_files": last["files_done"]})
    return _ResumePoint(last["files_done"], positions, counts)


def _tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return a hash of the ids of texts on which tokenizers differ."""
    ids = [tokenizer.vocab_size, *tokenizer.encode_batch(PROBES)]
    return hashlib.blake2b(json.dumps(ids).encode(), digest_size=8).hexdigest()


def _difference(name: str, was: Any, now: Any) -> str:
    """Return how a setting differs from that of the stopped run."""
    if name == "input":
        old = [] if was is None else was
        changed = next((a[0] for a, b in zip(old, now, strict=False) if a != b), None)
        what = f"{changed} is another file or has changed" if changed else f"{len(old)} files, not {len(now)}"
        return f"different input: {what}; run again without --resume"
    return f"different {name}: {was!r}, not {now!r}; use the same, or run again without --resume"


def _write(
    job: PreprocessJob,
    writers: dict[str, IndexedWriter],
    log: ResumeLog,
    point: _ResumePoint,
    progress: Progress,
    reject: Reject,
) -> None:
    """Read, encode and write all files after those of `point`; update `point` with each finished file."""
    counts = replace(point.counts)
    position = sum(path.stat().st_size for path in job.files[: point.files_done])
    progress.update(position)
    last_recorded = time.monotonic()
    with ExitStack() as stack:
        batches = stack.enter_context(Prefetcher(read_batches(job, point.files_done, reject), depth=MAX_WAITING_BATCHES))
        encoder = None if job.reference else fast_encoder(job.tokenizer, job.workers)
        check = SpotCheck(job.tokenizer, job.check_share) if encoder else None
        encode = _encode_here(batches, encoder) if encoder else _encode_in_processes(batches, job)
        for batch, encoded in stack.enter_context(closing(encode)):
            for key, key_encoded in encoded.items():
                if check:
                    check(batch.texts[key], key_encoded)
                tokens, sizes = frame(key_encoded, job.before, job.after, writers[key].dtype)
                writers[key].add_documents(tokens, sizes)
                counts.documents += len(sizes)
                counts.dropped += len(key_encoded.sizes) - len(sizes)
                counts.tokens += len(tokens)
            counts.text_bytes += batch.n_bytes
            counts.skipped += batch.skipped
            counts.checked = check.checked if check else 0
            if batch.files_done is not None:
                point.files_done = batch.files_done
                point.counts = replace(counts)
                point.positions = {key: writer.position for key, writer in writers.items()}
                if time.monotonic() - last_recorded >= SECONDS_BETWEEN_RESUME_POINTS:
                    _record(writers, log, point)
                    last_recorded = time.monotonic()
            progress.update(batch.position - position)
            position = batch.position
    point.counts = counts


def _record(writers: dict[str, IndexedWriter], log: ResumeLog, point: _ResumePoint) -> None:
    for writer in writers.values():
        writer.sync()
    log.add(point.record())


def _suspend(writers: dict[str, IndexedWriter], log: ResumeLog, point: _ResumePoint) -> None:
    """Keep the temporary files for a later run; remove them if no input file is finished."""
    if point.files_done:
        _record(writers, log, point)
        for writer in writers.values():
            writer.suspend()
        log.close()
        return
    for writer in writers.values():
        writer.discard()
    log.remove()


def frame(encoded: Encoded, before: Sequence[int], after: Sequence[int], dtype: npt.DTypeLike) -> tuple[Any, Any]:
    """Return the tokens of the non-empty documents, each between `before` and `after`, and their sizes including these."""
    sizes = encoded.sizes[encoded.sizes > 0]
    if not before and not after:
        return encoded.ids.astype(dtype), sizes
    sizes = sizes + len(before) + len(after)
    ends = np.cumsum(sizes)
    tokens, is_text = np.empty(int(sizes.sum()), dtype), np.ones(int(sizes.sum()), np.bool_)
    for ids, first in ((before, ends - sizes), (after, ends - len(after))):
        for offset, token in enumerate(ids):
            tokens[first + offset] = token
            is_text[first + offset] = False
    tokens[is_text] = encoded.ids
    return tokens, sizes


def read_batches(job: PreprocessJob, first_file: int, reject: Reject) -> Iterator[DocumentBatch]:
    """Yield the documents of the files from `first_file` on; each file starts a new batch."""
    position = sum(path.stat().st_size for path in job.files[:first_file])
    skipped = _SkipCounter(reject)
    for number, path in enumerate(job.files[first_file:], first_file):
        file = InputFile(path, job.keys, job.separator, skipped)
        batch = DocumentBatch.of(job.keys)
        for texts in file:
            batch.add(texts)
            if batch.n_bytes >= BATCH_BYTES:
                batch.position = position + file.position
                batch.skipped = skipped.take()
                yield batch
                batch = DocumentBatch.of(job.keys)
        position += path.stat().st_size
        batch.position = position
        batch.skipped = skipped.take()
        batch.files_done = number + 1
        yield batch


class _SkipCounter:
    """A `Reject` that counts the documents that the user's `reject` skips."""

    def __init__(self, reject: Reject) -> None:
        self._reject = reject
        self._count = 0

    def __call__(self, error: DataError) -> None:
        self._reject(error)
        self._count += 1

    def take(self) -> int:
        """Return the count and reset it."""
        count, self._count = self._count, 0
        return count


EncodedBatch = tuple[DocumentBatch, dict[str, Encoded]]


def _encode_here(batches: Iterable[DocumentBatch], encoder: Encoder) -> Generator[EncodedBatch, None, None]:
    """Encode with the encoder's own threads."""
    for batch in batches:
        yield batch, _encode(batch, encoder)


def _encode(batch: DocumentBatch, encoder: Encoder) -> dict[str, Encoded]:
    return {key: encoder(texts) for key, texts in batch.texts.items() if texts}


def _encode_in_processes(batches: Iterable[DocumentBatch], job: PreprocessJob) -> Generator[EncodedBatch, None, None]:
    """Encode in `job.workers` processes, in order, with at most `MAX_WAITING_BATCHES` batches per worker in memory."""
    if job.workers <= 1:
        encoder = ReferenceEncoder(job.load)
        for item in batches:
            yield item, _encode(item, encoder)
        return
    # An executor, not a Pool: a Pool waits forever for a worker that was killed (out of memory).
    pool = ProcessPoolExecutor(job.workers, mp.get_context("spawn"), _start_worker, (ReferenceEncoder(job.load),))
    waiting: deque[tuple[DocumentBatch, Future[dict[str, Encoded]]]] = deque()
    try:
        for batch, failed in _then_error(batches):
            if batch is not None:
                waiting.append((batch, pool.submit(_encode_in_worker, batch)))
            while waiting and (batch is None or len(waiting) >= MAX_WAITING_BATCHES * job.workers):
                done, result = waiting.popleft()
                yield done, result.result()
            if failed is not None:
                raise failed
    except BrokenProcessPool:
        raise DataError("a worker process was killed, probably because memory ran out; use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _then_error(batches: Iterable[DocumentBatch]) -> Iterator[tuple[DocumentBatch | None, DataError | None]]:
    """Yield the batches, then None with the error that ended them, so that earlier batches are written first."""
    try:
        for batch in batches:
            yield batch, None
    except DataError as error:
        yield None, error
    else:
        yield None, None


class _Worker:
    """State of a worker process. A process pool offers no other way to keep an object between its tasks."""

    encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel already
    _Worker.encoder = encoder


def _encode_in_worker(batch: DocumentBatch) -> dict[str, Encoded]:
    return _encode(batch, _Worker.encoder)
