"""Files that are whole or absent: written in one pass, hashed on the way, flushed to the disk, read back."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_BLOCK = 2**24
"""Bytes written or read at a time."""


class Spec(NamedTuple):
    """A tensor that a safetensors file will hold."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Written(NamedTuple):
    """A file on disk."""

    bytes: int
    sha256: str
    """Hex, of what was to be written."""


def write_safetensors(
    path: Path, specs: Sequence[Spec], tensors: Iterable[Tensor], metadata: dict[str, str] | None = None
) -> Written:
    """Write one safetensors file (huggingface.co/docs/safetensors) and flush it to the disk.

    `tensors`: those of `specs` in their order, each on the CPU; at most one of them is held at a time. The package's own
    writer takes all as bytes objects at once, a second copy of a rank's whole state, and the checksum another reading.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for spec in specs:
        start, end = end, end + spec.dtype.itemsize * torch.Size(spec.shape).numel()
        header[spec.key] = {"dtype": _TYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    total = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in (len(text).to_bytes(8, "little"), text):
            _write(file.fileno(), memoryview(part), total)
        coming = iter(tensors)
        for spec in specs:
            tensor = next(coming)
            assert tensor.dtype == spec.dtype and tuple(tensor.shape) == spec.shape, f"{spec.key}: {tensor.shape}"
            _write(file.fileno(), _bytes(tensor), total)
            del tensor  # before the next is made
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    flush_folder(path.parent)
    return Written(size, total.hexdigest())


def digest(path: Path, from_disk: bool = False) -> str:
    """SHA-256 of a file, hex. `from_disk`: what the system still holds of it in memory is dropped first."""
    total = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Write a small file whole or not at all: aside, flushed to disk, renamed."""
    aside = path.with_name(path.name + ".new")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make a folder's new names durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's own memory, where it is contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _write(descriptor: int, content: memoryview, total: "hashlib._Hash") -> None:
    for start in range(0, len(content), _BLOCK):
        block = content[start : start + _BLOCK]
        total.update(block)
        while block:
            block = block[os.write(descriptor, block) :]
