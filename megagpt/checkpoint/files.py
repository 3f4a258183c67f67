"""Files that are either complete or absent: written in one pass, hashed while writing, flushed to disk, read back."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_BLOCK = 2**24
"""Bytes per read or write call."""


class TensorSpec(NamedTuple):
    """Key, dtype and shape of a tensor in a safetensors file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Written(NamedTuple):
    """Size and checksum of a file that was written."""

    bytes: int
    sha256: str
    """Hex digest of the data that was passed to the operating system."""


def write_safetensors(
    path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor], metadata: dict[str, str] | None = None
) -> Written:
    """Write one safetensors file (huggingface.co/docs/safetensors) and flush it to disk.

    `tensors`: the tensors of `specs`, in the same order, each on the CPU. Only one of them is in memory at a time if the
    iterable builds them on demand. The writer of the safetensors package needs all tensors as bytes objects at once, a
    second copy of a rank's entire state, and the checksum would need another read.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for spec in specs:
        start, end = end, end + spec.n_bytes
        header[spec.key] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    checksum = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for block in (len(text).to_bytes(8, "little"), text):
            _write(file.fileno(), memoryview(block), checksum)
        remaining = iter(tensors)
        for spec in specs:
            tensor = next(remaining)
            assert tensor.dtype == spec.dtype and tuple(tensor.shape) == spec.shape, f"{spec.key}: {tensor.shape}"
            _write(file.fileno(), _bytes(tensor), checksum)
            del tensor  # free it before the next one is built
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    fsync_folder(path.parent)
    return Written(size, checksum.hexdigest())


def sha256_of_file(path: Path, from_disk: bool = False) -> str:
    """Return the SHA-256 of a file as hex digits. `from_disk`: drop the file's pages from the page cache first."""
    checksum = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(_BLOCK):
            checksum.update(block)
    return checksum.hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Write a small file atomically: to a temporary file, flushed to disk, then renamed."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        remove_tree(temporary)
        raise
    fsync_folder(path.parent)


def remove_tree(path: Path) -> bool:
    """Delete a folder with its content, a file or a link, but never what a link points to; return whether it is gone."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return not os.path.lexists(path)


def fsync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that the names of new and renamed files survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy if it is contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _write(descriptor: int, content: memoryview, checksum: "hashlib._Hash") -> None:
    for start in range(0, len(content), _BLOCK):
        block = content[start : start + _BLOCK]
        checksum.update(block)
        while block:
            block = block[os.write(descriptor, block) :]
