"""A checkpoint on disk: safetensors and one JSON manifest, no pickles, no layout.

    DIR/latest                          the name of the newest whole checkpoint
    DIR/step_00000100/manifest.json     step, config, files with size and SHA-256, boxes of every tensor
    DIR/step_00000100/rank_00003.safetensors

A tensor is (kind, name): kind "master" is the fp32 weight, "exp_avg" and "exp_avg_sq" Adam's moments. Each file holds
boxes of logical tensors under keys "kind/name@row,column". A checkpoint is written in `step_....writing`, renamed when
it is whole, and named in `latest` last.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.checkpoint.boxes import Box
from megagpt.errors import CheckpointError

FORMAT = "megagpt-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
MASTER = "master"


@dataclass
class Manifest:
    """What a checkpoint holds. `state`: small facts of the run (optimizer step, samples read, loss scale)."""

    step: int
    config: dict[str, Any]
    state: dict[str, Any]
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """Logical shape by parameter name."""
    boxes: dict[str, list[tuple[str, list[int], list[int]]]] = field(default_factory=dict)
    """By "kind/name": (file, offset, size) of every box."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By file name: bytes and sha256."""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **self.__dict__}, indent=1)


def box_key(kind: str, name: str, box: Box) -> str:
    """The key of a box in its file."""
    return f"{kind}/{name}@{','.join(map(str, box.offset))}"


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return directory / f"step_{step:08d}"


def find_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint in a run's folder, or None where there is none; raises CheckpointError if `latest` lies."""
    pointer = directory / LATEST
    if not pointer.exists():
        return None
    folder = directory / pointer.read_text(encoding="utf-8").strip()
    if not (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{pointer}: names {folder.name}, which is not a whole checkpoint; edit it to name one of: {_whole(directory)}"
        )
    return folder


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint's folder from a path to it or to the run's folder. Raises CheckpointError where there is none."""
    folder = Path(path)
    if (folder / MANIFEST).exists():
        return folder
    found = find_checkpoint(folder) if folder.is_dir() else None
    if found is None:
        raise CheckpointError(
            f"{folder}: no checkpoint here; expected a folder with {MANIFEST}, or a run's folder with {LATEST}"
        )
    return found


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; raises CheckpointError where it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if (tree.pop("format"), tree.pop("version")) != (FORMAT, VERSION):
            raise CheckpointError(f"{path}: not a {FORMAT} of version {VERSION}")
        return Manifest(**tree)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the manifest cannot be read: {error}") from None


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Raise CheckpointError for the first of these files that is missing or not as it was written."""
    for name in names:
        path, told = folder / name, manifest.files[name]
        if not path.exists():
            raise CheckpointError(f"{path}: missing; the checkpoint is not whole")
        if path.stat().st_size != told["bytes"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, expected {told['bytes']}; the file is damaged")
        if digest(path) != told["sha256"]:
            raise CheckpointError(f"{path}: its SHA-256 is not the manifest's; the file is damaged")


def digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            total.update(block)
    return total.hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Write a small file whole or not at all: aside, flushed to disk, renamed."""
    aside = path.with_name(path.name + ".writing")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole_checkpoints(directory: Path) -> list[Path]:
    """Every whole checkpoint in a run's folder, oldest first."""
    return sorted(path for path in directory.glob("step_*") if (path / MANIFEST).exists() and path.suffix == "")


def _whole(directory: Path) -> str:
    return ", ".join(path.name for path in whole_checkpoints(directory)) or "none is left"
