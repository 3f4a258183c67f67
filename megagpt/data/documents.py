"""Documents out of text files: JSONL, one to a line, or plain text, one to a file or between separators."""

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megagpt.errors import DataError

TEXT_KEY = "text"


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
            raise DataError(f"--input {item}: no such file, folder or match")
        found += files
    return found


def read_documents(path: Path, keys: Sequence[str], separator: str | None = None) -> Iterator[dict[str, str]]:
    """The documents of one file, each with its text under every key; plain text has the key "text" alone.

    Raises DataError with file and line for JSON that is broken or lacks a key, and for bytes that are not UTF-8.
    """
    try:
        if path.suffix in (".jsonl", ".json"):
            yield from _json_lines(path, keys)
        else:
            yield from _plain(path, separator)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _json_lines(path: Path, keys: Sequence[str]) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not valid JSON: {error}") from None
            for key in keys:
                if not isinstance(record, dict) or not isinstance(record.get(key), str):
                    there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                    raise DataError(f"{path}:{number}: no text under the key {key!r}; found {there}")
            yield {key: record[key] for key in keys}


def _plain(path: Path, separator: str | None) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        if separator is None:
            yield {TEXT_KEY: file.read()}
            return
        rest = ""
        while block := file.read(2**20):
            *whole, rest = (rest + block).split(separator)
            yield from ({TEXT_KEY: text} for text in whole)
        yield {TEXT_KEY: rest}
