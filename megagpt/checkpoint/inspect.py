"""What is in a checkpoint, and whether all of it is sound, by one process: files, boxes, and the values themselves."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.check import Listing, damaged, raise_all
from megagpt.checkpoint.coverage import box_problems
from megagpt.checkpoint.format import MANIFEST, MASTER, Manifest, box_key
from megagpt.errors import CheckpointError

_BLOCK = 1 << 20
"""Values that are widened to float64 at a time."""


@dataclass(frozen=True)
class Parameter:
    """What `inspect` finds in one parameter."""

    name: str
    shape: list[int]
    kinds: list[str]
    """What is kept of it: "master", the fp32 weight, and the moments of the update rule."""
    norm: float | None
    """L2 norm of the weight; None where a value is not finite."""
    non_finite: dict[str, int]
    """Values that are NaN or infinite, by kind; kinds without any are left out."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect` finds in a checkpoint."""

    folder: str
    step: int
    samples: int
    optimizer: str
    optimizer_step: int
    """Updates made."""
    layout: dict[str, Any]
    """Under which it was saved: ranks that share matrices, layers and sequences, and the ZeRO stage."""
    precision: str
    """Of the run; the checkpoint's own values are fp32."""
    files: int
    bytes: int
    """Of all files of tensors."""
    nodes: list[str]
    """That wrote them."""
    checksums: bool
    """Whether every file was compared with its SHA-256."""
    parameters: int
    """Values of all weights together."""
    tensors: list[Parameter]
    """In the order of their names."""


def bytes_to_read(manifest: Manifest, checksums: bool) -> int:
    """That `inspect` reads: all once for the values, and once before for the checksums."""
    return manifest.total_bytes * (2 if checksums else 1)


def inspect(folder: Path, manifest: Manifest, checksums: bool, progress: Any) -> Inspection:
    """Check the checkpoint and measure every tensor, with one box in memory at a time.

    `progress` has `update(bytes read)`. Raises CheckpointError with a line for each thing that is wrong.
    """
    facts = _facts(folder, manifest)
    require_sound(folder, manifest, checksums, progress)
    squares, non_finite = _measure(folder, manifest, progress)
    tensors = []
    for name, record in sorted(manifest.tensors.items()):
        wrong = {kind: non_finite[name, kind] for kind in record.kinds if non_finite[name, kind]}
        norm = None if MASTER in wrong else math.sqrt(squares[name])
        tensors.append(Parameter(name, record.shape, record.kinds, norm, wrong))
    return Inspection(
        folder=str(folder),
        step=manifest.step,
        **facts,
        files=len(manifest.files),
        bytes=manifest.total_bytes,
        nodes=sorted({file.node for file in manifest.files}),
        checksums=checksums,
        parameters=sum(math.prod(record.shape) for record in manifest.tensors.values()),
        tensors=tensors,
    )


def require_sound(folder: Path, manifest: Manifest, checksums: bool, progress: Any) -> None:
    """Raise CheckpointError unless all files are there and as they were written, and the boxes make whole tensors.

    `progress` has `update(bytes hashed)`. Without `checksums` the files' content is not looked at.
    """
    problems = Listing.of(folder, manifest).problems(folder)
    if checksums:
        for file in manifest.files:
            problems += damaged(folder, [file])
            progress.update(file.bytes)
    problems += [f"{folder / MANIFEST}: {problem}" for problem in box_problems(manifest)]
    raise_all(folder, problems)


def _facts(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What the manifest's free parts say, by name in `Inspection`."""
    config, state = manifest.config, manifest.state
    try:
        return {
            "samples": state["samples"],
            "optimizer": state["optimizer"],
            "optimizer_step": state["optimizer_step"],
            "layout": {
                **{key: config["parallel"][key] for key in ("tensor", "pipeline", "context")},
                "zero_stage": config["zero"]["stage"],
            },
            "precision": config["training"]["precision"],
        }
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: its config or state is of another version of megagpt: {error!r}") from None


def _measure(folder: Path, manifest: Manifest, progress: Any) -> tuple[dict[str, float], Counter[tuple[str, str]]]:
    """Sums of the squares of each weight, float64, and how many values of (name, kind) are not finite.

    File by file, each from its beginning to its end: disks and network file systems are fastest so.
    """
    boxes: dict[int, list[tuple[str, Box]]] = defaultdict(list)
    for name, record in manifest.tensors.items():
        for file, offset, size in record.boxes:
            boxes[file].append((name, Box(tuple(offset), tuple(size))))
    squares: dict[str, float] = defaultdict(float)
    non_finite: Counter[tuple[str, str]] = Counter()
    problems = []
    for number, written in enumerate(manifest.files):
        try:
            for name, kind, values in _values_in(folder / written.name, boxes[number], manifest):
                for block in values.flatten().split(_BLOCK):
                    non_finite[name, kind] += len(block) - int(block.isfinite().sum())
                    if kind == MASTER:
                        squares[name] += float(block.double().square().sum())
                progress.update(values.nbytes)
        except CheckpointError as error:
            problems.append(str(error))
    raise_all(folder, problems)
    return squares, non_finite


def _values_in(path: Path, boxes: list[tuple[str, Box]], manifest: Manifest) -> Iterator[tuple[str, str, Tensor]]:
    """(name, kind, values) of the boxes in a file; raises CheckpointError where it holds other ones than the manifest says."""
    try:
        with safe_open(path, framework="pt") as file:
            for name, box in boxes:
                for kind in manifest.tensors[name].kinds:
                    key = box_key(kind, name, box)
                    values = file.get_tensor(key)
                    if tuple(values.shape) != box.size or values.dtype != torch.float32:
                        told = f"{list(values.shape)} of {values.dtype}"
                        raise CheckpointError(f"{path}: {key} is {told}, the manifest has {list(box.size)} of torch.float32")
                    yield name, kind, values
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
