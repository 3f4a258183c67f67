"""Documents out of text files: JSONL, one to a line, or plain text, one to a file or between separators."""

import difflib
import glob
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megagpt.errors import DataError

TEXT_KEY = "text"
Document = dict[str, str]
"""A document's text by key."""
Reject = Callable[[DataError], None]
"""Told of a document that cannot be read: raises the error, or returns to go on without the document."""


def stop(error: DataError) -> None:
    """The strict `Reject`."""
    raise error


def input_files(inputs: Sequence[str]) -> list[Path]:
    """Files named by paths, globs and folders (all files below them), in sorted order each. Raises DataError for none."""
    found: list[Path] = []
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
        found += files
    return found


def read_documents(path: Path, keys: Sequence[str], separator: str | None = None, reject: Reject = stop) -> Iterator[Document]:
    """The documents of one file, each with its text under every key; plain text has the key "text" alone.

    JSON that is broken or lacks a key (a line), and bytes that are not UTF-8 (a line, or a file of plain text), go to
    `reject` as DataError with file and line. Raises DataError for a file that cannot be opened, and for plain text
    where `keys` asks for anything but "text".
    """
    try:
        if path.suffix in (".jsonl", ".json"):
            yield from _json_lines(path, keys, reject)
            return
        if list(keys) != [TEXT_KEY]:
            raise DataError(
                f"{path}: plain text has no keys, so --json-keys {' '.join(keys)} finds nothing in it; leave it out"
            )
        yield from _plain(path, separator, reject)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _json_lines(path: Path, keys: Sequence[str], reject: Reject) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                document = _texts(line, keys)
            except ValueError as error:
                reject(DataError(f"{path}:{number}: {error}"))
                continue
            yield document


def _texts(line: bytes, keys: Sequence[str]) -> Document:
    """Raises ValueError that says what is wrong with the line."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start} of the line") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON, of which every line needs one object: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    for key in keys:
        if key not in record:
            near = difflib.get_close_matches(key, list(record), n=1, cutoff=0.0)
            raise ValueError(f"no key {key!r}" + (f"; nearest: {near[0]!r} (choose with --json-keys)" if near else ""))
        if not isinstance(record[key], str):
            raise ValueError(f"no text under the key {key!r}; found {type(record[key]).__name__}")
    return {key: record[key] for key in keys}


def _plain(path: Path, separator: str | None, reject: Reject) -> Iterator[Document]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if separator is None:
                yield {TEXT_KEY: file.read()}
                return
            rest = ""
            while block := file.read(2**20):
                *whole, rest = (rest + block).split(separator)
                yield from ({TEXT_KEY: text} for text in whole)
            yield {TEXT_KEY: rest}
    except UnicodeDecodeError as error:
        reject(DataError(f"{path}: not UTF-8 text: {error.reason}"))


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist"
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    return f"; nearest: {path.parent / near[0]}" if near else ""
