"""A checkpoint carries the tokenizer of its run, so that it can be moved and still turn tokens into text.

The files are in the folder `tokenizer` of the checkpoint, under the names that Hugging Face uses, and the manifest has the
size and SHA-256 of each. They are read once at the start of a run, so a file that changes later does not matter.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from megagpt.checkpoint.files import fsync_folder, sha256_of_file
from megagpt.checkpoint.format import Manifest, TokenizerFileRecord, TokenizerRecord, content_problem
from megagpt.data.tokenizer import MAX_TOKENIZER_BYTES, tokenizer_files
from megagpt.errors import CheckpointError, DataError, listed
from megagpt.regular_file import read_regular_file

FOLDER = "tokenizer"


class RunTokenizer(NamedTuple):
    """The tokenizer of a run, in memory."""

    name: str
    """Path of the tokenizer in the run's config, or "byte"."""
    files: dict[str, bytes]
    """File name -> content; empty for "byte"."""

    def record(self) -> TokenizerRecord:
        """Return the entry of a manifest."""
        files = [
            TokenizerFileRecord(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for name, content in self.files.items()
        ]
        return TokenizerRecord(name=self.name, files=files)


def read_tokenizer(path: str) -> RunTokenizer:
    """Read the files of the tokenizer at `path`, as `load_tokenizer` finds them. Raises DataError."""
    files = {}
    for name, file in tokenizer_files(path).items():
        try:
            files[name] = read_regular_file(file, MAX_TOKENIZER_BYTES)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from None
    return RunTokenizer(path, files)


def read_carried(folder: Path, manifest: Manifest) -> RunTokenizer | None:
    """Read the tokenizer of a verified checkpoint, under its original name; None if it carries none."""
    if manifest.tokenizer is None:
        return None
    files = {
        file.name: read_regular_file(folder / FOLDER / file.name, MAX_TOKENIZER_BYTES) for file in manifest.tokenizer.files
    }
    return RunTokenizer(manifest.tokenizer.name, files)


def carried_path(folder: Path, manifest: Manifest) -> str | None:
    """Return the path of the checkpoint's tokenizer for `load_tokenizer`, or None if it carries none."""
    if manifest.tokenizer is None:
        return None
    if manifest.tokenizer.files:
        return str(folder / FOLDER)
    return "byte" if manifest.tokenizer.name == "byte" else None


def with_tokenizer(folder: Path, manifest: Manifest, tokenizer: RunTokenizer | None) -> Manifest:
    """Write the tokenizer's files to a checkpoint's folder, durably; return the manifest that lists them.

    Raises CheckpointError if the data read back differs.
    """
    if tokenizer is None:
        return manifest
    record = tokenizer.record()
    if tokenizer.files:
        (folder / FOLDER).mkdir()
    for file in record.files:
        path = folder / FOLDER / file.name
        with path.open("wb") as stream:
            stream.write(tokenizer.files[file.name])
            stream.flush()
            os.fsync(stream.fileno())
        if sha256_of_file(path, from_disk=True) != file.sha256:
            raise CheckpointError(f"{path}: the data read back differs from the data written")
    if tokenizer.files:
        fsync_folder(folder / FOLDER)
    return manifest.model_copy(update={"tokenizer": record})


def folders_of(manifest: Manifest) -> set[str]:
    """Return the names of the folders that belong to the checkpoint."""
    return {FOLDER} if manifest.tokenizer is not None and manifest.tokenizer.files else set()


def tokenizer_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Return one sentence for each file of the tokenizer that is missing, damaged or not in the manifest.

    Raises StorageError if a file cannot be read, which says nothing about its content.
    """
    if not folders_of(manifest) or manifest.tokenizer is None:
        return []
    records = manifest.tokenizer.files
    problems = [problem for record in records if (problem := _file_problem(folder / FOLDER, record)) is not None]
    present = {path.name for path in (folder / FOLDER).iterdir()} if (folder / FOLDER).is_dir() else set()
    foreign = sorted(name for name in present - {record.name for record in records} if not name.startswith("."))
    return problems + [f"{folder / FOLDER / name}: not a file of this checkpoint; move it elsewhere" for name in foreign]


def tokenizer_change(folder: Path, manifest: Manifest, tokenizer: RunTokenizer | None) -> str | None:
    """Return a warning if a run resumes with another tokenizer than the checkpoint's; None if they are equal.

    `tokenizer`: the run's; None if its config names none.
    """
    if tokenizer is None:
        return None
    saved = manifest.tokenizer
    if saved is None:
        data = manifest.config.get("data")
        name = data.get("tokenizer") if isinstance(data, dict) else None
        if name in (None, tokenizer.name):
            return None
        return (
            f"data.tokenizer: {tokenizer.name}, but {folder} was saved with {name}, of which it has no copy to compare: "
            "if they differ, tokens have another meaning than the model has learned"
        )
    record = tokenizer.record()
    now, before = ({file.name: file.sha256 for file in one.files} for one in (record, saved))
    if now == before and (now or saved.name == tokenizer.name):
        return None
    names = [name for name in sorted(now.keys() | before.keys()) if now.get(name) != before.get(name)]
    difference = f" (different: {listed(names)})" if now.keys() & before.keys() else ""
    kept = f", kept in {folder / FOLDER}" if before else ""
    return (
        f"data.tokenizer: {tokenizer.name} is not the tokenizer of {folder}, which is {saved.name}{kept}{difference}: tokens "
        "may have another meaning than the model has learned"
    )


def _file_problem(folder: Path, record: TokenizerFileRecord) -> str | None:
    path = folder / record.name
    try:
        return content_problem(path, record.bytes, record.sha256)
    except OSError as error:
        return f"{path}: {error.strerror}; a file of the checkpoint's tokenizer"
