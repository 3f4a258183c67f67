"""Writing checkpoints while training goes on: every rank its own boxes, then one rename.

A save copies a rank's state into host memory, which is all that training waits for. The rest is a thread's: write, flush,
read back, gather what each rank wrote on rank 0, which writes the manifest, renames the folder and points `latest` at it.
The threads talk over a group of their own, so that they never stand between two collectives of the training.
"""

import secrets
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.files import Spec, digest, flush_folder, write_durably, write_safetensors
from megagpt.checkpoint.format import (
    LATEST,
    WRITING,
    FileRecord,
    Manifest,
    TensorRecord,
    box_key,
    rank_file,
    step_folder,
    write_manifest,
)
from megagpt.checkpoint.retention import remove_old
from megagpt.checkpoint.together import attempt, of_rank_0
from megagpt.errors import CheckpointError, listed
from megagpt.parallel.whereabouts import node_name

_PATIENCE = timedelta(days=1)
"""For ranks that write longer than others; a disk that hangs is noticed where the next save waits for this one."""


@dataclass(frozen=True)
class Entry:
    """One box of one parameter: its weight and moments."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    box: Box
    values: dict[str, Tensor]
    """By kind, each of the box's size."""


class Saved(NamedTuple):
    """How a save ended, on every rank."""

    step: int
    folder: Path
    seconds: float
    """From the copy's end to the rename."""
    problem: str | None
    """Why there is no checkpoint; None where there is."""
    left_over: str | None = None
    """On rank 0, why an older checkpoint that the rule does not keep is still there."""


class Saver:
    """A run's checkpoints, of which one at a time is being written."""

    def __init__(self, directory: Path, keep: int, keep_every: int | None, loaded: Path | None) -> None:
        """`keep`: newest to keep, 0 for all; `keep_every`: steps whose multiples stay; `loaded`: stays (collective)."""
        self._directory, self._keep, self._keep_every, self._loaded = directory, keep, keep_every, loaded
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._token = of_rank_0(secrets.token_hex(4))
        self._copy = HostCopy()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Saved] | None = None
        self._preparing: Future[None] | None = None

    def prepare(self, entries: Iterable[Entry]) -> Future[None]:
        """Make the memory for the copies, on the thread: fresh pages, and pinned ones, take long. `start` waits for it."""
        self._preparing = self._thread.submit(self._copy.make, *HostCopy.needs(list(entries)))
        return self._preparing

    def start(self, step: int, entries: Iterable[Entry], state: dict[str, Any], config: dict[str, Any]) -> Saved | None:
        """Begin to write the checkpoint of `step` (collective); returns how the save before it ended, if that is news."""
        before = self.finish()
        if self._preparing is not None:
            self._preparing.result()
        copied = self._copy.take(entries)
        manifest = Manifest(step=step, config=config, state=state, tensors={}, files=[])
        self._running = self._thread.submit(self._write, manifest, copied)
        return before

    def news(self) -> Saved | None:
        """How the save in work has ended; None while it goes on, and when it was told before."""
        return self.finish() if self._running is not None and self._running.done() else None

    def finish(self) -> Saved | None:
        """Wait until the save in work has ended, and tell how; None where there is none."""
        if self._running is None:
            return None
        running, self._running = self._running, None
        return running.result()

    def close(self) -> None:
        """End the thread."""
        self.finish()
        self._thread.shutdown()

    def _write(self, manifest: Manifest, copied: "list[Copied]") -> Saved:
        """On the thread: this rank's part of a save. It ends with the same word on all ranks."""
        begun = time.monotonic()
        final = step_folder(self._directory, manifest.step)
        aside = final.with_name(final.name + WRITING + self._token)
        mine, problem = attempt(lambda: _write_file(aside, copied))
        word: list[str | None] = [None]
        left_over: str | None = None
        try:
            told: list[Any] = [None] * dist.get_world_size(self._group) if dist.get_rank() == 0 else []
            dist.gather_object((mine, problem), told or None, group=self._group)
            if dist.get_rank() == 0:
                _, word[0] = attempt(lambda: self._finish(aside, final, manifest, told))
                if word[0] is None:
                    _, left_over = attempt(lambda: remove_old(final, self._keep, self._keep_every, self._loaded))
            dist.broadcast_object_list(word, src=0, group=self._group)
        except RuntimeError as error:  # of torch: another rank is gone
            # Rank 0 may be putting the files of this rank in place at this moment: nothing is removed.
            gone = f"rank {dist.get_rank()}: {str(error).splitlines()[0]}"
            return Saved(manifest.step, final, time.monotonic() - begun, gone)
        if word[0] is not None:
            _remove(aside, dist.get_rank())
        return Saved(manifest.step, final, time.monotonic() - begun, word[0], left_over)

    def _finish(self, aside: Path, final: Path, manifest: Manifest, told: "list[tuple[Part | None, str | None]]") -> None:
        """On rank 0, when all have written."""
        for _, problem in told:
            if problem is not None:
                raise CheckpointError(problem)
        parts = [part for part, _ in told if part is not None]
        _check_seen(aside, [part.file for part in parts])
        write_manifest(aside, _join(manifest, parts))
        _put_in_place(aside, final)
        write_durably(final.parent / LATEST, final.name + "\n")


class Copied(NamedTuple):
    """A box in host memory."""

    entry: Entry
    """Its values are those at the time of the copy."""
    specs: list[Spec]


class HostCopy:
    """Boxes in host memory, in fp32, in a buffer that every save uses again: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    @staticmethod
    def needs(entries: list[Entry]) -> tuple[int, bool]:
        """Values of all entries, and whether any of them come from a GPU."""
        values = sum(entry.box.numel * len(entry.values) for entry in entries)
        return values, any(tensor.is_cuda for entry in entries for tensor in entry.values.values())

    def make(self, values: int, pinned: bool) -> None:
        """A buffer of so many values, every page of it touched; nothing where there is one."""
        if len(self._buffer) != values:
            self._buffer = torch.empty(0)  # before there are two
            self._buffer = torch.empty(values, dtype=torch.float32, pin_memory=pinned).zero_()

    def take(self, entries: Iterable[Entry]) -> list[Copied]:
        """The entries with values of their own. Those of the last copy are lost."""
        found = list(entries)
        self.make(*self.needs(found))
        copied, at = [], 0
        for entry in found:
            values = {}
            for kind, tensor in entry.values.items():
                values[kind] = self._buffer.narrow(0, at, entry.box.numel).view(entry.box.size)
                values[kind].copy_(tensor, non_blocking=True)
                at += entry.box.numel
            specs = [Spec(box_key(kind, entry.name, entry.box), torch.float32, entry.box.size) for kind in values]
            copied.append(Copied(Entry(entry.name, entry.shape, entry.box, values), specs))
        if self._buffer.is_pinned():
            torch.cuda.current_stream().synchronize()
        return copied


class Part(NamedTuple):
    """What one rank wrote."""

    file: FileRecord
    boxes: list[tuple[str, tuple[int, ...], list[str], tuple[int, ...], tuple[int, ...]]]
    """(name, shape, kinds, offset, size)"""


def _write_file(folder: Path, copied: list[Copied]) -> Part | None:
    """This rank's file, on disk and read back; None where the rank has nothing of its own."""
    if not copied:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / rank_file(dist.get_rank())
    tensors = (tensor for item in copied for tensor in item.entry.values.values())
    written = write_safetensors(path, [spec for item in copied for spec in item.specs], tensors)
    if digest(path, from_disk=True) != written.sha256:
        raise CheckpointError(f"{path}: what was read back is not what was written")
    file = FileRecord(name=path.name, bytes=written.bytes, sha256=written.sha256, node=node_name())
    entries = [item.entry for item in copied]
    return Part(file, [(e.name, e.shape, list(e.values), e.box.offset, e.box.size) for e in entries])


def _check_seen(folder: Path, files: list[FileRecord]) -> None:
    """Raise CheckpointError with the nodes whose files are not here."""
    unseen = [file.node for file in files if not _has_size(folder / file.name, file.bytes)]
    if unseen:
        raise CheckpointError(
            f"{folder}: node {node_name()} does not see what was written on {listed(dict.fromkeys(unseen))}; "
            "checkpoint.dir must be one folder, on a file system that all nodes share"
        )


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _join(manifest: Manifest, parts: list[Part]) -> Manifest:
    tensors: dict[str, TensorRecord] = {}
    for number, part in enumerate(parts):
        for name, shape, kinds, offset, size in part.boxes:
            record = tensors.setdefault(name, TensorRecord(shape=list(shape), kinds=kinds, boxes=[]))
            record.boxes.append((number, list(offset), list(size)))
    return manifest.model_copy(update={"tensors": tensors, "files": [part.file for part in parts]})


def _put_in_place(aside: Path, final: Path) -> None:
    """Rename; a folder that bears the name already, of a run that went on from before it, goes when the new one is there."""
    replaced = aside.with_name(aside.name + ".replaced")
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    flush_folder(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _remove(aside: Path, rank: int) -> None:
    """What a save that failed has written, to give its space back."""
    with suppress(OSError):  # what cannot be removed stays until the next start
        (aside / rank_file(rank)).unlink(missing_ok=True)
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rmdir()  # of this node alone, where it is no shared folder
