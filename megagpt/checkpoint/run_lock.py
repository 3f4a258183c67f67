"""One run per checkpoint folder: a lock file that names its owner and that the owner renews.

A second run in the same folder would delete what the first is writing, mix both runs' checkpoints and lose some of them.
Locks of the operating system do not work on all shared file systems, and not between hosts on others, so the file itself is
the lock: it is created exclusively, and a thread of its owner sets its modification time every few seconds. A lock that has
not been renewed for `LEASE` seconds has no owner any more: its process was killed. On the same machine the process is looked
up, so that a run that was killed can start again at once.
"""

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagpt.distributed.phase import host_name
from megagpt.errors import CheckpointError
from megagpt.regular_file import read_regular_file

LOCK = "run.lock"
LEASE = 60.0
"""Seconds without a renewal after which a lock is free. Network file systems can show a renewal up to a minute late."""
RENEWAL = 10.0
"""Seconds between renewals."""


class RunLock:
    """The right of this process to write checkpoints in a folder."""

    def __init__(self, path: Path, owner: dict[str, Any], renewal: float = RENEWAL) -> None:
        """`path`: a lock file that this process has created with the content `owner`; `renewal`: seconds."""
        self._path = path
        self._owner = owner
        self._lost_to: str | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_released, args=(renewal,), name="run lock", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls, directory: Path, note: Callable[[str], None], *, lease: float = LEASE, renewal: float = RENEWAL
    ) -> "RunLock":
        """Return the lock of an existing folder. Raises CheckpointError if another run owns it.

        If the owner's machine is another one, wait up to `lease` seconds to see whether it renews the lock; `note` prints a
        line before that.
        """
        path = directory / LOCK
        owner = {"host": host_name(), "pid": os.getpid(), "machine": _machine(), "start": _start_time(os.getpid())}
        owner["token"] = secrets.token_hex(8)
        while not _create(path, owner):
            other = _read_owner(path)
            if other is not None and _is_running(other):
                raise _refusal(directory, other)
            if other is not None and other.get("machine") != owner["machine"]:
                _require_no_renewal(directory, other, lease, note)
            _remove_stale(path, other)
        return cls(path, owner, renewal)

    def require_owned(self) -> None:
        """Raise CheckpointError if another run has taken the folder over, because this one did not renew its lock in time."""
        self._renew()
        if self._lost_to is not None:
            raise CheckpointError(
                f"{self._path.parent}: {self._lost_to} has taken this folder over, because this run did not renew "
                f"{LOCK} for {LEASE:.0f} s; it was stopped or its file system was unreachable. Nothing more is saved"
            )

    def release(self) -> None:
        """Delete the lock file, unless another run owns it."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        other = _read_owner(self._path)
        if other is not None and other.get("token") == self._owner["token"]:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _renew_until_released(self, seconds: float) -> None:
        while not self._released.wait(seconds):
            self._renew()

    def _renew(self) -> None:
        """Renew the lock; note if another run owns it. A file system that is unreachable now may be back next time."""
        try:
            current = _read_owner(self._path)
            if current is None:  # the folder was deleted; it is created again by the next save
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _create(self._path, self._owner)
            elif current.get("token") == self._owner["token"]:
                os.utime(self._path)
            else:
                self._lost_to = _describe(current)
        except (OSError, CheckpointError):
            pass


def _create(path: Path, owner: dict[str, Any]) -> bool:
    """Create the lock file; return False if it exists."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(owner, file)
    return True


def _read_owner(path: Path) -> dict[str, Any] | None:
    """Return the content of the lock file; None if it does not exist, an empty record if it is not complete."""
    try:
        owner = json.loads(read_regular_file(path, 4096))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; expected the lock file of a run, or none") from None
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _require_no_renewal(directory: Path, other: dict[str, Any], lease: float, note: Callable[[str], None]) -> None:
    """Return when the lock is older than `lease` seconds. Raises CheckpointError if it is renewed meanwhile.

    The age is measured with the clock of the file system, because clocks of hosts differ.
    """
    path = directory / LOCK
    first = _modified(path)
    end = time.monotonic() + lease - max(0.0, _file_system_time(directory) - first)
    if end > time.monotonic():
        note(
            f"checkpoint.dir: {directory} belongs to {_describe(other)}; waiting up to {end - time.monotonic():.0f} s to see "
            "whether it still runs"
        )
    while time.monotonic() < end:
        time.sleep(min(1.0, lease / 20))
        if _modified(path) != first:
            raise _refusal(directory, _read_owner(path) or other)


def _remove_stale(path: Path, owner: dict[str, Any] | None) -> None:
    """Delete the lock of `owner`. If another process has replaced it meanwhile, that one keeps it."""
    taken = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.rename(taken)
    except FileNotFoundError:
        return
    if _read_owner(taken) != owner:
        with contextlib.suppress(FileExistsError):
            os.link(taken, path)
    taken.unlink()


def _is_running(owner: dict[str, Any]) -> bool:
    """Return whether the owner is another process of this machine that runs now."""
    pid = owner.get("pid")
    if owner.get("machine") != _machine() or not isinstance(pid, int) or pid == os.getpid():
        return False
    return owner.get("start") is not None and owner.get("start") == _start_time(pid)


def _machine() -> str:
    """Identify the machine and the process namespace in which process ids are valid."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return host_name()


def _start_time(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if it does not run. Process ids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _modified(path: Path) -> float:
    """Return the modification time of the lock, 0 if it is gone. Opening it makes network file systems look it up."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _file_system_time(directory: Path) -> float:
    probe = directory / f".time-{secrets.token_hex(4)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _describe(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on host {owner.get('host', '?')}"


def _refusal(directory: Path, owner: dict[str, Any]) -> CheckpointError:
    return CheckpointError(
        f"checkpoint.dir: {directory} is in use by another run, {_describe(owner)}; wait until it ends, end it, or set "
        "another checkpoint.dir"
    )
