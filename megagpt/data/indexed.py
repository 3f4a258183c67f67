"""Token files on disk: Megatron's MMIDIDX format, version 1, a .bin of tokens and a .idx that cuts it into sequences.

The .idx, little-endian and without padding: magic (9 bytes), version (uint64), dtype code (uint8), number of sequences
(uint64), number of document bounds (uint64), then tokens per sequence (int32), byte offset of each sequence in the .bin
(int64), and the sequence at which each document begins, with the number of sequences as last entry (int64).
Source: NVIDIA Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import contextlib
import difflib
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.errors import DataError

Tokens = npt.NDArray[Any]
"""Token ids, one dimension, in the integer type of a file."""

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_TOKEN_CODES = {np.dtype(kind): code for code, kind in _DTYPE_OF_CODE.items() if np.issubdtype(kind, np.integer)}
_COPY_BYTES = 1 << 24
MOST_CHECKED = 2**32
"""Bytes of tokens that are looked at before a run: a matter of seconds."""
_CHECK_TOKENS = 1 << 22
"""Tokens whose ids are compared at a time."""
_CHECK_SEQUENCES = 1 << 20
"""Sequences whose sizes and offsets are compared at a time when a corpus is opened."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type in which Megatron stores ids below `vocab_size`: uint16 under 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def files_of(prefix: str | Path) -> tuple[Path, Path]:
    """The .bin and the .idx of `prefix`, which may itself contain dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class Position(NamedTuple):
    """How far a writer has come."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class IndexedWriter:
    """Streams documents into `prefix`.bin and .idx, in memory that does not grow with them.

    Written aside, and named only when a `with` block ends well: the .idx last, so that a reader never meets a half-made
    pair; removed when it ends badly. A writer that was suspended instead goes on from any earlier position.
    Raises DataError where the files cannot be written, an id does not fit `dtype`, or there was no document at all.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, start: Position | None = None) -> None:
        """`start`: go on from here with the files that a suspended writer of the same `prefix` left."""
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        assert self.dtype in _TOKEN_CODES, f"{self.dtype} is not an integer type of the format"
        self._bin, self._idx = files_of(prefix)
        aside = {part: self._bin.with_name(f"{self._bin.name}.{part}.tmp") for part in ("tokens", "sizes", "documents", "idx")}
        self._aside = aside
        self._files: dict[str, BinaryIO] = {}
        self.n_tokens, self.n_sequences, self.n_documents = start or Position()
        with self._named_errors():
            self._bin.parent.mkdir(parents=True, exist_ok=True)
            for part, item, count in (
                ("tokens", self.dtype.itemsize, self.n_tokens),
                ("sizes", 4, self.n_sequences),
                ("documents", 8, self.n_documents),
            ):
                self._files[part] = _open_at(aside[part], item * count)

    @property
    def position(self) -> Position:
        """Where the writer stands."""
        return Position(self.n_tokens, self.n_sequences, self.n_documents)

    def add_document(self, *sequences: npt.ArrayLike) -> None:
        """Append one document; in corpora for GPT it is a single sequence of token ids."""
        arrays = [np.asarray(sequence) for sequence in sequences]
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, self.dtype)
        self._add(tokens, [len(array) for array in arrays], [self.n_sequences + len(arrays)])

    def add_documents(self, tokens: Tokens, sizes: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append documents of one sequence each, of `sizes` tokens, that stand one after another in `tokens`."""
        self._add(tokens, sizes, np.arange(1, len(sizes) + 1, dtype=np.int64) + self.n_sequences)

    def _add(self, tokens: Tokens, sizes: npt.ArrayLike, documents: npt.ArrayLike) -> None:
        """Append sequences of `sizes` tokens each, and the sequence numbers at which documents end."""
        lengths, ends = np.asarray(sizes, np.int32), np.asarray(documents, np.int64)
        assert len(tokens) == lengths.sum(dtype=np.int64), "sizes do not add up to the tokens"
        with self._named_errors():
            for part, values in (("tokens", self._in_dtype(tokens)), ("sizes", lengths), ("documents", ends)):
                self._files[part].write(np.ascontiguousarray(values).data)
        self.n_tokens += len(tokens)
        self.n_sequences += len(lengths)
        self.n_documents += len(ends)

    def sync(self) -> None:
        """Put all that was added on the disk, where it outlives a crash."""
        with self._named_errors():
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())

    def suspend(self) -> None:
        """Leave what was written aside, for a writer with a `start` to go on with."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # of a full disk: what is lost was not synced either
                file.close()

    def close(self) -> None:
        """Write the .idx and give both files their names."""
        if not self.n_tokens:
            raise DataError(f"{self.prefix}: not written, because the input has no document with a token")
        self.sync()
        with self._named_errors():
            self._finish()

    def _finish(self) -> None:
        with self._aside["idx"].open("wb") as index:
            index.write(_HEADER.pack(MAGIC, VERSION, _TOKEN_CODES[self.dtype], self.n_sequences, self.n_documents + 1))
            shutil.copyfileobj(_rewound(self._files["sizes"]), index, _COPY_BYTES)
            self._write_offsets(index)
            index.write(bytes(8))  # the first document begins at sequence 0
            shutil.copyfileobj(_rewound(self._files["documents"]), index, _COPY_BYTES)
            index.flush()
            os.fsync(index.fileno())
        self._idx.unlink(missing_ok=True)  # an older index must not describe the newer .bin, not even for a moment
        self._aside["tokens"].replace(self._bin)
        self._aside["idx"].replace(self._idx)

    def discard(self) -> None:
        """Leave nothing behind."""
        self.suspend()
        for path in self._aside.values():
            path.unlink(missing_ok=True)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()

    def _write_offsets(self, index: BinaryIO) -> None:
        """Byte offset of each sequence in the .bin: the sum of the sizes before it."""
        sizes, total = _rewound(self._files["sizes"]), 0
        while block := sizes.read(_COPY_BYTES):
            lengths = np.frombuffer(block, np.int32).astype(np.int64)
            ends = total + np.cumsum(lengths)
            index.write(((ends - lengths) * self.dtype.itemsize).data)
            total = int(ends[-1])

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self._bin}: cannot be written: {error.strerror}") from None

    def _in_dtype(self, tokens: Tokens) -> Tokens:
        if tokens.dtype == self.dtype or not len(tokens):
            return tokens.astype(self.dtype, copy=False)
        limits = np.iinfo(self.dtype)
        for worst in (tokens.min(), tokens.max()):
            if not limits.min <= worst <= limits.max:
                raise DataError(f"{self.prefix}: token id {worst} does not fit {self.dtype}, which ends at {limits.max}")
        return tokens.astype(self.dtype)


def _open_at(path: Path, n_bytes: int) -> BinaryIO:
    """A file to append to and read, cut to `n_bytes`. Raises DataError if it has fewer."""
    if n_bytes and not path.is_file():
        raise DataError(f"{path}: gone since the run stopped; run again without --resume")
    file = path.open("r+b" if n_bytes else "w+b")
    if file.seek(0, os.SEEK_END) < n_bytes:
        raise DataError(f"{path}: shorter than when the run stopped: it is damaged; run again without --resume")
    file.truncate(n_bytes)
    file.seek(n_bytes)
    return file


def _rewound(file: BinaryIO) -> BinaryIO:
    file.seek(0)
    return file


class IndexedCorpus:
    """A pair of .bin and .idx, memory-mapped and checked when opened.

    Raises DataError for a missing, damaged, empty or mismatched file.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        bin_path, idx_path = files_of(prefix)
        _check_present(self.prefix, bin_path, idx_path)
        index = _map(idx_path)
        header = _read_header(idx_path, index)
        self.dtype: np.dtype[Any] = header.dtype
        ends = np.cumsum([_HEADER.size, 4 * header.n_sequences, 8 * header.n_sequences, 8 * header.n_bounds])
        self.sizes: npt.NDArray[np.int32] = index[ends[0] : ends[1]].view(np.int32)
        """Tokens in each sequence, int32 [sequences]."""
        self._offsets: npt.NDArray[np.int64] = index[ends[1] : ends[2]].view(np.int64)
        self.document_indices: npt.NDArray[np.int64] = index[ends[2] : ends[3]].view(np.int64)
        """The sequence at which each document begins, then the number of sequences, int64 [documents + 1]."""
        self.n_tokens = self._count_tokens(idx_path)
        self._check_bin(bin_path, idx_path)
        self.tokens: Tokens = _map(bin_path).view(self.dtype)
        """All tokens in the order of the file, [n_tokens]; mapped, for reading from end to end."""
        self._file = bin_path.open("rb", buffering=0)

    def read(self, sequence: int, offset: int = 0, length: int | None = None) -> Tokens:
        """Tokens `offset` to `offset + length` of one sequence (to its end if absent), read-only, [length].

        Read by a call, not through the mapping: a page that is not in memory then costs one read of what is asked (30
        times as fast, measured cold), other threads run meanwhile, and a file that was cut short since it was opened is
        an error and not the end of the process. Raises DataError for one.
        """
        size = int(self.sizes[sequence])
        length = size - offset if length is None else length
        assert 0 <= offset <= offset + length <= size, f"{offset} + {length} tokens asked of a sequence of {size}"
        start, n_bytes = int(self._offsets[sequence]) + offset * self.dtype.itemsize, length * self.dtype.itemsize
        content = self._pread(start, n_bytes)
        while len(content) < n_bytes:  # a call gives 2 GB at most
            more = self._pread(start + len(content), n_bytes - len(content))
            if not more:
                raise DataError(f"{self.prefix}.bin: ends before byte {start + n_bytes}: it was cut short since it was opened")
            content += more
        return np.frombuffer(content, self.dtype)

    def _pread(self, start: int, n_bytes: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), n_bytes, start)
        except OSError as error:
            raise DataError(f"{self.prefix}.bin: cannot be read at byte {start}: {error.strerror}") from None

    def _count_tokens(self, idx_path: Path) -> int:
        """Sum of the sizes; every offset must be where the sizes before it end."""
        n_tokens = 0
        for first in range(0, len(self.sizes), _CHECK_SEQUENCES):
            sizes = self.sizes[first : first + _CHECK_SEQUENCES].astype(np.int64)
            ends = n_tokens + np.cumsum(sizes)
            in_order = np.array_equal(self._offsets[first : first + len(sizes)], (ends - sizes) * self.dtype.itemsize)
            if sizes.min() < 0 or not in_order:
                raise DataError(f"{idx_path}: its sizes and offsets contradict each other: it is damaged; write the pair again")
            n_tokens = int(ends[-1])
        bounds = self.document_indices
        if len(bounds) < 1 or bounds[0] != 0 or bounds[-1] != len(self.sizes) or not _ascends(bounds):
            raise DataError(
                f"{idx_path}: its documents do not cover its {len(self.sizes)} sequences: it is damaged; write the pair again"
            )
        return n_tokens

    def _check_bin(self, bin_path: Path, idx_path: Path) -> None:
        if not self.n_tokens:
            raise DataError(f"{self.prefix}: an empty corpus: {idx_path.name} lists no tokens")
        expected, found = self.n_tokens * self.dtype.itemsize, bin_path.stat().st_size
        if found != expected:
            raise DataError(
                f"{bin_path}: {found} bytes, {'shorter' if found < expected else 'longer'} than the {expected} that "
                f"{idx_path.name} describes: it is damaged or of another corpus; copy or write both files again"
            )


def check_ids(tokens: Tokens, vocab_size: int, where: str) -> None:
    """Raise DataError if an id of `tokens`, of any shape, lies outside 0 ... vocab_size - 1."""
    if not tokens.size:
        return
    for worst in (int(tokens.max()), int(tokens.min())):
        if not 0 <= worst < vocab_size:
            raise DataError(
                f"{where}: token id {worst}, but the vocabulary has the ids 0 to {vocab_size - 1}; the data is damaged or "
                "was made with another tokenizer: use that one, or give model.vocab_size"
            )


def check_corpus(corpus: IndexedCorpus, vocab_size: int, most_bytes: int = MOST_CHECKED) -> None:
    """Raise DataError if the corpus has an id outside 0 ... vocab_size - 1.

    Reads all of a corpus up to `most_bytes`, a matter of seconds; of a larger one so many, spread evenly over it (the
    rest is looked at when it is used, in `sampler.py`).
    """
    limits = np.iinfo(corpus.dtype)
    if limits.min == 0 and limits.max < vocab_size:
        return
    chunks = -(-corpus.n_tokens // _CHECK_TOKENS)
    step = max(1.0, corpus.tokens.nbytes / most_bytes)
    for number in range(int(chunks / step) + 1):
        first = int(number * step) * _CHECK_TOKENS
        check_ids(corpus.tokens[first : first + _CHECK_TOKENS], vocab_size, corpus.prefix)


def _ascends(values: npt.NDArray[np.int64]) -> bool:
    """Looked at in parts: the whole may be large."""
    starts = range(0, len(values), _CHECK_SEQUENCES)
    return all(bool(np.all(np.diff(values[start : start + _CHECK_SEQUENCES + 1]) >= 0)) for start in starts)


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype[Any]
    n_sequences: int
    n_bounds: int


def _read_header(path: Path, index: npt.NDArray[np.uint8]) -> _Header:
    if bytes(index[: len(MAGIC)]) != MAGIC:
        raise DataError(f"{path}: not an index of Megatron's format: it does not begin with MMIDIDX")
    if len(index) < _HEADER.size:
        raise DataError(f"{path}: {len(index)} bytes, its header alone has {_HEADER.size}: it is truncated; copy it again")
    _, version, code, n_sequences, n_bounds = _HEADER.unpack(bytes(index[: _HEADER.size]))
    if version != VERSION:
        raise DataError(f"{path}: version {version} of the index format, but only version {VERSION} can be read")
    dtype = np.dtype(_DTYPE_OF_CODE[code]) if code in _DTYPE_OF_CODE else None
    if dtype is None or dtype not in _TOKEN_CODES:
        known = ", ".join(f"{number} ({kind})" for kind, number in _TOKEN_CODES.items())
        raise DataError(f"{path}: dtype code {code} is not one of tokens; those are {known}")
    expected = _HEADER.size + 12 * n_sequences + 8 * n_bounds
    if len(index) != expected:
        damage = "truncated" if len(index) < expected else "damaged, or multimodal, which is not read here"
        raise DataError(f"{path}: {len(index)} bytes, but its header describes {expected}: it is {damage}")
    return _Header(dtype, n_sequences, n_bounds)


def _check_present(prefix: str, bin_path: Path, idx_path: Path) -> None:
    missing = [path for path in (bin_path, idx_path) if not path.is_file()]
    if not missing:
        return
    folder = bin_path.parent
    if not folder.is_dir():
        raise DataError(f"{prefix}: no such corpus: the folder {folder} does not exist")
    if len(missing) == 1:
        raise DataError(f"{missing[0]}: missing, although its partner exists; copy or write both files again")
    pairs = sorted(path.name.removesuffix(".idx") for path in folder.glob("*.idx") if path.with_suffix(".bin").is_file())
    near = difflib.get_close_matches(bin_path.name.removesuffix(".bin"), pairs, n=1, cutoff=0.0)
    hint = f"nearest prefix there: {folder / near[0]}" if near else f"{folder} has no pair of .bin and .idx"
    raise DataError(f"{prefix}: no such corpus: {bin_path.name} and {idx_path.name} are missing; {hint}")


def _map(path: Path) -> npt.NDArray[np.uint8]:
    """The file's bytes, read from disk as they are touched."""
    try:
        if not path.stat().st_size:
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
