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
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.files import sha256_of_file, write_durably
from megagpt.errors import CheckpointError

MANIFEST, MANIFEST_SUM, LATEST = "manifest.json", "manifest.sha256", "latest"
MASTER = "master"
WRITING = ".writing-"
"""Separates the final name of a folder or file from a random token while it is being written."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """One safetensors file, as it was written."""

    name: str = Field(pattern=r"^rank_\d+\.safetensors$")  # cannot be a path to another folder
    bytes: int = Field(ge=0)
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

    shape: list[int]
    kinds: list[str]
    """State names: "master" and the optimizer states that were saved."""
    boxes: list[tuple[int, list[int], list[int]]]
    """(index into `Manifest.files`, offset, size) of each box."""


class Manifest(_Record):
    """Contents of a checkpoint."""

    format: Literal["megagpt-checkpoint"] = "megagpt-checkpoint"
    version: Literal[2] = 2
    step: int = Field(ge=0)
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
    match = re.fullmatch(r"step_(\d{8,})", folder.name)
    return int(match[1]) if match else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and its checksum durably."""
    write_durably(folder / MANIFEST, manifest.model_dump_json())
    write_durably(folder / MANIFEST_SUM, f"{sha256_of_file(folder / MANIFEST)}  {MANIFEST}\n")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint. Raises CheckpointError if it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        expected = (folder / MANIFEST_SUM).read_bytes().split(b" ")[0].decode("ascii", "replace")
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}; the checkpoint is incomplete") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise CheckpointError(f"{path}: its SHA-256 differs from the one in {MANIFEST_SUM}; the file is damaged")
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(f"{path}: not a megagpt-checkpoint of version 2: {location}: {first['msg']}") from None


def latest_name(directory: Path) -> str | None:
    """Return the content of `latest`, unchecked, or None if the file does not exist.

    Raises CheckpointError if the file cannot be read.
    """
    pointer = directory / LATEST
    try:
        with pointer.open("rb") as file:
            return file.read(256).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{pointer}: {error.strerror}") from None


def checkpoint_folders(directory: Path) -> list[Path]:
    """Return all folders of a run that are named like checkpoints, complete or not.

    The one that `latest` names is first, then the others from newest to oldest.
    """
    folders = [path for path in _entries(directory) if step_of(path) is not None]
    latest = latest_name(directory)
    return sorted(folders, key=lambda path: (path.name == latest, step_of(path) or 0), reverse=True)


def unfinished_folders(directory: Path) -> list[Path]:
    """Return the folders that an interrupted save or deletion left behind."""
    return sorted(path for path in _entries(directory) if re.fullmatch(r"step_\d{8,}\.(writing-.*|deleting)", path.name))


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
        raise CheckpointError(f"{directory}: {error.strerror}") from None
