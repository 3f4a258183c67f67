"""Text to token files: read batches of documents, encode them, write them in order."""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.data.indexed import IndexedWriter, Position, token_dtype
from megagpt.data.offline.documents import InputFile, Reject, Texts, stop
from megagpt.data.offline.encode import PROBES, Encoded, Encoder, ReferenceEncoder, SpotCheck, fast_encoder
from megagpt.data.offline.resume_log import Journal, Record
from megagpt.data.prefetch import Prefetcher
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import DataError

BATCH_BYTES = 2**20
"""Text in one piece of work: large against the cost of handing it over, small against memory."""
AHEAD = 4
"""Pieces of work read ahead, and in flight for each worker process; bounds what is in memory."""
SECONDS_BETWEEN_POINTS = 1.0
"""Between two points to resume at: each waits for the disk."""


@dataclass(frozen=True)
class Job:
    """What a run is to do."""

    files: Sequence[Path]
    tokenizer: Tokenizer
    load: Callable[[], Tokenizer]
    """Makes the tokenizer anew in worker processes: it must be picklable."""
    output_prefix: str
    """Writes OUTPUT_PREFIX_KEY_document.bin and .idx for every key."""
    keys: Sequence[str]
    before: Sequence[int] = ()
    """Ids to put before every document that has a token."""
    after: Sequence[int] = ()
    """Ids to put after it, such as the end of document."""
    separator: str | None = None
    """What stands between documents in plain text; the file is one document if absent."""
    workers: int = 1
    """Threads of gigatoken, or processes of a reference library."""
    check_share: float = 0.001
    """Share of documents that the reference library encodes again."""
    reference: bool = False
    """Use the reference library for all documents."""
    resume: bool = False
    """Go on where an earlier run of the same settings stopped."""


@dataclass
class Counts:
    """What a run read and wrote, with what the runs before that it resumed had."""

    documents: int = 0
    """Documents written, over all keys."""
    dropped: int = 0
    """Documents without a token, which are not written."""
    tokens: int = 0
    skipped: int = 0
    """Documents that could not be read and were left out (`--on-error skip`)."""
    text_bytes: int = 0
    checked: int = 0
    """Documents that the reference library encoded as well, in this run."""
    resumed_files: int = 0
    """Input files that an earlier run had finished."""


class Progress:
    """Told how many bytes of the input have been read; this one tells nobody."""

    def update(self, n_bytes: int) -> object:
        """`n_bytes` more."""


@dataclass
class Batch:
    """Consecutive documents."""

    texts: dict[str, list[bytes]]
    """UTF-8, by key."""
    n_bytes: int = 0
    """Of the texts."""
    position: int = 0
    """Bytes of all input files read up to the end of this batch."""
    skipped: int = 0
    """Documents left out since the batch before."""
    files_done: int | None = None
    """Input files read to their ends, where the batch ends with one of them."""

    @classmethod
    def of(cls, keys: Sequence[str]) -> "Batch":
        """Without a document."""
        return cls({key: [] for key in keys})

    def add(self, texts: Texts) -> None:
        """One document's text under each key."""
        for found, text in zip(self.texts.values(), texts, strict=True):
            found.append(text)
            self.n_bytes += len(text)


def preprocess(job: Job, progress: Any = None, reject: Reject = stop) -> Counts:
    """Do the job; `progress` has `update(bytes read)`, such as a tqdm bar.

    A pair gets its final name only when it is whole. A run that stops early leaves its work aside if at least one
    input file was finished, for `resume`, else nothing. Raises DataError.
    """
    journal = Journal(Path(f"{job.output_prefix}.preprocess.tmp"))
    point = _begin(job, journal)
    dtype = token_dtype(job.tokenizer.vocab_size)
    writers: dict[str, IndexedWriter] = {}
    try:
        for key in job.keys:
            start = Position(*point.positions.get(key, Position()))
            writers[key] = IndexedWriter(f"{job.output_prefix}_{key}_document", dtype, start)
        _write(job, writers, journal, point, progress or Progress(), reject)
        empty = [writer.prefix for writer in writers.values() if not writer.n_tokens]
        if empty:
            point.files_done = 0  # nothing here to go on with
            raise DataError(
                f"{empty[0]}: not written, nor the other keys, because the input has no document with a token for it"
            )
        for writer in writers.values():
            writer.close()
    except BaseException:
        _put_aside(writers, journal, point)
        raise
    for writer in writers.values():
        writer.discard()
    journal.remove()
    return point.counts


@dataclass
class _Point:
    """Where a later run can go on: after the last input file that is wholly written."""

    files_done: int = 0
    positions: dict[str, Position] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def record(self) -> Record:
        return {"files_done": self.files_done, "positions": self.positions, "counts": vars(self.counts)}


def _begin(job: Job, journal: Journal) -> _Point:
    """Read the journal, or start it. Raises DataError where the run that stopped had other settings."""
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in job.files]
    settings: Record = {
        "tokenizer": _fingerprint(job.tokenizer),
        "tokens around a document": [list(job.before), list(job.after)],
        "separator": job.separator,
        "keys": list(job.keys),
        "input": files,
    }
    records = journal.read() if job.resume else []
    if not records:
        journal.start(settings)
        return _Point()
    for name, value in settings.items():
        if records[0].get(name) != value:
            journal.close()
            raise DataError(f"{job.output_prefix}: the run that stopped had {_other(name, records[0].get(name), value)}")
    last = records[-1] if len(records) > 1 else _Point().record()
    counts = Counts(**{**last["counts"], "checked": 0, "resumed_files": last["files_done"]})
    return _Point(last["files_done"], last["positions"], counts)


def _fingerprint(tokenizer: Tokenizer) -> str:
    """What the tokenizer makes of texts on which tokenizers differ."""
    ids = [tokenizer.vocab_size, *tokenizer.encode_batch(PROBES)]
    return hashlib.blake2b(json.dumps(ids).encode(), digest_size=8).hexdigest()


def _other(name: str, was: Any, now: Any) -> str:
    """How a setting differs from the one of the run that stopped."""
    if name == "input":
        old = [] if was is None else was
        changed = next((a[0] for a, b in zip(old, now, strict=False) if a != b), None)
        what = f"{changed} is another or has changed since" if changed else f"{len(old)} files, not {len(now)}"
        return f"other input: {what}; run again without --resume"
    return f"another {name}: {was!r}, not {now!r}; give the same, or run again without --resume"


def _write(job: Job, writers: dict[str, IndexedWriter], journal: Journal, point: _Point, progress: Any, reject: Reject) -> None:
    """Read, encode and write all files after those that `point` has; `point` goes along with the files finished."""
    counts = Counts(**vars(point.counts))
    position, last = sum(path.stat().st_size for path in job.files[: point.files_done]), time.monotonic()
    progress.update(position)
    with ExitStack() as stack:
        batches = stack.enter_context(Prefetcher(read_batches(job, point.files_done, reject), depth=AHEAD))
        encoder = None if job.reference else fast_encoder(job.tokenizer, job.workers)
        check = SpotCheck(job.tokenizer, job.check_share) if encoder else None
        encode = _encode_here(batches, encoder) if encoder else _encode_in_processes(batches, job)
        for batch, encoded in stack.enter_context(closing(encode)):
            for key, found in encoded.items():
                if check:
                    check(batch.texts[key], found)
                tokens, sizes = frame(found, job.before, job.after, writers[key].dtype)
                writers[key].add_documents(tokens, sizes)
                counts.documents += len(sizes)
                counts.dropped += len(found.sizes) - len(sizes)
                counts.tokens += len(tokens)
            counts.text_bytes += batch.n_bytes
            counts.skipped += batch.skipped
            counts.checked = check.checked if check else 0
            if batch.files_done is not None:
                point.files_done, point.counts = batch.files_done, Counts(**vars(counts))
                point.positions = {key: writer.position for key, writer in writers.items()}
                if time.monotonic() - last >= SECONDS_BETWEEN_POINTS:
                    _record(writers, journal, point)
                    last = time.monotonic()
            progress.update(batch.position - position)
            position = batch.position
    point.counts = counts


def _record(writers: dict[str, IndexedWriter], journal: Journal, point: _Point) -> None:
    for writer in writers.values():
        writer.sync()
    journal.add(point.record())


def _put_aside(writers: dict[str, IndexedWriter], journal: Journal, point: _Point) -> None:
    """Keep what can be gone on with; nothing, where not one file was finished."""
    if point.files_done:
        _record(writers, journal, point)
        for writer in writers.values():
            writer.suspend()
        journal.close()
        return
    for writer in writers.values():
        writer.discard()
    journal.remove()


def frame(encoded: Encoded, before: Sequence[int], after: Sequence[int], dtype: npt.DTypeLike) -> tuple[Any, Any]:
    """Tokens of the documents that have any, each between `before` and `after`, and their sizes with these."""
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


def read_batches(job: Job, first_file: int, reject: Reject) -> Iterator[Batch]:
    """The documents of the files from `first_file` on; every file begins a batch of its own."""
    position, skipped = sum(path.stat().st_size for path in job.files[:first_file]), 0

    def skip(error: DataError) -> None:
        nonlocal skipped
        reject(error)
        skipped += 1

    for number, path in enumerate(job.files[first_file:], first_file):
        file, batch = InputFile(path, job.keys, job.separator, skip), Batch.of(job.keys)
        for texts in file:
            batch.add(texts)
            if batch.n_bytes >= BATCH_BYTES:
                batch.position, batch.skipped = position + file.position, skipped
                yield batch
                batch, skipped = Batch.of(job.keys), 0
        position += path.stat().st_size
        batch.position, batch.skipped, batch.files_done = position, skipped, number + 1
        yield batch
        skipped = 0


EncodedBatch = tuple[Batch, dict[str, Encoded]]


def _encode_here(batches: Iterable[Batch], encoder: Encoder) -> Generator[EncodedBatch, None, None]:
    """Encode on the encoder's own threads."""
    for batch in batches:
        yield batch, _encode(batch, encoder)


def _encode(batch: Batch, encoder: Encoder) -> dict[str, Encoded]:
    return {key: encoder(texts) for key, texts in batch.texts.items() if texts}


def _encode_in_processes(batches: Iterable[Batch], job: Job) -> Generator[EncodedBatch, None, None]:
    """Encode in `job.workers` processes; batches come back in order, at most `AHEAD` for each worker are in memory."""
    if job.workers <= 1:
        encoder = ReferenceEncoder(job.load)
        for item in batches:
            yield item, _encode(item, encoder)
        return
    # An executor, not a Pool: when a worker is killed (out of memory), a Pool waits for its answer for ever.
    pool = ProcessPoolExecutor(job.workers, mp.get_context("spawn"), _start_worker, (ReferenceEncoder(job.load),))
    waiting: deque[tuple[Batch, Future[dict[str, Encoded]]]] = deque()
    try:
        for batch, failed in _then_error(batches):
            if batch is not None:
                waiting.append((batch, pool.submit(_encode_in_worker, batch)))
            while waiting and (batch is None or len(waiting) >= AHEAD * job.workers):
                done, result = waiting.popleft()
                yield done, result.result()
            if failed is not None:
                raise failed
    except BrokenProcessPool:
        raise DataError("a tokenizing process was killed, probably for want of memory; use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _then_error(batches: Iterable[Batch]) -> Iterator[tuple[Batch | None, DataError | None]]:
    """The batches, then None with what ended them: what was read before an error is written before it is raised."""
    try:
        for batch in batches:
            yield batch, None
    except DataError as error:
        yield None, error
    else:
        yield None, None


_worker: list[Encoder] = []
"""The worker process's encoder: a pool has no other place for what its tasks share."""


def _start_worker(encoder: Encoder) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, once
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker[:] = [encoder]


def _encode_in_worker(batch: Batch) -> dict[str, Encoded]:
    return _encode(batch, _worker[0])
