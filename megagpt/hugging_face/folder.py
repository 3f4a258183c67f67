"""A folder of a Hugging Face model: config.json, generation_config.json and the tensors of its safetensors files."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.errors import CheckpointError, ConfigError, listed
from megagpt.regular_file import read_regular_file

CONFIG, GENERATION, WEIGHTS, INDEX = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
MAX_CONFIG_BYTES, MAX_INDEX_BYTES = 2**24, 2**28
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of weights that can be read, by their names in a safetensors file."""


class ModelFolder:
    """The tensors of a model, of which one is read at a time."""

    def __init__(self, folder: Path) -> None:
        """Read config.json and the names of all tensors. Raises ConfigError and CheckpointError."""
        self.folder = folder
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; expected one with {CONFIG} and {WEIGHTS}")
        self.config = read_object(folder / CONFIG, MAX_CONFIG_BYTES)
        generation = folder / GENERATION
        self.generation_config = read_object(generation, MAX_CONFIG_BYTES) if generation.exists() else None
        self._files: dict[str, Any] = {}
        self.file_of: dict[str, str] = self._find_tensors()
        """Name of a tensor -> its file."""

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return dtype and shape of a tensor. Raises CheckpointError for a dtype that is no floating-point number of 16 or
        32 bits."""
        path = self.folder / self.file_of[name]
        try:
            part = self._open(path).get_slice(name)
            dtype, shape = part.get_dtype(), tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name}: cannot be read: {error}") from None
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name}: dtype {dtype}; expected {listed(DTYPES)} (not quantized)")
        return DTYPES[dtype], shape

    def read(self, name: str) -> Tensor:
        """Read one tensor, in its own dtype. Raises CheckpointError."""
        path = self.folder / self.file_of[name]
        try:
            return self._open(path).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name}: cannot be read: {error}") from None

    def close_files(self) -> None:
        """Close the files that are open; the next read opens them again. A mapped file's pages count as memory."""
        self._files.clear()

    def _find_tensors(self) -> dict[str, str]:
        if (self.folder / INDEX).exists():
            weight_map = read_object(self.folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
            if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
                raise CheckpointError(f"{self.folder / INDEX}: weight_map: expected an object of tensor names and file names")
            absent = sorted({file for file in weight_map.values() if not (self.folder / file).is_file()})
            if absent:
                raise CheckpointError(f"{self.folder / INDEX}: names files that are missing: {listed(absent)}")
            for file in sorted(set(weight_map.values())):
                names = set(self._names(file))
                lost = sorted(name for name, place in weight_map.items() if place == file and name not in names)
                if lost:
                    raise CheckpointError(f"{self.folder / file}: lacks {listed(lost)}, which {INDEX} says it has")
            return dict(weight_map)
        if not (self.folder / WEIGHTS).exists():
            pickled = sorted(path.name for path in self.folder.glob("*.bin"))
            hint = f"; {pickled[0]} is a pickle, which can run code: save the model as safetensors first" if pickled else ""
            raise CheckpointError(f"{self.folder}: has no {WEIGHTS} and no {INDEX}{hint}")
        return dict.fromkeys(self._names(WEIGHTS), WEIGHTS)

    def _names(self, file: str) -> list[str]:
        path = self.folder / file
        try:
            return list(self._open(path).keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None

    def _open(self, path: Path) -> Any:
        if path.name not in self._files:
            self._files[path.name] = safe_open(path, framework="pt")
        return self._files[path.name]


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ConfigError."""
    try:
        tree = json.loads(read_regular_file(path, max_bytes))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a file of a Hugging Face model") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected one JSON object, found {type(tree).__name__}")
    return tree


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) is not None
