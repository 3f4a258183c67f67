"""Read a checkpoint: any box of any tensor, written under any layout. Reads tensors and JSON only; no code is run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megagpt.checkpoint.boxes import Box, boxes_of_range
from megagpt.checkpoint.format import MASTER, Manifest, box_key, read_manifest
from megagpt.errors import CheckpointError, listed
from megagpt.parallel.parameter import shard_of


class CheckpointReader:
    """An open checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest; `verify.py` checks the other files. Raises CheckpointError."""
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.bytes_read = 0
        """Bytes of tensors read so far."""
        self._files: dict[str, Any] = {}

    def has(self, state: str, name: str) -> bool:
        """Return whether a state ("master", "exp_avg", ...) of a parameter was saved."""
        record = self.manifest.tensors.get(name)
        return record is not None and state in record.kinds

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError if a parameter of the model is missing or has another shape; `shapes`: those of the model."""
        saved = {name: record.shape for name, record in self.manifest.tensors.items()}
        problems = [
            f"{name} (saved: {saved.get(name, 'missing')}; model: {list(shape)})"
            for name, shape in sorted(shapes.items())
            if list(shape) != saved.get(name)
        ]
        if problems:
            raise CheckpointError(f"{self.folder}: the checkpoint is of another model: {listed(problems)}")

    def read(self, state: str, name: str, box: Box) -> Tensor:
        """Read the values of a box, from all saved boxes that overlap it. Returns an fp32 CPU tensor of the box's size.

        Raises CheckpointError if values are missing.
        """
        out = torch.empty(box.size)
        missing = box.numel
        boxes = self.manifest.tensors[name].boxes if self.has(state, name) else []
        for file, offset, size in boxes:
            saved = Box(tuple(offset), tuple(size))
            shared = box.intersection(saved)
            if shared is None:
                continue
            out[shared.within(box)] = self._slice(file, box_key(state, name, saved), saved, shared)
            missing -= shared.numel
            self.bytes_read += shared.numel * out.itemsize
        if missing:
            raise CheckpointError(
                f"{self.folder}: {missing} of {box.numel} values of {state} of {name} at {box.offset} are missing; "
                "the checkpoint is incomplete"
            )
        return out

    def fill(self, parameter: nn.Parameter) -> None:
        """Load a rank's tensor of a parameter, converted to the parameter's dtype; vocabulary padding becomes zero."""
        fill_parameter(parameter, lambda box: self.read(MASTER, shard_of(parameter).name, box))

    def _slice(self, file: int, key: str, saved: Box, wanted: Box) -> Tensor:
        """Read the region `wanted` of the saved box under `key`."""
        path = self.folder / self.manifest.files[file].name
        try:
            if path.name not in self._files:
                self._files[path.name] = safe_open(path, framework="pt")
            values = self._files[path.name].get_slice(key)
            if tuple(values.get_shape()) != saved.size:
                raise CheckpointError(f"{path}: {key} has shape {values.get_shape()}, expected {list(saved.size)}")
            return values[wanted.within(saved)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None


@torch.no_grad()
def fill_parameter(parameter: nn.Parameter, read: Callable[[Box], Tensor]) -> None:
    """Set a rank's tensor of a parameter; vocabulary padding becomes zero. `read` returns a box of the full parameter."""
    shard = shard_of(parameter)
    parameter.zero_()
    for piece in boxes_of_range(shard, tuple(parameter.shape), 0, parameter.numel()):  # the full range is one box
        parameter[tuple(slice(0, length) for length in piece.box.size)] = read(piece.box).to(parameter)
