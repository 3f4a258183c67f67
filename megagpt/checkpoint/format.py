"""A checkpoint on disk: safetensors and JSON, no pickles, no layout.

    DIR/latest                          the name of the newest checkpoint
    DIR/step_00000100/manifest.json     step, config, files with size, SHA-256 and node, boxes of every tensor
    DIR/step_00000100/manifest.sha256   of the manifest, as `sha256sum --check` reads it
    DIR/step_00000100/rank_00003.safetensors

A tensor is (kind, name): kind "master" is the fp32 weight, "exp_avg" and "exp_avg_sq" Adam's moments. Each file holds
boxes of logical tensors under keys "kind/name@row,column". A checkpoint is written in `step_....writing-TOKEN`, renamed
when it is whole, and named in `latest` last.
"""

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.files import digest, write_durably
from megagpt.errors import CheckpointError

MANIFEST, MANIFEST_SUM, LATEST = "manifest.json", "manifest.sha256", "latest"
MASTER = "master"
WRITING = ".writing-"
"""Between a checkpoint's name and the token of the start that writes it."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """One rank's file, as it was written."""

    name: str = Field(pattern=r"^rank_\d+\.safetensors$")  # never a path out of the folder
    bytes: int = Field(ge=0)
    sha256: str
    node: str
    """Host that wrote it."""


class TensorRecord(_Record):
    """A parameter: its weight and what else was kept of it, all cut into the same boxes."""

    shape: list[int]
    kinds: list[str]
    """"master" and its moments."""
    boxes: list[tuple[int, list[int], list[int]]]
    """(number in `Manifest.files`, offset, size) of each."""


class Manifest(_Record):
    """What a checkpoint holds."""

    format: Literal["megagpt-checkpoint"] = "megagpt-checkpoint"
    version: Literal[2] = 2
    step: int = Field(ge=0)
    config: dict[str, Any]
    state: dict[str, Any]
    """Small facts of the run; `training/snapshot.py` says which."""
    tensors: dict[str, TensorRecord]
    """By logical name."""
    files: list[FileRecord]

    @property
    def total_bytes(self) -> int:
        """Of all files of tensors."""
        return sum(file.bytes for file in self.files)


def box_key(kind: str, name: str, box: Box) -> str:
    """The key of a box in its file."""
    return f"{kind}/{name}@{','.join(map(str, box.offset))}"


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return directory / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other folder."""
    found = re.fullmatch(r"step_(\d{8,})", folder.name)
    return int(found[1]) if found else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The manifest and its checksum, durably."""
    write_durably(folder / MANIFEST, manifest.model_dump_json())
    write_durably(folder / MANIFEST_SUM, f"{digest(folder / MANIFEST)}  {MANIFEST}\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; raises CheckpointError where it is missing, damaged or of another format."""
    path, total = folder / MANIFEST, folder / MANIFEST_SUM
    try:
        content = path.read_bytes()
        told = total.read_bytes().split(b" ")[0].decode("ascii", "replace")
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}; the checkpoint is not whole") from None
    if hashlib.sha256(content).hexdigest() != told:
        raise CheckpointError(f"{path}: its SHA-256 is not the one in {MANIFEST_SUM}; the file is damaged")
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(f"{path}: not a megagpt-checkpoint of version 2: {where}: {first['msg']}") from None


def pointed_at(directory: Path) -> str | None:
    """The name that `latest` holds, whatever it is; None where there is no such file. Raises CheckpointError if unreadable."""
    pointer = directory / LATEST
    try:
        with pointer.open("rb") as file:
            return file.read(256).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{pointer}: {error.strerror}") from None


def folders_of(directory: Path) -> list[Path]:
    """The folders named as checkpoints in a run's folder, whole or not: what `latest` names first, then from the newest."""
    found = {path for path in _entries(directory) if step_of(path) is not None}
    named = pointed_at(directory)
    return sorted(found, key=lambda path: (path.name == named, step_of(path) or 0), reverse=True)


def unfinished(directory: Path) -> list[Path]:
    """Folders that a save or a deletion left which was cut short."""
    return sorted(path for path in _entries(directory) if re.fullmatch(r"step_\d{8,}\.(writing-.*|deleting)", path.name))


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint's folder from a path to it or to the run's folder, of which the newest is taken.

    Raises CheckpointError where there is none; whether it is whole is not looked at.
    """
    folder = Path(path)
    if (folder / MANIFEST).exists() or step_of(folder) is not None:
        return folder
    found = folders_of(folder)
    if not found:
        raise CheckpointError(f"{folder}: no checkpoint here; expected a folder with {MANIFEST}, or a run's folder of such")
    return found[0]


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{directory}: {error.strerror}") from None
