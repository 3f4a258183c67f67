"""Save checkpoints while training continues: every rank writes its own boxes, and one rename completes the checkpoint.

Training waits only until a rank's state is copied to host memory. A writer thread does the rest: it writes the rank's
file, flushes it to disk and reads it back; then rank 0 gathers what each rank wrote, writes the manifest, renames the
folder and updates `latest`. Writer threads use a process group of their own, so their collectives cannot interleave with
those of training.
"""

import secrets
import time
from collections.abc import Callable, Iterable
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
from megagpt.checkpoint.files import remove_tree, write_safetensors
from megagpt.checkpoint.format import Manifest, rank_file, replaced_folder, step_folder, temporary_folder
from megagpt.checkpoint.retention import remove_old
from megagpt.checkpoint.tokenizer_files import RunTokenizer, with_tokenizer
from megagpt.checkpoint.write import BoxRecord, FileContents, WriteFile, build_manifest, commit, write_boxes
from megagpt.distributed.object_collectives import attempt, broadcast_object
from megagpt.errors import MegagptError

Commit = Callable[[Path, Path, Manifest], None]
"""Turns a temporary folder into a checkpoint, like `write.commit`."""
RankReport = tuple[FileContents | None, MegagptError | None]
"""What a rank wrote, or why it could not; both None for a rank without entries."""
MAX_WAIT = timedelta(days=1)
"""Time limit for ranks that write longer than others. If a disk hangs, the next save waits for this one."""


@dataclass(frozen=True)
class Entry:
    """One box of one parameter, with its weight and optimizer states."""

    name: str
    """Parameter name."""
    shape: tuple[int, ...]
    """Shape of the full parameter."""
    box: Box
    values: dict[str, Tensor]
    """State name -> values, each of the box's size."""


class SaveResult(NamedTuple):
    """Result of a save, the same on every rank except for `seconds` and `left_over`."""

    step: int
    folder: Path
    seconds: float
    """Time from the end of the copy to the rename."""
    problem: str | None
    """Why there is no checkpoint; None if the save succeeded."""
    left_over: str | None = None
    """On rank 0: why an older checkpoint could not be deleted."""


class AsyncSaver:
    """Writes a run's checkpoints in the background, one at a time."""

    def __init__(
        self,
        directory: Path,
        keep: int,
        keep_every: int | None,
        loaded: Path | None,
        *,
        tokenizer: RunTokenizer | None = None,
        write_file: WriteFile = write_safetensors,
        commit: Commit = commit,
        max_wait: timedelta = MAX_WAIT,
    ) -> None:
        """Create the writer thread and its process group. Collective.

        `keep`: number of newest checkpoints to keep, 0 for all; `keep_every`: steps that are a multiple of it are kept,
        too; `loaded`: the checkpoint that the run started from, which is never deleted.
        `tokenizer`: the run's, which rank 0 writes to each checkpoint; other ranks may pass None.
        `write_file`, `commit`: file operations, which tests replace; `max_wait`: time limit for slower ranks.
        """
        self.host_buffer = HostBuffer()
        self._directory = directory
        self._keep = keep
        self._keep_every = keep_every
        self._loaded = loaded
        self._tokenizer = tokenizer
        self._write_file = write_file
        self._commit = commit
        group = dist.new_group(backend="gloo", timeout=max_wait)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._rank = dist.get_rank()
        self._token = broadcast_object(secrets.token_hex(4))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._preparing: Future[None] | None = None
        self._running: Future[SaveResult] | None = None

    def prepare(self, entries: Iterable[Entry]) -> Future[None]:
        """Allocate host memory for the copies on the writer thread, because new and pinned pages are slow.

        `start` waits for it.
        """
        size = HostBuffer.size_for(list(entries))
        self._preparing = self._thread.submit(self.host_buffer.allocate, size)
        return self._preparing

    def start(self, step: int, entries: Iterable[Entry], state: dict[str, Any], config: dict[str, Any]) -> SaveResult | None:
        """Copy the entries and start to write the checkpoint of `step`. Collective.

        Waits for the previous save first, and returns its result unless `poll` or `finish` has returned it.
        """
        previous = self.finish()
        if self._preparing is not None:
            self._preparing.result()
        copies = self.host_buffer.copy(entries)
        header = Manifest(step=step, config=config, state=state, tensors={}, files=[])
        self._running = self._thread.submit(self._save, header, copies)
        return previous

    def poll(self) -> SaveResult | None:
        """Return the result of a save that has finished since the last call; else None. Does not wait."""
        if self._running is None or not self._running.done():
            return None
        return self.finish()

    def finish(self) -> SaveResult | None:
        """Wait for the running save and return its result; None if there is none."""
        if self._running is None:
            return None
        running = self._running
        self._running = None
        return running.result()

    def close(self) -> None:
        """Wait for the running save and end the writer thread."""
        self.finish()
        self._thread.shutdown()

    def _save(self, header: Manifest, copies: list[Entry]) -> SaveResult:
        """Write one checkpoint, on the writer thread. Collective; all ranks agree on the problem, if any."""
        start = time.monotonic()
        final = step_folder(self._directory, header.step)
        temporary = temporary_folder(final, self._token)
        contents, error = attempt(lambda: self._write_entries(temporary, copies))
        left_over = None
        try:
            reports = self._gather((contents, error))
            if reports is not None:
                _, error = attempt(lambda: self._complete(temporary, final, header, reports))
                if error is None:
                    left_over = self._remove_old(final)
            problem = self._broadcast(error)
        except RuntimeError as lost:  # raised by torch if another rank is gone
            # Nothing is removed: rank 0 may be completing the checkpoint, with this rank's file, at this moment.
            problem = f"rank {self._rank}: {str(lost).splitlines()[0]}"
        else:
            if problem is not None:
                _remove_temporary(temporary, self._rank)
        return SaveResult(header.step, final, time.monotonic() - start, problem, left_over)

    def _write_entries(self, folder: Path, entries: list[Entry]) -> FileContents | None:
        """Write this rank's file; return None if the rank has no entries."""
        if not entries:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        boxes = [BoxRecord(entry.name, entry.shape, tuple(entry.values), entry.box) for entry in entries]
        tensors = (tensor for entry in entries for tensor in entry.values.values())
        return write_boxes(folder / rank_file(self._rank), boxes, tensors, self._write_file)

    def _gather(self, report: RankReport) -> list[RankReport] | None:
        """Return every rank's report on rank 0, None on other ranks. Collective."""
        if self._rank != 0:
            dist.gather_object(report, group=self._group)
            return None
        reports: list[Any] = [None] * dist.get_world_size(self._group)
        dist.gather_object(report, reports, group=self._group)
        return reports

    def _broadcast(self, error: MegagptError | None) -> str | None:
        """Return the text of rank 0's error on every rank. Collective."""
        message = [None if error is None else str(error)]
        dist.broadcast_object_list(message, src=0, group=self._group)
        return message[0]

    def _complete(self, temporary: Path, final: Path, header: Manifest, reports: list[RankReport]) -> None:
        """Commit the checkpoint, on rank 0. Raises the error of the first rank that could not write its file."""
        for _, error in reports:
            if error is not None:
                raise error
        manifest = build_manifest(header, [contents for contents, _ in reports if contents is not None])
        self._commit(temporary, final, with_tokenizer(temporary, manifest, self._tokenizer))

    def _remove_old(self, newest: Path) -> str | None:
        """Delete old checkpoints, on rank 0; return why one could not be deleted."""
        _, error = attempt(lambda: remove_old(newest, self._keep, self._keep_every, self._loaded))
        return None if error is None else str(error)


class BufferSize(NamedTuple):
    """Size of a host buffer."""

    n_values: int
    pinned: bool
    """Page-locked memory, for copies from a GPU."""


class HostBuffer:
    """Host memory for the copies, fp32. Every save reuses it, because new pages take longer than the copy."""

    def __init__(self) -> None:
        self.tensor = torch.empty(0)

    @staticmethod
    def size_for(entries: Iterable[Entry]) -> BufferSize:
        """Return the size that the values of all entries need."""
        tensors = [tensor for entry in entries for tensor in entry.values.values()]
        return BufferSize(sum(tensor.numel() for tensor in tensors), any(tensor.is_cuda for tensor in tensors))

    def allocate(self, size: BufferSize) -> None:
        """Allocate the buffer and touch all of its pages, unless it has this size already."""
        if len(self.tensor) == size.n_values:
            return
        self.tensor = torch.empty(0)  # free the old buffer first
        self.tensor = torch.empty(size.n_values, dtype=torch.float32, pin_memory=size.pinned).zero_()

    def copy(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return the entries with copies of their values, which are valid until the next call."""
        originals = list(entries)
        self.allocate(self.size_for(originals))
        copies = []
        start = 0
        for entry in originals:
            values = {}
            for state, tensor in entry.values.items():
                values[state] = self.tensor.narrow(0, start, entry.box.numel).view(entry.box.size)
                values[state].copy_(tensor, non_blocking=True)
                start += entry.box.numel
            copies.append(Entry(entry.name, entry.shape, entry.box, values))
        if self.tensor.is_pinned():
            torch.cuda.current_stream().synchronize()
        return copies


def _remove_temporary(temporary: Path, rank: int) -> None:
    """Remove what a failed save has written, to free the space.

    If the older checkpoint of the same step could not get its name back, both copies stay: the next start recovers one.
    """
    if replaced_folder(temporary).exists():
        return
    with suppress(OSError):  # what cannot be removed now is removed at the next start
        (temporary / rank_file(rank)).unlink(missing_ok=True)
        if rank == 0:
            remove_tree(temporary)
        else:
            temporary.rmdir()  # if it is not shared, it belongs to this node only
