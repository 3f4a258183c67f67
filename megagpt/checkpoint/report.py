"""Report what is in a checkpoint and check all of it from one process: files, boxes and values."""

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
from megagpt.checkpoint.coverage import box_problems
from megagpt.checkpoint.format import MANIFEST, MASTER, Manifest, box_key
from megagpt.checkpoint.tokenizer_files import tokenizer_problems
from megagpt.checkpoint.verify import FolderDifferences, damaged_files, raise_all
from megagpt.errors import CheckpointError
from megagpt.progress import Progress

_BLOCK = 1 << 20
"""Number of values converted to float64 at a time."""


@dataclass(frozen=True)
class TensorReport:
    """One parameter. The field names are keys of `inspect_checkpoint.py --json`."""

    name: str
    shape: list[int]
    kinds: list[str]
    """Saved states: "master", the fp32 weight, and the optimizer states."""
    norm: float | None
    """L2 norm of the weight; None if a value is not finite."""
    non_finite: dict[str, int]
    """State name -> number of values that are NaN or infinite; states without any are left out."""


@dataclass(frozen=True)
class CheckpointReport:
    """One checkpoint. The field names are keys of `inspect_checkpoint.py --json`."""

    folder: str
    step: int
    samples: int
    """Consumed samples."""
    optimizer: str
    optimizer_step: int
    """Number of updates."""
    layout: dict[str, Any]
    """Layout that saved it: tensor, pipeline and context parallel size, and ZeRO stage."""
    precision: str
    """Precision of the run; saved values are fp32."""
    files: int
    bytes: int
    """Total size of the safetensors files."""
    tokenizer: str | None
    """Name of the tokenizer that it carries: data.tokenizer of the run."""
    nodes: list[str]
    """Hosts that wrote the files."""
    checksums: bool
    """Whether every file was compared with its SHA-256."""
    parameters: int
    """Number of weights."""
    tensors: list[TensorReport]
    """Sorted by name."""

    @property
    def non_finite(self) -> int:
        """Number of values that are NaN or infinite, in weights and optimizer states."""
        return sum(sum(tensor.non_finite.values()) for tensor in self.tensors)


def bytes_to_read(manifest: Manifest, checksums: bool) -> int:
    """Return how many bytes `inspect_checkpoint` reads: every file once for its values and once for its checksum."""
    return manifest.total_bytes * (2 if checksums else 1)


def inspect_checkpoint(folder: Path, manifest: Manifest, checksums: bool, progress: Progress) -> CheckpointReport:
    """Check a checkpoint and measure every tensor, with one box in memory at a time.

    `progress` gets the number of bytes read. Raises CheckpointError with one line per problem.
    """
    facts = _run_facts(folder, manifest)
    require_valid(folder, manifest, checksums, progress)
    squares, non_finite = _measure(folder, manifest, progress)
    tensors = []
    for name, record in sorted(manifest.tensors.items()):
        counts = {state: non_finite[name, state] for state in record.kinds if non_finite[name, state]}
        norm = None if MASTER in counts else math.sqrt(squares[name])
        tensors.append(TensorReport(name, record.shape, record.kinds, norm, counts))
    return CheckpointReport(
        folder=str(folder),
        step=manifest.step,
        **facts,
        files=len(manifest.files),
        bytes=manifest.total_bytes,
        tokenizer=None if manifest.tokenizer is None else manifest.tokenizer.name,
        nodes=sorted({file.node for file in manifest.files}),
        checksums=checksums,
        parameters=sum(math.prod(record.shape) for record in manifest.tensors.values()),
        tensors=tensors,
    )


def require_valid(folder: Path, manifest: Manifest, checksums: bool, progress: Progress) -> None:
    """Raise CheckpointError unless all files are present and undamaged, and the boxes cover each tensor exactly once.

    Call it before memory is allocated for what the manifest says. `progress` gets the number of bytes hashed. Without
    `checksums` the contents of the files are not checked.
    """
    differences = FolderDifferences.find(folder, manifest)
    problems = differences.problems(folder)
    if checksums:
        for file in manifest.files:
            if file not in differences.missing:
                problems += damaged_files(folder, [file])
            progress.update(file.bytes)
    problems += tokenizer_problems(folder, manifest)
    problems += [f"{folder / MANIFEST}: {problem}" for problem in box_problems(manifest)]
    if not manifest.tensors:
        problems.append(f"{folder / MANIFEST}: has no tensors")
    raise_all(folder, problems)


def _run_facts(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return fields of `CheckpointReport` from the manifest's config and state."""
    config = manifest.config
    state = manifest.state
    samples_key = "consumed_samples" if "consumed_samples" in state else "samples"  # its name in megagpt 0.1
    try:
        return {
            "samples": state[samples_key],
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


def _measure(folder: Path, manifest: Manifest, progress: Progress) -> tuple[dict[str, float], Counter[tuple[str, str]]]:
    """Return each weight's sum of squares in float64, and the number of non-finite values by (name, state).

    Reads one file after the other from start to end, which is fastest on disks and network file systems.
    """
    boxes: dict[int, list[tuple[str, Box]]] = defaultdict(list)
    for name, record in manifest.tensors.items():
        for file, offset, size in record.boxes:
            boxes[file].append((name, Box(tuple(offset), tuple(size))))
    squares: dict[str, float] = defaultdict(float)
    non_finite: Counter[tuple[str, str]] = Counter()
    problems = []
    for number, file_record in enumerate(manifest.files):
        try:
            for name, state, values in _values_in(folder / file_record.name, boxes[number], manifest):
                for block in values.flatten().split(_BLOCK):
                    non_finite[name, state] += len(block) - int(block.isfinite().sum())
                    if state == MASTER:
                        squares[name] += float(block.double().square().sum())
                progress.update(values.nbytes)
        except CheckpointError as error:
            problems.append(str(error))
    raise_all(folder, problems)
    return squares, non_finite


def _values_in(path: Path, boxes: list[tuple[str, Box]], manifest: Manifest) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (name, state, values) of the boxes in a file. Raises CheckpointError if the file contradicts the manifest."""
    try:
        with safe_open(path, framework="pt") as file:
            for name, box in boxes:
                for state in manifest.tensors[name].kinds:
                    key = box_key(state, name, box)
                    values = file.get_tensor(key)
                    if tuple(values.shape) != box.size or values.dtype != torch.float32:
                        actual = f"{list(values.shape)} of {values.dtype}"
                        raise CheckpointError(f"{path}: {key} is {actual}, the manifest has {list(box.size)} of torch.float32")
                    yield name, state, values
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
