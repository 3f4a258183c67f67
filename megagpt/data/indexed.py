"""Token files: Megatron's MMIDIDX format, version 1, a .bin file of tokens and an .idx file that divides it into sequences.

The .idx is little-endian without padding: magic (9 bytes), version (uint64), dtype code (uint8), number of sequences
(uint64), number of document bounds (uint64), then tokens of each sequence (int32), byte offset of each sequence in the .bin
(int64), and the first sequence of each document, with the number of sequences as last entry (int64).
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
"""Token ids, one-dimensional, in the integer type of a file."""

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_TOKEN_CODES = {np.dtype(kind): code for code, kind in _DTYPE_OF_CODE.items() if np.issubdtype(kind, np.integer)}
_COPY_BYTES = 1 << 24
MAX_CHECKED_BYTES = 2**32
"""Bytes of tokens that are checked before a run, which takes seconds."""
CHECK_BLOCK = 1 << 22
"""Tokens that are checked at a time."""
_CHECK_SEQUENCES = 1 << 20
"""Sequences whose sizes and offsets are checked at a time when a corpus is opened."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type in which Megatron stores ids below `vocab_size`: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def files_of(prefix: str | Path) -> tuple[Path, Path]:
    """Return the paths of the .bin and the .idx file of `prefix`, which may contain dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class WriterPosition(NamedTuple):
    """What a writer has written so far."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class IndexedWriter:
    """Writes documents to `prefix`.bin and `prefix`.idx as a stream, in constant memory.

    The data goes to temporary files, which get their names when a `with` block succeeds, the .idx last, so that a reader
    never sees an incomplete pair; if the block fails they are removed. A suspended writer can be continued from any
    earlier position. Raises DataError if the files cannot be written, an id does not fit `dtype`, or there is no document.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, start: WriterPosition | None = None) -> None:
        """`start`: continue from here with the files of a suspended writer of the same `prefix`."""
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        assert self.dtype in _TOKEN_CODES, f"{self.dtype} is not an integer type of the format"
        self._bin, self._idx = files_of(prefix)
        names = ("tokens", "sizes", "documents", "idx")
        self._temporary = {name: self._bin.with_name(f"{self._bin.name}.{name}.tmp") for name in names}
        self._files: dict[str, BinaryIO] = {}
        start = start or WriterPosition()
        self.n_tokens = start.tokens
        self.n_sequences = start.sequences
        self.n_documents = start.documents
        with self._named_errors():
            self._bin.parent.mkdir(parents=True, exist_ok=True)
            for name, itemsize, count in (
                ("tokens", self.dtype.itemsize, self.n_tokens),
                ("sizes", 4, self.n_sequences),
                ("documents", 8, self.n_documents),
            ):
                self._files[name] = _open_at(self._temporary[name], itemsize * count)

    @property
    def position(self) -> WriterPosition:
        """What has been written so far."""
        return WriterPosition(self.n_tokens, self.n_sequences, self.n_documents)

    def add_document(self, *sequences: npt.ArrayLike) -> None:
        """Append one document; for GPT it is a single sequence of token ids."""
        arrays = [np.asarray(sequence) for sequence in sequences]
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, self.dtype)
        self._add(tokens, [len(array) for array in arrays], [self.n_sequences + len(arrays)])

    def add_documents(self, tokens: Tokens, sizes: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append documents of one sequence each. `tokens`: all of them concatenated; `sizes`: tokens of each."""
        self._add(tokens, sizes, np.arange(1, len(sizes) + 1, dtype=np.int64) + self.n_sequences)

    def _add(self, tokens: Tokens, sizes: npt.ArrayLike, documents: npt.ArrayLike) -> None:
        """Append sequences of `sizes` tokens each, and the sequence numbers where documents end."""
        lengths, ends = np.asarray(sizes, np.int32), np.asarray(documents, np.int64)
        assert len(tokens) == lengths.sum(dtype=np.int64), "sizes do not add up to the tokens"
        with self._named_errors():
            for name, values in (("tokens", self._in_dtype(tokens)), ("sizes", lengths), ("documents", ends)):
                self._files[name].write(np.ascontiguousarray(values).data)
        self.n_tokens += len(tokens)
        self.n_sequences += len(lengths)
        self.n_documents += len(ends)

    def sync(self) -> None:
        """Flush everything to disk, so that it survives a crash."""
        with self._named_errors():
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())

    def suspend(self) -> None:
        """Close the temporary files and leave them for a writer that continues."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # full disk: data that is lost here was not synced either
                file.close()

    def close(self) -> None:
        """Write the .idx file and give both files their names."""
        if not self.n_tokens:
            raise DataError(f"{self.prefix}: not written, because the input has no document with a token")
        self.sync()
        with self._named_errors():
            self._finish()

    def _finish(self) -> None:
        with self._temporary["idx"].open("wb") as index:
            index.write(_HEADER.pack(MAGIC, VERSION, _TOKEN_CODES[self.dtype], self.n_sequences, self.n_documents + 1))
            shutil.copyfileobj(_rewound(self._files["sizes"]), index, _COPY_BYTES)
            self._write_offsets(index)
            index.write(bytes(8))  # the first document starts at sequence 0
            shutil.copyfileobj(_rewound(self._files["documents"]), index, _COPY_BYTES)
            index.flush()
            os.fsync(index.fileno())
        self._idx.unlink(missing_ok=True)  # an older index must never describe the newer .bin
        self._temporary["tokens"].replace(self._bin)
        self._temporary["idx"].replace(self._idx)

    def discard(self) -> None:
        """Remove the temporary files."""
        self.suspend()
        for path in self._temporary.values():
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
        """Write the byte offset of each sequence in the .bin file: the sum of the sizes before it."""
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
    """Open a file for appending and reading, truncated to `n_bytes`. Raises DataError if it is shorter."""
    if n_bytes and not path.is_file():
        raise DataError(f"{path}: missing since the run stopped; run again without --resume")
    file = path.open("r+b" if n_bytes else "w+b")
    if file.seek(0, os.SEEK_END) < n_bytes:
        raise DataError(f"{path}: shorter than when the run stopped, so it is damaged; run again without --resume")
    file.truncate(n_bytes)
    file.seek(n_bytes)
    return file


def _rewound(file: BinaryIO) -> BinaryIO:
    file.seek(0)
    return file


class IndexedCorpus:
    """A pair of .bin and .idx files, memory-mapped and checked when opened.

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
        """First sequence of each document, then the number of sequences, int64 [documents + 1]."""
        self.n_tokens = self._count_tokens(idx_path)
        self._check_bin(bin_path, idx_path)
        self.tokens: Tokens = _map(bin_path).view(self.dtype)
        """All tokens in file order, [n_tokens]; mapped, for sequential reading."""
        self._file = bin_path.open("rb", buffering=0)
        self._idx_file = idx_path.open("rb", buffering=0)
        self._idx_status = self._idx_signature()

    def require_unchanged(self) -> None:
        """Raise DataError if the .idx file was changed in place since it was opened.

        The index is mapped: reading a page that was truncated away would end the process with SIGBUS. A file that was
        replaced by renaming another one is no problem, because the mapped one continues to exist.
        """
        if self._idx_signature() != self._idx_status:
            raise DataError(f"{self.prefix}.idx: changed since it was opened; write new pairs under another name")

    def _idx_signature(self) -> tuple[int, int]:
        status = os.fstat(self._idx_file.fileno())
        return status.st_size, status.st_mtime_ns

    def read(self, sequence: int, offset: int = 0, length: int | None = None) -> Tokens:
        """Return tokens `offset` to `offset + length` of a sequence (to its end if absent), read-only, [length].

        Uses a read call, not the mapping: a page that is not in memory then costs one read of the requested size (30 times
        as fast when cold), other threads continue meanwhile, and a file that was truncated since it was opened is an error
        instead of the end of the process. Raises DataError in that case.
        """
        size = int(self.sizes[sequence])
        length = size - offset if length is None else length
        assert 0 <= offset <= offset + length <= size, f"{offset} + {length} tokens requested from a sequence of {size}"
        start, n_bytes = int(self._offsets[sequence]) + offset * self.dtype.itemsize, length * self.dtype.itemsize
        content = self._pread(start, n_bytes)
        while len(content) < n_bytes:  # one call returns 2 GB at most
            more = self._pread(start + len(content), n_bytes - len(content))
            if not more:
                raise DataError(f"{self.prefix}.bin: ends before byte {start + n_bytes}: it was truncated since it was opened")
            content += more
        return np.frombuffer(content, self.dtype)

    def _pread(self, start: int, n_bytes: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), n_bytes, start)
        except OSError as error:
            raise DataError(f"{self.prefix}.bin: cannot be read at byte {start}: {error.strerror}") from None

    def _count_tokens(self, idx_path: Path) -> int:
        """Return the sum of the sizes. Raises DataError unless every offset is the sum of the sizes before it."""
        n_tokens = 0
        for first in range(0, len(self.sizes), _CHECK_SEQUENCES):
            sizes = self.sizes[first : first + _CHECK_SEQUENCES].astype(np.int64)
            ends = n_tokens + np.cumsum(sizes)
            in_order = np.array_equal(self._offsets[first : first + len(sizes)], (ends - sizes) * self.dtype.itemsize)
            if sizes.min() < 0 or not in_order:
                raise DataError(
                    f"{idx_path}: its sizes and offsets contradict each other, so it is damaged; write the pair again"
                )
            n_tokens = int(ends[-1])
        bounds = self.document_indices
        if len(bounds) < 1 or bounds[0] != 0 or bounds[-1] != len(self.sizes) or not _never_decreases(bounds):
            raise DataError(
                f"{idx_path}: its documents do not cover its {len(self.sizes)} sequences, so it is damaged; "
                "write the pair again"
            )
        return n_tokens

    def _check_bin(self, bin_path: Path, idx_path: Path) -> None:
        if not self.n_tokens:
            raise DataError(f"{self.prefix}: empty corpus: {idx_path.name} lists no tokens")
        expected, actual = self.n_tokens * self.dtype.itemsize, bin_path.stat().st_size
        if actual != expected:
            raise DataError(
                f"{bin_path}: {actual} bytes, {'shorter' if actual < expected else 'longer'} than the {expected} that "
                f"{idx_path.name} describes: it is damaged or belongs to another corpus; copy or write both files again"
            )


def check_ids(tokens: Tokens, vocab_size: int, where: str) -> None:
    """Raise DataError if an id in `tokens`, of any shape, is outside 0 ... vocab_size - 1.

    `where`: name of the tokens in the message.
    """
    if not tokens.size:
        return
    for worst in (int(tokens.max()), int(tokens.min())):
        if not 0 <= worst < vocab_size:
            raise DataError(
                f"{where}: token id {worst}, but the vocabulary has the ids 0 to {vocab_size - 1}; the data is damaged or "
                "was written with another tokenizer: use that tokenizer, or set model.vocab_size"
            )


def check_corpus(
    corpus: IndexedCorpus, vocab_size: int, max_bytes: int = MAX_CHECKED_BYTES, block_tokens: int = CHECK_BLOCK
) -> None:
    """Raise DataError if the corpus has an id outside 0 ... vocab_size - 1.

    Reads the entire corpus if it has at most `max_bytes`; of a larger one `max_bytes`, in blocks of `block_tokens` spread
    evenly over it. The rest is checked when it is used, in `sampler.py`.
    """
    limits = np.iinfo(corpus.dtype)
    if limits.min == 0 and limits.max < vocab_size:
        return
    n_blocks = -(-corpus.n_tokens // block_tokens)
    step = max(1.0, corpus.tokens.nbytes / max_bytes)
    for number in range(int(n_blocks / step) + 1):
        first = int(number * step) * block_tokens
        check_ids(corpus.tokens[first : first + block_tokens], vocab_size, corpus.prefix)


def _never_decreases(values: npt.NDArray[np.int64]) -> bool:
    """Return whether the values never decrease. Checked block by block to use little memory."""
    starts = range(0, len(values), _CHECK_SEQUENCES)
    return all(bool(np.all(np.diff(values[start : start + _CHECK_SEQUENCES + 1]) >= 0)) for start in starts)


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype[Any]
    n_sequences: int
    n_bounds: int


def _read_header(path: Path, index: npt.NDArray[np.uint8]) -> _Header:
    if bytes(index[: len(MAGIC)]) != MAGIC:
        raise DataError(f"{path}: not an index file in Megatron's format: it does not start with MMIDIDX")
    if len(index) < _HEADER.size:
        raise DataError(f"{path}: {len(index)} bytes, but its header has {_HEADER.size}: it is truncated; copy it again")
    _, version, code, n_sequences, n_bounds = _HEADER.unpack(bytes(index[: _HEADER.size]))
    if version != VERSION:
        raise DataError(f"{path}: version {version} of the index format, but only version {VERSION} can be read")
    dtype = np.dtype(_DTYPE_OF_CODE[code]) if code in _DTYPE_OF_CODE else None
    if dtype is None or dtype not in _TOKEN_CODES:
        known = ", ".join(f"{number} ({kind})" for kind, number in _TOKEN_CODES.items())
        raise DataError(f"{path}: dtype code {code} is not a token type; token types are {known}")
    expected = _HEADER.size + 12 * n_sequences + 8 * n_bounds
    if len(index) != expected:
        damage = "truncated" if len(index) < expected else "damaged, or multimodal, which is not supported"
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
        raise DataError(f"{missing[0]}: missing, although the other file of the pair exists; copy or write both files again")
    pairs = sorted(path.name.removesuffix(".idx") for path in folder.glob("*.idx") if path.with_suffix(".bin").is_file())
    near = difflib.get_close_matches(bin_path.name.removesuffix(".bin"), pairs, n=1, cutoff=0.0)
    hint = f"nearest prefix there: {folder / near[0]}" if near else f"{folder} has no pair of .bin and .idx"
    raise DataError(f"{prefix}: no such corpus: {bin_path.name} and {idx_path.name} are missing; {hint}")


def _map(path: Path) -> npt.NDArray[np.uint8]:
    """Return the bytes of a file as a memory map."""
    try:
        if not path.stat().st_size:
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
