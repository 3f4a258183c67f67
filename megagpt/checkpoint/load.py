"""Reading a checkpoint: any box of any tensor, whatever layout wrote it. Tensors and JSON only; no code is run."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megagpt.checkpoint.boxes import Box, pieces
from megagpt.checkpoint.format import MASTER, Manifest, box_key, read_manifest
from megagpt.errors import CheckpointError
from megagpt.parallel.shard import shard_of


class Reader:
    """An open checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Reads the manifest alone; raises CheckpointError. `check.py` looks at the files."""
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.bytes_read = 0
        """Of tensors, so far."""
        self._files: dict[str, Any] = {}

    def has(self, kind: str, name: str) -> bool:
        """Whether the tensor was kept: "master", "exp_avg", ... of a parameter."""
        record = self.manifest.tensors.get(name)
        return record is not None and kind in record.kinds

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError that names every parameter which is missing or has another shape than the model's."""
        saved = {name: record.shape for name, record in self.manifest.tensors.items()}
        problems = [
            f"{name} is {saved.get(name, 'missing')}, the model has {list(shape)}"
            for name, shape in sorted(shapes.items())
            if list(shape) != saved.get(name)
        ]
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise CheckpointError(f"{self.folder}: the checkpoint is of another model: {shown}")

    def read(self, kind: str, name: str, box: Box) -> Tensor:
        """The values of a box, fp32 on the CPU, put together from the boxes that were saved. Shape: the box's size."""
        out = torch.empty(box.size)
        missing = box.numel
        for file, offset, size in self.manifest.tensors[name].boxes if self.has(kind, name) else []:
            saved = Box(tuple(offset), tuple(size))
            shared = box.intersection(saved)
            if shared is None:
                continue
            out[shared.within(box)] = self._slice(file, box_key(kind, name, saved), saved, shared)
            missing -= shared.numel
            self.bytes_read += shared.numel * out.itemsize
        if missing:
            raise CheckpointError(f"{self.folder}: {kind} of {name} has a gap at {box.offset}; the checkpoint is not whole")
        return out

    @torch.no_grad()
    def fill(self, parameter: nn.Parameter) -> None:
        """Write a rank's whole tensor of a parameter, in its own precision; padding rows of the vocabulary become zeros."""
        shard = shard_of(parameter)
        parameter.zero_()
        for piece in pieces(shard, tuple(parameter.shape), 0, parameter.numel()):  # all of it: one box from the start
            values = self.read(MASTER, shard.name, piece.box)
            parameter[tuple(slice(0, length) for length in piece.box.size)] = values.to(parameter)

    def _slice(self, number: int, key: str, saved: Box, wanted: Box) -> Tensor:
        name = self.manifest.files[number].name
        try:
            if name not in self._files:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            values = self._files[name].get_slice(key)
            if tuple(values.get_shape()) != saved.size:
                raise CheckpointError(
                    f"{self.folder / name}: {key} is {values.get_shape()}, the manifest has {list(saved.size)}"
                )
            return values[wanted.within(saved)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / name}: cannot be read: {error}") from None
