"""Documents out of files: JSONL, Parquet or plain text, each also compressed with gzip (.gz) or Zstandard (.zst)."""

import codecs
import difflib
import glob
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megagpt.errors import DataError

TEXT_KEY = "text"
LONGEST_DOCUMENT = 2**30
"""Bytes of the longest document that is read; a file without line ends must not fill the memory."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK = 2**20
_ROWS = 256
"""Parquet rows held at a time."""

Texts = tuple[bytes, ...]
"""A document's text under each key, in the order of the keys, as UTF-8."""
Reject = Callable[[DataError], None]
"""Told of a document that cannot be read: raises the error, or returns to go on without the document."""


def stop(error: DataError) -> None:
    """The strict `Reject`."""
    raise error


def input_files(inputs: Sequence[str]) -> list[Path]:
    """Files named by paths, globs and folders (all files below them), in sorted order each; each file once.

    Raises DataError where a name matches none.
    """
    found: dict[Path, Path] = {}
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(item, recursive=True) if Path(name).is_file())  # noqa: PTH207
        if not files:
            raise DataError(f"--input {item}: no such file, folder or match{_nearest(path)}")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


class InputFile:
    """One file as a stream of documents; `position` says how many of its bytes have been read."""

    def __init__(self, path: Path, keys: Sequence[str], separator: str | None = None, reject: Reject = stop) -> None:
        """Plain text is one document, or what stands between `separator`s, under the key "text" alone."""
        self.path, self.keys, self.separator, self.reject = path, list(keys), separator, reject
        self.position = 0
        suffixes = path.suffixes
        self._codec = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
        inner = suffixes[-2:-1] if self._codec else suffixes[-1:]
        self._suffix = inner[0] if inner else ""

    def __iter__(self) -> Iterator[Texts]:
        """The documents in order.

        One that cannot be read goes to `reject`, as DataError with the file and the line or row. Raises DataError for
        a file that cannot be opened, is truncated, or has plain text where `keys` asks for anything but "text".
        """
        read = {".jsonl": self._json_lines, ".json": self._json_lines, ".ndjson": self._json_lines, ".parquet": self._parquet}
        try:
            with self.path.open("rb") as raw:
                yield from read.get(self._suffix, self._plain)(raw)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise DataError(f"{self.path}: cannot be read: {reason}") from None

    def _open(self, raw: BinaryIO) -> BinaryIO:
        """The file's content, decompressed as it is read; raises OSError where it ends too early."""
        if self._codec is None:
            return raw
        import pyarrow  # takes long to import, and plain files do without

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), self._codec)
        return io.BufferedReader(stream, _BLOCK)

    def _json_lines(self, raw: BinaryIO) -> Iterator[Texts]:
        file, number, keys = self._open(raw), 0, self.keys
        while line := file.readline(LONGEST_DOCUMENT):
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if number % 64 == 0:
                self.position = raw.tell()
            try:
                record = json.loads(line.decode())
                texts = tuple([record[key].encode() for key in keys])
            except (ValueError, TypeError, KeyError, AttributeError):  # seldom: which of them it is, is found out then
                if line.isspace():
                    continue
                if len(line) == LONGEST_DOCUMENT:
                    raise self._too_long(f"{self.path}:{number}", "a line") from None
                self.reject(DataError(f"{self.path}:{number}: {_what_is_wrong(line, keys)}"))
                continue
            yield texts
        self.position = raw.tell()

    def _parquet(self, raw: BinaryIO) -> Iterator[Texts]:
        import pyarrow

        try:
            if self._codec is None:
                yield from self._rows(raw)
                return
            with tempfile.TemporaryFile() as whole:  # Parquet is read from its end
                shutil.copyfileobj(self._open(raw), whole, _BLOCK)
                yield from self._rows(whole)
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.path}: not a Parquet file: {str(error).splitlines()[0]}") from None

    def _rows(self, file: Any) -> Iterator[Texts]:
        import pyarrow
        from pyarrow import parquet

        table = parquet.ParquetFile(file)
        for key in self.keys:
            if key not in table.schema_arrow.names:
                raise DataError(f"{self.path}: no column {key!r}{_nearest_key(key, table.schema_arrow.names)}")
            kind = table.schema_arrow.field(key).type
            if not any(check(kind) for check in _text_types(pyarrow.types)):
                raise DataError(f"{self.path}: the column {key!r} has no text; found {kind}")
        row = 0
        for batch in table.iter_batches(_ROWS, columns=self.keys):
            columns = [batch.column(key).cast(pyarrow.large_binary()).to_pylist() for key in self.keys]
            for texts in zip(*columns, strict=True):
                row += 1
                problem = next(filter(None, map(_wrong_text, texts)), None)
                if problem is None:
                    yield texts
                else:
                    self.reject(DataError(f"{self.path}: row {row}: {problem}"))
            self.position = self.path.stat().st_size * row // table.metadata.num_rows

    def _plain(self, raw: BinaryIO) -> Iterator[Texts]:
        if self.keys != [TEXT_KEY]:
            raise DataError(
                f"{self.path}: plain text has no keys, so --json-keys {' '.join(self.keys)} finds nothing in it; leave it out"
            )
        for number, text in enumerate(self._pieces(raw), 1):
            problem = _wrong_text(text)
            if problem is None:
                yield (text,)
            else:
                place = f", document {number}" if self.separator else ""
                self.reject(DataError(f"{self.path}{place}: {problem}"))

    def _pieces(self, raw: BinaryIO) -> Iterator[bytes]:
        file = self._open(raw)
        separator = self.separator.encode() if self.separator else None
        rest = file.read(_BLOCK).removeprefix(codecs.BOM_UTF8)
        while True:
            if separator is not None:
                *whole, rest = rest.split(separator)
                self.position = raw.tell()
                yield from whole
            # Reads grow with what is held, so that a long document is not copied over and over.
            block = file.read(max(_BLOCK, len(rest)))
            if not block:
                break
            rest += block
            if len(rest) > LONGEST_DOCUMENT:
                raise self._too_long(str(self.path), "a document")
        self.position = raw.tell()
        if rest:
            yield rest

    def _too_long(self, where: str, what: str) -> DataError:
        hint = "" if self.separator else "; plain text is cut into documents by --text-separator"
        return DataError(f"{where}: {what} longer than {LONGEST_DOCUMENT >> 20} MiB{hint}")


def _what_is_wrong(line: bytes, keys: Sequence[str]) -> str:
    """With a line of JSON that could not be read."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 text: {error.reason} at byte {error.start} of the line"
    except ValueError as error:
        return f"not valid JSON, of which every line needs one object: {error}"
    if not isinstance(record, dict):
        return f"expected a JSON object, found {type(record).__name__}"
    for key in keys:
        if key not in record:
            return f"no key {key!r}{_nearest_key(key, list(record))}"
        if not isinstance(record[key], str):
            return f"no text under the key {key!r}; found {type(record[key]).__name__}"
    return "has half of a surrogate pair (\\ud800 ... \\udfff alone), which is no character"


def _wrong_text(text: bytes | None) -> str | None:
    """What is wrong with a text; None if nothing is."""
    if text is None:
        return "no text (null)"
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 text: {error.reason} at byte {error.start}"
    return None


def _text_types(types: Any) -> list[Callable[[Any], bool]]:
    return [types.is_string, types.is_large_string, types.is_binary, types.is_large_binary]


def _nearest_key(key: str, keys: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    return f"; nearest: {near[0]!r} (choose with --json-keys)" if near else ""


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist"
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    return f"; nearest: {path.parent / near[0]}" if near else ""
