"""Read documents from files: JSON lines, Parquet or plain text, each also compressed with gzip (.gz) or Zstandard (.zst)."""

import codecs
import difflib
import glob
import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from megagpt.errors import DataError

TEXT_KEY = "text"
MAX_DOCUMENT_BYTES = 2**30
"""Longest document; without a limit, a file without line ends would fill the memory."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PARQUET = ".parquet"
NOT_DOCUMENTS = ("readme", "license", "licence", "citation", "copying", "dataset_infos.json", "dataset_info.json", "_success")
"""Names (or their beginnings) of files that describe a dataset; in a folder they are not documents."""
NOT_DOCUMENT_SUFFIXES = (".crc", ".md5", ".sha256", ".lock", ".metadata", ".idx", ".bin", ".model", ".vocab")
_BLOCK = 2**20
_PARQUET_ROWS = 256
"""Parquet rows in memory at a time."""

Texts = tuple[bytes, ...]
"""A document's text under each key, in the order of the keys, as UTF-8."""
Reject = Callable[[DataError], None]
"""Receives the error of a document that cannot be read: raises it, or returns to skip the document."""


def stop(error: DataError) -> None:
    """Raise the error: the strict `Reject`."""
    raise error


class InputSelection(NamedTuple):
    """Files that the inputs name."""

    files: list[Path]
    skipped: list[Path]
    """Files in folders that are not documents."""


def input_files(inputs: Sequence[str]) -> list[Path]:
    """Return the files of `select_input_files`."""
    return select_input_files(inputs).files


def select_input_files(inputs: Sequence[str]) -> InputSelection:
    """Find the files named by paths, globs and folders (with all folders below), each once, sorted within each input.

    In a folder these are skipped: hidden files and folders, files that describe the dataset (README, LICENSE, checksums),
    binary files, and, if there are JSON-lines or Parquet files, files of other types.
    Raises DataError if an input matches nothing.
    """
    files: dict[Path, Path] = {}
    skipped: list[Path] = []
    for item in inputs:
        path = Path(item).expanduser()
        if path.is_dir():
            matches, others = _documents_in(path)
            skipped += others
        elif path.is_file():
            matches = [path]
        else:
            matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207
        if not matches:
            raise DataError(f"--input {item}: no such file, folder or match{_nearest_file(path)}")
        for match in matches:
            files.setdefault(match.resolve(), match)
    return InputSelection(list(files.values()), skipped)


def _documents_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of a folder that are documents, and the others."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    candidates = [file for file in files if not _is_not_a_document(file.relative_to(folder))]
    structured = [file for file in candidates if _type_by_name(file) in ("json", "parquet")]
    documents = structured or [file for file in candidates if not _is_binary(file)]
    return documents, sorted(set(files) - set(documents))


def _is_not_a_document(path: Path) -> bool:
    name = path.name.lower()
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or name.startswith(NOT_DOCUMENTS) or name.endswith(NOT_DOCUMENT_SUFFIXES)


def _is_binary(path: Path) -> bool:
    """Return whether an uncompressed file has NUL bytes near its start, which text never has."""
    if path.suffix.lower() in COMPRESSIONS:
        return False
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(8192)
    except OSError:
        return False  # the error is reported when the file is read


def _type_by_name(path: Path) -> str | None:
    """Return "json", "parquet" or "text" by the file's name, or None if the name does not say it.

    Parts of a split file ("x.jsonl.1", "x.jsonl.aa") count as JSON lines.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSIONS]
    if suffixes and suffixes[-1] == PARQUET:
        return "parquet"
    if suffixes and (suffixes[-1] == ".json" or any(suffix in (".jsonl", ".ndjson") for suffix in suffixes)):
        return "json"
    return "text" if suffixes and suffixes[-1] not in (".txt", ".text") and not suffixes[-1][1:].isdigit() else None


class InputFile:
    """One file as a stream of documents; `position` is the number of its bytes read so far."""

    def __init__(self, path: Path, keys: Sequence[str], separator: str | None = None, reject: Reject = stop) -> None:
        """`keys`: names of the texts in JSON or Parquet; a name with dots ("document.content") reads a nested value.

        Plain text has the key "text" only; `separator` divides it into documents, else the file is one document.
        """
        self.path = path
        self.keys = list(keys)
        self.separator = separator
        self.reject = reject
        self.position = 0
        self._codec = COMPRESSIONS.get(path.suffix.lower())

    def __iter__(self) -> Iterator[Texts]:
        """Yield the documents in order.

        A document that cannot be read goes to `reject`, as DataError with the file and the line or row. Raises DataError
        if the file cannot be opened, is truncated, or is plain text while `keys` are not "text".
        """
        try:
            with self.path.open("rb") as raw:
                yield from self._reader()(raw)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise DataError(f"{self.path}: cannot be read: {reason}") from None

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the objects of JSON lines, or the rows of Parquet, each with its place for messages.

        A line that is no JSON object goes to `reject`. Raises DataError if the file cannot be opened or is plain text.
        """
        try:
            with self.path.open("rb") as raw:
                if (_type_by_name(self.path) or "json") == "parquet":
                    yield from self._parquet_records(raw)
                else:
                    yield from self._json_records(raw)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise DataError(f"{self.path}: cannot be read: {reason}") from None

    def _json_records(self, raw: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, line in enumerate(self._open(raw), 1):
            self.position = raw.tell()
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.isspace():
                continue
            place = f"{self.path}:{number}"
            try:
                record = json.loads(content.decode())
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield place, record
            else:
                self.reject(DataError(f"{place}: {_json_problem(content, [])}"))

    def _parquet_records(self, raw: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
        import pyarrow
        from pyarrow import parquet

        try:
            table = parquet.ParquetFile(raw)
            row = 0
            for batch in table.iter_batches(_PARQUET_ROWS):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{self.path}: row {row}", record
                self.position = self.path.stat().st_size * row // table.metadata.num_rows
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.path}: not a Parquet file: {str(error).splitlines()[0]}") from None

    def _reader(self) -> Callable[[BinaryIO], Iterator[Texts]]:
        kind = _type_by_name(self.path) or ("json" if self._starts_with_json() else "text")
        return {"json": self._json_lines, "parquet": self._parquet, "text": self._plain}[kind]

    def _starts_with_json(self) -> bool:
        """Return whether the first line is a JSON object with one of the keys: JSON lines under another name."""
        try:
            with self.path.open("rb") as raw:
                line = self._open(raw).readline(_BLOCK)
            record = json.loads(line.removeprefix(codecs.BOM_UTF8))
        except (ValueError, OSError, EOFError, RecursionError):
            return False  # an error of the file is reported when it is read
        return isinstance(record, dict) and any(_lookup(record, key) is not None for key in self.keys)

    def _open(self, raw: BinaryIO) -> BinaryIO:
        """Return the decompressed content as a stream; reading raises OSError or EOFError if the file is truncated."""
        if self._codec is None:
            return raw
        if self._codec == "gzip":  # pyarrow refuses files with zero padding, which gzip allows
            return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), _BLOCK))
        import pyarrow  # slow to import, and not needed for other files

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), self._codec)
        return io.BufferedReader(stream, _BLOCK)

    def _json_lines(self, raw: BinaryIO) -> Iterator[Texts]:
        file, number, keys = self._open(raw), 0, self.keys
        while line := file.readline(MAX_DOCUMENT_BYTES):
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if number % 64 == 0:
                self.position = raw.tell()
            try:
                record = json.loads(line.decode())
                texts = tuple([record[key].encode() for key in keys])
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                nested = _nested_texts(line, keys)
                if nested is not None:
                    yield nested
                    continue
                if line.isspace():
                    continue
                if len(line) == MAX_DOCUMENT_BYTES:
                    raise self._too_long(f"{self.path}:{number}", "a line") from None
                self.reject(DataError(f"{self.path}:{number}: {_json_problem(line, keys)}"))
                continue
            yield texts
        self.position = raw.tell()

    def _parquet(self, raw: BinaryIO) -> Iterator[Texts]:
        import pyarrow

        try:
            if self._codec is None:
                yield from self._parquet_rows(raw)
                return
            with tempfile.TemporaryFile() as decompressed:  # a Parquet file is read from its end
                shutil.copyfileobj(self._open(raw), decompressed, _BLOCK)
                yield from self._parquet_rows(decompressed)
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.path}: not a Parquet file: {str(error).splitlines()[0]}") from None

    def _parquet_rows(self, file: Any) -> Iterator[Texts]:
        import pyarrow
        from pyarrow import parquet

        table = parquet.ParquetFile(file)
        for key in self.keys:
            self._check_column(table.schema_arrow, key)
        row = 0
        for batch in table.iter_batches(_PARQUET_ROWS, columns=self.keys):
            columns = [_column(batch, key).cast(pyarrow.large_binary()).to_pylist() for key in self.keys]
            for texts in zip(*columns, strict=True):
                row += 1
                problem = next(filter(None, map(_text_problem, texts)), None)
                if problem is None:
                    yield texts
                else:
                    self.reject(DataError(f"{self.path}: row {row}: {problem}"))
            self.position = self.path.stat().st_size * row // table.metadata.num_rows

    def _check_column(self, schema: Any, key: str) -> None:
        """Raise DataError unless the column, or the field of a nested column, has text."""
        import pyarrow

        names = key.split(".") if key not in schema.names else [key]
        if names[0] not in schema.names:
            raise DataError(f"{self.path}: no column {key!r}{_nearest_key(key, schema.names)}")
        kind = schema.field(names[0]).type
        for name in names[1:]:
            if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
                raise DataError(f"{self.path}: no column {key!r}: {names[0]} has no field {name!r}; found {kind}")
            kind = kind.field(name).type
        if not any(check(kind) for check in _text_types(pyarrow.types)):
            raise DataError(f"{self.path}: the column {key!r} has no text; found {kind}")

    def _plain(self, raw: BinaryIO) -> Iterator[Texts]:
        if self.keys != [TEXT_KEY]:
            raise DataError(
                f"{self.path}: plain text has no keys, so --json-keys {' '.join(self.keys)} finds nothing in it; leave it out"
            )
        for number, text in enumerate(self._plain_documents(raw), 1):
            problem = _text_problem(text)
            if problem is None:
                yield (text,)
            else:
                document = f", document {number}" if self.separator else ""
                self.reject(DataError(f"{self.path}{document}: {problem}"))

    def _plain_documents(self, raw: BinaryIO) -> Iterator[bytes]:
        """Yield the documents of a plain-text file, which the separator divides."""
        file = self._open(raw)
        separator = self.separator.encode() if self.separator else None
        rest = file.read(_BLOCK).removeprefix(codecs.BOM_UTF8)
        while True:
            if separator is not None:
                *complete, rest = rest.split(separator)
                self.position = raw.tell()
                yield from complete
            # Reads grow with the unfinished document, so that a long one is not copied again and again.
            block = file.read(max(_BLOCK, len(rest)))
            if not block:
                break
            rest += block
            if len(rest) > MAX_DOCUMENT_BYTES:
                raise self._too_long(str(self.path), "a document")
        self.position = raw.tell()
        if rest:
            yield rest

    def _too_long(self, location: str, what: str) -> DataError:
        hint = "" if self.separator else "; divide plain text into documents with --text-separator"
        return DataError(f"{location}: {what} longer than {MAX_DOCUMENT_BYTES >> 20} MiB{hint}")


def unescape_separator(text: str) -> str:
    r"""Return a separator from the command line with its escapes (\n, \t, \r, \\, \x0c, \u2028) resolved.

    Raises DataError for an empty separator.
    """
    if not text:
        raise DataError(r"--text-separator: is empty; expected text, for example '\n\n' for a blank line")
    escapes = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "0": "\0", "\\": "\\"}
    result, position = [], 0
    while position < len(text):
        letter = text[position + 1 : position + 2]
        if text[position] != "\\" or not letter:
            result.append(text[position])
            position += 1
        elif letter in escapes:
            result.append(escapes[letter])
            position += 2
        elif letter in "xu" and _is_hex(digits := text[position + 2 : position + (4 if letter == "x" else 6)], letter):
            result.append(chr(int(digits, 16)))
            position += 2 + len(digits)
        else:
            raise DataError(rf"--text-separator: unknown escape \{letter}; known: \n \t \r \f \0 \\ \x0c \u2028")
    return "".join(result)


def _is_hex(digits: str, letter: str) -> bool:
    return len(digits) == (2 if letter == "x" else 4) and all(digit in "0123456789abcdefABCDEF" for digit in digits)


def _lookup(record: Any, key: str) -> Any:
    """Return the value under a key, or under a path of keys with dots; None if there is none."""
    if isinstance(record, dict) and key in record:
        return record[key]
    value = record
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return value


def _nested_texts(line: bytes, keys: Sequence[str]) -> Texts | None:
    """Return a document whose texts are nested values; None if one is missing."""
    if not any("." in key for key in keys):
        return None
    try:
        record = json.loads(line.decode())
        values = [_lookup(record, key) for key in keys]
        return tuple(value.encode() for value in values)
    except (ValueError, AttributeError, RecursionError):
        return None


def _column(batch: Any, key: str) -> Any:
    """Return a column, or the field of a nested column."""
    import pyarrow.compute

    if key in batch.schema.names:
        return batch.column(key)
    first, *rest = key.split(".")
    return pyarrow.compute.struct_field(batch.column(first), rest)


def _json_problem(line: bytes, keys: Sequence[str]) -> str:
    """Return what is wrong with a line of JSON that could not be read."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 text: {error.reason} at byte {error.start} of the line"
    except RecursionError:
        return "not valid JSON: nested too deeply"
    except ValueError as error:
        return f"not valid JSON (every line must be one JSON object): {error}"
    if not isinstance(record, dict):
        return f"expected a JSON object, found {_json_type(record)}"
    for key in keys:
        value = _lookup(record, key)
        if value is None and key not in record:
            return f"no key {key!r}{_nearest_key(key, list(record))}"
        if not isinstance(value, str):
            return f"no text under the key {key!r}; found {_json_type(value)}"
    return "has half of a surrogate pair (\\ud800 ... \\udfff alone), which is not a character"


def _json_type(value: Any) -> str:
    """Return the JSON name of a value's type."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def _text_problem(text: bytes | None) -> str | None:
    """Return what is wrong with a text, or None."""
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
    return f"; nearest: {near[0]!r} (select it with --json-keys)" if near else ""


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist"
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    return f"; nearest: {path.parent / near[0]}" if near else ""
