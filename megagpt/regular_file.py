"""Read small files safely: devices, pipes and files of unreasonable size are errors, not hangs."""

import errno
import os
import stat
from pathlib import Path

_DAMAGE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EINVAL, errno.EFBIG})


def is_damage(error: OSError) -> bool:
    """Return whether the file itself is wrong: absent, no regular file, or too large.

    Any other error (no permission, a failing disk, a stale network mount) says nothing about the file: it may be intact.
    """
    return error.errno in _DAMAGE


def require_regular_file(path: Path, max_bytes: int | None = None) -> None:
    """Raise OSError, with a reason in `strerror`, if `path` is no regular file or larger than `max_bytes`."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if max_bytes is not None and status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes, expected at most {max_bytes}", str(path))


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most `max_bytes`. Raises OSError with a reason in `strerror`."""
    require_regular_file(path, max_bytes)
    with path.open("rb") as file:
        return file.read(max_bytes + 1)
