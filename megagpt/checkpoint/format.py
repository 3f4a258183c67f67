"""Checkpoint format on disk: safetensors and JSON, no pickles, independent of the parallel layout.

    DIR/latest                          name of the newest checkpoint
    DIR/step_00000100/manifest.json     step, config, files with size, SHA-256 and host, boxes of every tensor
    DIR/step_00000100/manifest.sha256   checksum of the manifest, in the format of `sha256sum --check`
    DIR/step_00000100/rank_00003.safetensors
    DIR/step_00000100/tokenizer/        files of the run's tokenizer, if it has one

A saved tensor is identified by (state, parameter name). State "master" is the fp32 weight; "exp_avg" and "exp_avg_sq" are
Adam's moments. Each file holds boxes of tensors, under keys "state/name@offset,offset". A checkpoint is written to a
folder `step_....writing-TOKEN`, renamed when it is complete, and named in `latest` last.
"""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.files import sha256_of_file, write_durably
from megagpt.errors import CheckpointError, StorageError
from megagpt.regular_file import is_damage, read_regular_file, require_regular_file

MANIFEST, MANIFEST_SUM, LATEST = "manifest.json", "manifest.sha256", "latest"
MASTER = "master"
WRITING = ".writing-"
"""Separates the final name of a folder or file from a random token while it is being written."""
REPLACED = ".replaced"
"""Ends the name of an older checkpoint of the same step while the new one takes its name."""
IMPORTED_FROM = "imported_from"
"""Key of a manifest's `state` that only a converted checkpoint has."""
MAX_MANIFEST_BYTES = 2**30
"""A manifest has about 100 bytes per box: a million boxes are 100 MB."""
MAX_DIMS, MAX_LENGTH = 16, 2**48


def _distinct(states: list[str]) -> list[str]:
    if len(set(states)) < len(states):
        raise ValueError("a state is named twice")
    return states


Length = Annotated[int, Field(ge=0, le=MAX_LENGTH, strict=True)]
"""Length of a dim, or a position along it."""
Lengths = Annotated[list[Length], Field(max_length=MAX_DIMS)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """One safetensors file, as it was written."""

    name: str = Field(pattern=r"^rank_[0-9]{1,10}\.safetensors$")  # cannot be a path to another folder
    bytes: int = Field(ge=0, le=2**63 - 1, strict=True)
    sha256: str
    node: str
    """Host that wrote the file."""


class TokenizerFileRecord(_Record):
    """One file of the run's tokenizer."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")  # cannot be a path to another folder
    bytes: int = Field(ge=0, le=2**28, strict=True)
    sha256: str


class TokenizerRecord(_Record):
    """The run's tokenizer."""

    name: str
    """`data.tokenizer` of the run: where its files came from, or "byte"."""
    files: list[TokenizerFileRecord] = Field(max_length=16)
    """Empty for "byte", which has no files."""


class TensorRecord(_Record):
    """One parameter: its weight and optimizer states, all split into the same boxes."""

    shape: Lengths
    kinds: Annotated[list[str], Field(max_length=16), AfterValidator(_distinct)]
    """State names: "master" and the optimizer states that were saved."""
    boxes: list[tuple[Length, Lengths, Lengths]]
    """(index into `Manifest.files`, offset, size) of each box."""


class Manifest(_Record):
    """Contents of a checkpoint."""

    format: Literal["megagpt-checkpoint"] = "megagpt-checkpoint"
    version: Literal[2] = 2
    step: int = Field(ge=0, le=10**12, strict=True)
    config: dict[str, Any]
    state: dict[str, Any]
    """Small facts of the run, defined in `training/train_state.py`."""
    tensors: dict[str, TensorRecord]
    """Parameter name -> record; the names are the same under every layout."""
    files: list[FileRecord]
    tokenizer: TokenizerRecord | None = None
    """Absent if the run names no tokenizer, and in checkpoints of older versions."""

    @property
    def total_bytes(self) -> int:
        """Total size of all safetensors files."""
        return sum(file.bytes for file in self.files)


def box_key(state: str, name: str, box: Box) -> str:
    """Return the key of a box in its safetensors file."""
    return f"{state}/{name}@{','.join(map(str, box.offset))}"


def rank_file(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def step_folder(directory: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return directory / f"step_{step:08d}"


def temporary_folder(folder: Path, token: str) -> Path:
    """Return the folder that a checkpoint is written to before it is renamed to `folder`; `token`: unique to the process."""
    return folder.with_name(f"{folder.name}{WRITING}{token}")


def step_of(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name, or None for any other folder."""
    match = re.fullmatch(r"step_([0-9]{8,18})", folder.name)
    return int(match[1]) if match else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and its checksum durably."""
    write_durably(folder / MANIFEST, manifest.model_dump_json())
    write_durably(folder / MANIFEST_SUM, f"{sha256_of_file(folder / MANIFEST)}  {MANIFEST}\n")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises CheckpointError if it is missing, damaged, of another format or of another step than the folder's name says, and
    StorageError if it cannot be read, which says nothing about the checkpoint.
    """
    path = folder / MANIFEST
    try:
        content = read_regular_file(path, MAX_MANIFEST_BYTES)
        checksum_line = read_regular_file(folder / MANIFEST_SUM, 256)
    except OSError as error:
        if is_damage(error):
            raise CheckpointError(f"{error.filename}: {error.strerror}; the checkpoint is incomplete") from None
        raise unreadable(Path(error.filename or path), error) from None
    match = re.fullmatch(rb"([0-9a-f]{64}) [ *]manifest\.json\r?\n?", checksum_line)
    if match is None:
        raise CheckpointError(f"{folder / MANIFEST_SUM}: not a line of sha256sum for {MANIFEST}; the file is damaged")
    if hashlib.sha256(content).hexdigest().encode() != match[1]:
        raise CheckpointError(f"{path}: its SHA-256 differs from the one in {MANIFEST_SUM}; the file is damaged")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(f"{path}: not a megagpt-checkpoint of version 2: {location}: {first['msg']}") from None
    if step_of(folder) not in (None, manifest.step):
        raise CheckpointError(f"{path}: it is the manifest of step {manifest.step}; the folder's name is {folder.name}")
    return manifest


def content_problem(path: Path, n_bytes: int, sha256: str) -> str | None:
    """Return one sentence if the size or SHA-256 of a file is not as written, else None.

    Raises StorageError if the file cannot be read, which says nothing about its content, and OSError if it is missing or no
    regular file.
    """
    try:
        require_regular_file(path)
        size = path.stat().st_size
        if size != n_bytes:
            return f"{path}: {size} bytes, expected {n_bytes}; the file is damaged"
        if sha256_of_file(path) != sha256:
            return f"{path}: its SHA-256 differs from the manifest's; the file is damaged"
    except OSError as error:
        if not is_damage(error):
            raise unreadable(path, error) from None
        raise
    return None


def unreadable(path: Path, error: OSError) -> StorageError:
    """Return the error for a file of a checkpoint that cannot be read now, although it may be intact."""
    return StorageError(
        f"{path}: {error.strerror}; the checkpoint may be intact, so no older one is used in its place: "
        "make it readable, or name another checkpoint in checkpoint.resume"
    )


def latest_name(directory: Path) -> str | None:
    """Return the content of `latest`, unchecked, or None if the file does not exist.

    Raises StorageError if the file cannot be read.
    """
    pointer = directory / LATEST
    try:
        return read_regular_file(pointer, 4096).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{pointer}: {error.strerror}; expected a file with the name of a checkpoint") from None


def checkpoint_folders(directory: Path) -> list[Path]:
    """Return all folders of a run that are named like checkpoints, complete or not.

    The one that `latest` names is first, then the others from newest to oldest.
    """
    folders = [path for path in _entries(directory) if step_of(path) is not None]
    latest = latest_name(directory)
    return sorted(folders, key=lambda path: (path.name == latest, step_of(path) or 0), reverse=True)


def unfinished_folders(directory: Path) -> list[Path]:
    """Return the folders that an interrupted save or deletion left behind."""
    return sorted(path for path in _entries(directory) if re.fullmatch(r"step_[0-9]{8,}\.(writing-.*|deleting)", path.name))


def replaced_folder(temporary: Path) -> Path:
    """Return the name of the older checkpoint of the same step while `temporary` takes its place."""
    return temporary.with_name(temporary.name + REPLACED)


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint folder at `path`, or the newest checkpoint if `path` is a run's folder.

    Raises CheckpointError if there is none. Does not verify the checkpoint.
    """
    folder = Path(path)
    if (folder / MANIFEST).exists() or step_of(folder) is not None:
        return folder
    folders = checkpoint_folders(folder)
    if not folders:
        raise CheckpointError(
            f"{folder}: no checkpoint here; expected a folder with {MANIFEST}, or a folder that contains checkpoints"
        )
    return folders[0]


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{directory}: {error.strerror}") from None
