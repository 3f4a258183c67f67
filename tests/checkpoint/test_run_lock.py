"""A checkpoint folder belongs to one run: a second one is refused, and the lock of a run that was killed is free."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt.checkpoint.run_lock import LOCK, RunLock
from megagpt.errors import CheckpointError

OWNER = """
import sys
from pathlib import Path
from megagpt.checkpoint.run_lock import RunLock
lock = RunLock.acquire(Path(sys.argv[1]), print)
print("locked", flush=True)
sys.stdin.readline()
lock.release()
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process of this machine that owns the folder."""
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_the_first_is_named(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"in use by another run, process {owner.pid} on host .+; wait until it ends"):
        RunLock.acquire(tmp_path, print)
    assert owner.poll() is None and (tmp_path / LOCK).exists()


def test_the_lock_of_a_killed_process_of_this_machine_is_free_at_once(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    owner.kill()
    owner.wait()
    notes: list[str] = []
    RunLock.acquire(tmp_path, notes.append).release()
    assert notes == [] and list(tmp_path.iterdir()) == []


def test_a_released_folder_is_free(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    owner.communicate("\n")
    assert list(tmp_path.iterdir()) == []
    RunLock.acquire(tmp_path, print).release()


def lock_of_another_machine(folder: Path, age: float) -> Path:
    path = folder / LOCK
    path.write_text(json.dumps({"host": "node7", "pid": 1, "machine": "elsewhere", "start": "5", "token": "t"}))
    modified = path.stat().st_mtime - age
    os.utime(path, (modified, modified))
    return path


def test_an_old_lock_of_another_machine_is_free(tmp_path: Path) -> None:
    lock_of_another_machine(tmp_path, age=61)
    notes: list[str] = []
    RunLock.acquire(tmp_path, notes.append).release()
    assert notes == []


def test_a_lock_of_another_machine_is_free_if_it_is_not_renewed_during_the_lease(tmp_path: Path) -> None:
    lock_of_another_machine(tmp_path, age=0)
    notes: list[str] = []
    RunLock.acquire(tmp_path, notes.append, lease=0.5).release()
    assert len(notes) == 1 and "belongs to process 1 on host node7; waiting up to" in notes[0]


def test_a_lock_of_another_machine_that_is_renewed_meanwhile_is_respected(tmp_path: Path) -> None:
    path = lock_of_another_machine(tmp_path, age=0)
    with pytest.raises(CheckpointError, match="in use by another run, process 1 on host node7"):
        RunLock.acquire(tmp_path, lambda _: os.utime(path, (1, 1)), lease=30)
    assert json.loads(path.read_text())["token"] == "t"


def test_an_owner_renews_its_lock(tmp_path: Path) -> None:
    """The modification time is set back; it becomes current again without a call."""
    lock = RunLock.acquire(tmp_path, print, renewal=0.01)
    os.utime(tmp_path / LOCK, (1, 1))
    waiting = threading.Event()
    for _ in range(1000):
        if (tmp_path / LOCK).stat().st_mtime > 1:
            break
        waiting.wait(0.01)
    assert (tmp_path / LOCK).stat().st_mtime > 1
    lock.release()


def test_an_owner_that_was_replaced_saves_nothing_more_and_leaves_the_new_lock(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path, print)
    lock.require_owned()
    path = lock_of_another_machine(tmp_path, age=0)
    with pytest.raises(CheckpointError, match="process 1 on host node7 has taken this folder over"):
        lock.require_owned()
    lock.release()
    assert path.exists()


def test_a_folder_that_was_deleted_is_locked_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = RunLock.acquire(tmp_path / "run", print)
    (tmp_path / "run" / LOCK).unlink()
    (tmp_path / "run").rmdir()
    lock.require_owned()
    assert (tmp_path / "run" / LOCK).exists()
    lock.release()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 4000])
def test_a_damaged_lock_file_counts_as_the_lock_of_an_unknown_machine(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(content)
    notes: list[str] = []
    RunLock.acquire(tmp_path, notes.append, lease=0.3).release()
    assert "process ? on host ?" in notes[0]


def test_a_pipe_in_place_of_the_lock_file_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(CheckpointError, match=r"run.lock: not a regular file; expected the lock file of a run"):
        RunLock.acquire(tmp_path, print)
