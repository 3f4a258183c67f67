"""Large shuffle orders on disk, memory-mapped: the ranks of a node share one, and the next run finds it.

No rank waits in a collective. The first process builds the files under a file lock, which the system releases when the
process ends; the others wait for the lock and find the files. Where locks do not work, several processes build the same
files, and one rename wins.
"""

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.indexed import IndexedCorpus, files_of
from megagpt.data.shuffle import EpochOrder
from megagpt.errors import DataError

VERSION = 2
"""Cache format and shuffle algorithm; increase it to ignore older files."""
MIN_SIZE = 2**20
"""Documents plus samples from which an order is stored. A smaller one is computed faster than its files are opened."""
CHECKSUMS = "checksums.json"
_SAMPLE_BLOCKS, _SAMPLE_BYTES = 64, 4096


class IndexCache:
    """Shuffle orders of one corpus in a folder."""

    def __init__(self, corpus: IndexedCorpus, folder: Path | None) -> None:
        """`folder` None: beside the data, or in the node's temporary folder if that is read-only.

        Raises DataError if `folder` is given and cannot be written.
        """
        self._name = Path(corpus.prefix).name
        self._fingerprint = corpus_fingerprint(corpus)
        self._folder = _writable([folder] if folder else [Path(f"{corpus.prefix}.index"), _temporary_folder()])
        if folder and self._folder is None:
            raise DataError(f"data.cache_dir {folder}: cannot be written; name a folder that can, or leave it out")

    def get(self, key: str, build: Callable[[], EpochOrder]) -> EpochOrder:
        """Return the order stored under `key`; build it if it is missing or damaged. Without a folder, only build it."""
        if self._folder is None:
            return build()
        name = hashlib.blake2b(f"{VERSION} {self._fingerprint} {key}".encode(), digest_size=12).hexdigest()
        path = self._folder / f"{self._name}.{name}"
        order = _load(path)
        if order is not None:
            return order
        with _lock(path.with_name(f"{path.name}.lock")):
            order = _load(path)  # another process may have built it meanwhile
            if order is None:
                try:
                    _save(path, build())
                except OSError as error:
                    reason = error.strerror or str(error)
                    raise DataError(f"{path}: cannot be written: {reason}; name another data.cache_dir") from None
                order = _load(path)
        if order is None:
            raise DataError(f"{path}: damaged although just written; remove it, or name another data.cache_dir")
        return order


def corpus_fingerprint(corpus: IndexedCorpus) -> str:
    """Return a hash of file sizes, modification times, sequence sizes, and blocks spread over the .bin file."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files_of(corpus.prefix):
        status = path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
    digest.update(content_fingerprint(corpus).encode())
    return digest.hexdigest()


def content_fingerprint(corpus: IndexedCorpus) -> str:
    """Return a hash of the sequence sizes and of blocks spread over the .bin file: equal for copies on other nodes."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.ascontiguousarray(corpus.sizes).data)
    tokens = corpus.tokens.view(np.uint8)
    last = max(0, len(tokens) - _SAMPLE_BYTES)
    for block in range(_SAMPLE_BLOCKS):
        start = last * block // (_SAMPLE_BLOCKS - 1)
        digest.update(tokens[start : start + _SAMPLE_BYTES].data)
    return digest.hexdigest()


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"megagpt-index-{os.getuid()}"


def _writable(folders: list[Path]) -> Path | None:
    """Return the first folder that can be created and written. The shared temporary folder must belong to this user."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700 if folder == _temporary_folder() else 0o777, parents=True, exist_ok=True)
            if folder == _temporary_folder() and folder.stat().st_uid != os.getuid():
                continue
            with tempfile.TemporaryFile(dir=folder):
                return folder
    return None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock on `path`, if the file system supports locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(path.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _save(path: Path, order: EpochOrder) -> None:
    """Write all arrays to a temporary folder, flush them, then rename the folder."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        checksums = {}
        for name, values in order._asdict().items():
            array = temporary / f"{name}.npy"
            with array.open("wb") as file:
                np.save(file, values, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            checksums[name] = _signature(array) | {"crc32": _crc32(array)}
        (temporary / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
        temporary.chmod(0o755)
        if path.exists():  # it could not be loaded
            shutil.rmtree(path)
        with contextlib.suppress(FileExistsError):  # another process was faster, with the same bytes
            _rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError:
        if path.exists():
            raise FileExistsError(path) from None
        raise


def _load(path: Path) -> EpochOrder | None:
    """Return the stored order, or None if it is missing or damaged."""
    try:
        checksums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        if not all(_is_intact(path / f"{name}.npy", checksums[name]) for name in EpochOrder._fields):
            return None
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in EpochOrder._fields}
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    for array in arrays.values():
        array._mmap.madvise(mmap.MADV_WILLNEED)  # read it in one go, before the first samples are looked up
    return EpochOrder(**{name: array.view(np.ndarray) for name, array in arrays.items()})


def _is_intact(path: Path, record: dict[str, Any]) -> bool:
    """Return whether a file is as it was written. Its content is read only if its size or modification time changed."""
    signature = _signature(path)
    return all(record[key] == value for key, value in signature.items()) or record["crc32"] == _crc32(path)


def _signature(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return checksum
