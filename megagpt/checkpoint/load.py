"""Reading a checkpoint: any box of any tensor, whatever layout wrote it. Tensors and JSON only; no code is run."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megagpt.checkpoint.boxes import Box, pieces
from megagpt.checkpoint.format import MASTER, Manifest, box_key, check_files, read_manifest
from megagpt.errors import CheckpointError
from megagpt.parallel.shard import shard_of


class Reader:
    """An open checkpoint."""

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1) -> None:
        """Checks this rank's share of the files against the manifest; raises CheckpointError."""
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._files: dict[str, Any] = {}
        check_files(folder, self.manifest, sorted(self.manifest.files)[rank::world_size])

    def has(self, kind: str, name: str) -> bool:
        """Whether the tensor was kept: "master", "exp_avg", ... of a parameter."""
        return f"{kind}/{name}" in self.manifest.boxes

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError that names every parameter which is missing or has another shape than the model's."""
        saved = self.manifest.shapes
        problems = [
            f"{name} is {saved.get(name, 'missing')}, the model has {list(shape)}"
            for name, shape in sorted(shapes.items())
            if list(shape) != saved.get(name)
        ]
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise CheckpointError(f"{self.folder}: the checkpoint is of another model: {shown}")

    def read(self, kind: str, name: str, box: Box) -> Tensor:
        """The values of a box, on the CPU, put together from the boxes that were saved. Shape: the box's size."""
        out: Tensor | None = None
        missing = box.numel
        for file, offset, size in self.manifest.boxes.get(f"{kind}/{name}", []):
            saved = Box(tuple(offset), tuple(size))
            shared = box.intersection(saved)
            if shared is None:
                continue
            values = self._slice(file, box_key(kind, name, saved), shared.within(saved))
            if out is None:
                out = torch.empty(box.size, dtype=values.dtype)
            out[shared.within(box)] = values
            missing -= shared.numel
        if out is None or missing:
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

    def _slice(self, file: str, key: str, slices: tuple[slice, ...]) -> Tensor:
        try:
            if file not in self._files:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            return self._files[file].get_slice(key)[slices]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: cannot be read: {error}") from None
