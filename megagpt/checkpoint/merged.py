"""Read a checkpoint with low-rank adapters as the model without adapters that computes the same."""

from pathlib import Path
from typing import Any

from torch import Tensor

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.format import MASTER
from megagpt.checkpoint.load import CheckpointReader
from megagpt.config.schema import LoRAConfig
from megagpt.errors import CheckpointError
from megagpt.parallel.adapter import A_SUFFIX, B_SUFFIX, is_adapter, merged


def open_merged(folder: Path) -> CheckpointReader:
    """Open a checkpoint; if it has adapters, as the model that they make of its weights. Raises CheckpointError."""
    reader = CheckpointReader(folder)
    return MergedReader(folder) if any(map(is_adapter, reader.manifest.tensors)) else reader


class MergedReader(CheckpointReader):
    """A checkpoint with adapters. Its manifest lists none, and the weights that it reads contain them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._adapters = CheckpointReader(folder)
        self._scale = _scale(folder, self.manifest.config)
        self.manifest = self.manifest.model_copy(
            update={
                "config": {key: value for key, value in self.manifest.config.items() if key != "lora"},
                "tensors": {name: record for name, record in self.manifest.tensors.items() if not is_adapter(name)},
            }
        )

    def read(self, state: str, name: str, box: Box) -> Tensor:
        values = super().read(state, name, box)
        layer = name.removesuffix(".weight")
        if state != MASTER or not self._adapters.has(MASTER, layer + A_SUFFIX):
            return values
        a, b = (self._adapter(layer + suffix) for suffix in (A_SUFFIX, B_SUFFIX))
        *rows, columns = (slice(start, start + length) for start, length in zip(box.offset, box.size, strict=True))
        return merged(values, a[:, columns], b[tuple(rows)], self._scale)

    def _adapter(self, name: str) -> Tensor:
        """Return an entire matrix of an adapter, which is small."""
        record = self._adapters.manifest.tensors.get(name)
        if record is None:
            raise CheckpointError(f"{self.folder}: the adapter {name} is missing")
        return self._adapters.read(MASTER, name, Box.full(tuple(record.shape)))


def _scale(folder: Path, config: dict[str, Any]) -> float:
    """Return the factor of the adapters' output. Raises CheckpointError if the config has none."""
    try:
        lora = LoRAConfig.model_validate(config["lora"])
    except (KeyError, ValueError):
        lora = LoRAConfig()
    if lora.rank is None:
        raise CheckpointError(f"{folder}: has adapters, but its config has no lora.rank")
    return lora.alpha / lora.rank
