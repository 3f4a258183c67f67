"""Large orders kept on disk and memory-mapped, so that the ranks of a node share one and the next run finds it.

No rank waits in a collective: whoever comes first builds under a file lock, which ends with its process; the others
wait for the lock and find the files. Where locks do not work, several build the same files, and one rename wins.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megagpt.data.indexed import IndexedCorpus, files_of
from megagpt.data.shuffle import Order
from megagpt.errors import DataError

VERSION = 1
"""Of the files and of what `order` computes: another number meets no older file."""
SMALLEST = 2**20
"""Documents and samples from which an order is kept; a smaller one is made in less time than the files are opened."""
_SAMPLE_BLOCKS, _SAMPLE_BYTES = 64, 4096


class IndexCache:
    """Orders of one corpus, in `folder`."""

    def __init__(self, corpus: IndexedCorpus, folder: Path | None) -> None:
        """`folder` None: beside the data, or where that is read-only in the node's folder for temporary files.

        Raises DataError if `folder` is given and cannot be written.
        """
        self._name = Path(corpus.prefix).name
        self._fingerprint = fingerprint(corpus)
        self._folder = _writable([folder] if folder else [Path(f"{corpus.prefix}.index"), _temporary_folder()])
        if folder and self._folder is None:
            raise DataError(f"data.cache_dir {folder}: cannot be written; name a folder that can, or leave it out")

    def get(self, key: str, build: Callable[[], Order]) -> Order:
        """The order under `key`, built if it is not there. In memory alone where no folder can be written."""
        if self._folder is None:
            return build()
        name = hashlib.blake2b(f"{VERSION} {self._fingerprint} {key}".encode(), digest_size=12).hexdigest()
        place = self._folder / f"{self._name}.{name}"
        found = _load(place)
        if found is not None:
            return found
        with _lock(place.with_name(f"{place.name}.lock")):
            found = _load(place)  # another process has built it while this one waited
            if found is None:
                try:
                    _save(place, build())
                except OSError as error:
                    raise DataError(f"{place}: cannot be written: {error.strerror}; name another data.cache_dir") from None
                found = _load(place)
        if found is None:
            raise DataError(f"{place}: damaged although just written; remove it, or name another data.cache_dir")
        return found


def fingerprint(corpus: IndexedCorpus) -> str:
    """Of a pair's files: sizes in bytes, times of change, the sizes of all sequences, and blocks all over the .bin."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files_of(corpus.prefix):
        status = path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
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
    """The first folder that can be made and written, by no one but this user if it is in a place of all users."""
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
    """Hold `path` against other processes, as far as the file system can lock."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(path.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _save(place: Path, order: Order) -> None:
    """All parts, aside and on the disk, then under their name at once."""
    aside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        for part, values in order._asdict().items():
            with (aside / f"{part}.npy").open("wb") as file:
                np.save(file, values, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        aside.chmod(0o755)
        if place.exists():  # what could not be loaded
            shutil.rmtree(place)
        with contextlib.suppress(FileExistsError):  # another was faster, with the same bytes
            _rename(aside, place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _rename(aside: Path, place: Path) -> None:
    try:
        aside.rename(place)
    except OSError:
        if place.exists():
            raise FileExistsError(place) from None
        raise


def _load(place: Path) -> Order | None:
    """None where it is absent or damaged."""
    try:
        parts = {part: np.load(place / f"{part}.npy", mmap_mode="r", allow_pickle=False) for part in Order._fields}
    except (OSError, ValueError, EOFError):
        return None
    for values in parts.values():
        values._mmap.madvise(mmap.MADV_WILLNEED)  # read in one go, before the first samples are looked for
    return Order(**{part: values.view(np.ndarray) for part, values in parts.items()})
