"""Write a checkpoint's files, its manifest and `latest`, without communication between ranks.

`write_checkpoint` writes an entire checkpoint from one process, for converters. `save.py` calls the same functions on many
ranks. Nothing here needs a process group.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.coverage import box_problems
from megagpt.checkpoint.files import (
    TensorSpec,
    Written,
    fsync_folder,
    remove_tree,
    sha256_of_file,
    write_durably,
    write_safetensors,
)
from megagpt.checkpoint.format import (
    LATEST,
    MASTER,
    FileRecord,
    Manifest,
    TensorRecord,
    box_key,
    rank_file,
    replaced_folder,
    step_folder,
    temporary_folder,
    write_manifest,
)
from megagpt.checkpoint.tokenizer_files import RunTokenizer, with_tokenizer
from megagpt.distributed.phase import host_name
from megagpt.errors import CheckpointError, StorageError, listed

WriteFile = Callable[[Path, Sequence[TensorSpec], Iterable[Tensor]], Written]
"""Writes one safetensors file, like `files.write_safetensors`."""
MAX_FILE_BYTES = 8 * 2**30
"""Default limit for the tensors in one file of `write_checkpoint`."""


class TensorSource(NamedTuple):
    """A tensor for `write_checkpoint`, or one box of it."""

    name: str
    """Parameter name, the same as in the model."""
    shape: tuple[int, ...]
    """Shape of the full parameter."""
    values: Mapping[str, Tensor | Callable[[], Tensor]]
    """State name -> values, or a function that returns them. "master" (the weight) is required."""
    box: Box | None = None
    """Region of the full parameter that `values` cover; None for all of it."""


class BoxRecord(NamedTuple):
    """One box of a parameter in a file."""

    name: str
    shape: tuple[int, ...]
    """Shape of the full parameter."""
    states: tuple[str, ...]
    """State names, in the order of their values in the file."""
    box: Box

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors of this box in the file, one per state, all fp32."""
        return [TensorSpec(box_key(state, self.name, self.box), torch.float32, self.box.size) for state in self.states]


class FileContents(NamedTuple):
    """A file that was written, and the boxes in it."""

    file: FileRecord
    boxes: list[BoxRecord]


def write_checkpoint(
    directory: Path,
    step: int,
    tensors: Iterable[TensorSource],
    config: dict[str, Any],
    state: dict[str, Any],
    max_file_bytes: int = MAX_FILE_BYTES,
    tokenizer: RunTokenizer | None = None,
) -> Path:
    """Write a complete checkpoint from one process and return its folder. Needs no process group.

    `tensors` is consumed file by file. A function in `TensorSource.values` is called when its tensor is written, and the
    tensor is freed before the next function is called, so memory is needed for the largest tensor only. Tensors that are
    passed directly stay in memory until their file is complete. Values are converted to fp32.
    `config`, `state`: sections of the manifest, as JSON values; resuming needs those of a training run.
    `max_file_bytes`: a new file is started if the next tensor would exceed it; a single tensor is never split.
    `tokenizer`: the tokenizer that the checkpoint carries, from `tokenizer_files.read_tokenizer`.

    Like a save of a run, the checkpoint is written to a temporary folder, read back, renamed, and named in `latest` last.
    Raises CheckpointError if the checkpoint exists already, and if a box is given twice, boxes overlap or do not cover a
    tensor, or a tensor has another shape than announced; StorageError if the disk fails. What was written is then removed.
    """
    final = step_folder(directory, step)
    if final.exists():
        raise CheckpointError(f"{final}: exists already; choose another folder or step")
    header = Manifest(step=step, config=config, state=state, tensors={}, files=[])
    temporary = temporary_folder(final, secrets.token_hex(4))
    try:
        temporary.mkdir(parents=True)
        contents = [
            write_boxes(temporary / rank_file(number), [_box_record(source) for source in sources], _values(sources))
            for number, sources in enumerate(_group_by_file(tensors, max_file_bytes))
        ]
        manifest = build_manifest(header, contents)
        problems = list(box_problems(manifest)) if contents else ["there are no tensors"]
        if problems:
            raise CheckpointError(f"{final}: not written: {listed(problems)}")
        commit(temporary, final, with_tokenizer(temporary, manifest, tokenizer))
    except OSError as error:
        raise StorageError(f"{final}: not written: {error}") from error
    finally:
        remove_tree(temporary)  # after the rename it does not exist
    return final


def write_boxes(
    path: Path, boxes: Sequence[BoxRecord], tensors: Iterable[Tensor], write_file: WriteFile = write_safetensors
) -> FileContents:
    """Write one file and compare what is on disk with what was written.

    `tensors`: for each box the values of its states, fp32 on the CPU. Raises CheckpointError if the data read back differs.
    """
    written = write_file(path, [spec for box in boxes for spec in box.specs], tensors)
    if sha256_of_file(path, from_disk=True) != written.sha256:
        raise CheckpointError(f"{path}: the data read back differs from the data written")
    return FileContents(FileRecord(name=path.name, bytes=written.bytes, sha256=written.sha256, node=host_name()), list(boxes))


def build_manifest(header: Manifest, contents: Sequence[FileContents]) -> Manifest:
    """Return the manifest of all files. `header`: a manifest without tensors and files."""
    tensors: dict[str, TensorRecord] = {}
    for number, (_, boxes) in enumerate(contents):
        for name, shape, states, box in boxes:
            record = tensors.setdefault(name, TensorRecord(shape=list(shape), kinds=list(states), boxes=[]))
            record.boxes.append((number, list(box.offset), list(box.size)))
    return header.model_copy(update={"tensors": tensors, "files": [file for file, _ in contents]})


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Turn a temporary folder, whose files are written, into the newest checkpoint.

    A folder that has the final name already, from before the run was set back, is deleted once the new one is in place.
    Raises CheckpointError if this node does not see the files of other nodes.
    """
    _require_visible(temporary, manifest.files)
    write_manifest(temporary, manifest)
    replaced = replaced_folder(temporary)
    if os.path.lexists(final):
        final.rename(replaced)
    # A run that ends here leaves two complete copies, neither under the final name; `verify.recover_interrupted` finds them.
    try:
        temporary.rename(final)
    except OSError:
        if os.path.lexists(replaced):
            replaced.rename(final)
        raise
    fsync_folder(final.parent)
    write_durably(final.parent / LATEST, final.name + "\n")
    remove_tree(replaced)


def _require_visible(folder: Path, files: Sequence[FileRecord]) -> None:
    """Raise CheckpointError with the nodes whose files are not in the folder."""
    missing_nodes = [file.node for file in files if not _has_size(folder / file.name, file.bytes)]
    if missing_nodes:
        raise CheckpointError(
            f"{folder}: node {host_name()} does not see what was written on {listed(dict.fromkeys(missing_nodes))}; "
            "checkpoint.dir must be one folder on a file system that all nodes share"
        )


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _group_by_file(tensors: Iterable[TensorSource], max_file_bytes: int) -> Iterator[list[TensorSource]]:
    """Yield the sources of one file after the other, in a list that is cleared when the next file is requested.

    Raises CheckpointError if a source contradicts an earlier one.
    """
    first_records: dict[str, BoxRecord] = {}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    group: list[TensorSource] = []
    group_bytes = 0
    for source in tensors:
        record = _box_record(source)
        _check_source(record, first_records.setdefault(record.name, record))
        if (record.name, record.box.offset) in seen:
            raise CheckpointError(f"{record.name}: its values at {list(record.box.offset)} are given twice")
        seen.add((record.name, record.box.offset))
        n_bytes = sum(spec.n_bytes for spec in record.specs)
        if group and group_bytes + n_bytes > max_file_bytes:
            yield group
            group.clear()  # the file is written: free the tensors
            group_bytes = 0
        group.append(source)
        group_bytes += n_bytes
    if group:
        yield group


def _check_source(record: BoxRecord, first: BoxRecord) -> None:
    """Raise CheckpointError if the weight is missing, or if shape or states differ from the tensor's first box."""
    if MASTER not in record.states:
        given = listed(record.states) or "nothing"
        raise CheckpointError(f"{record.name}: the weight, state {MASTER!r}, is missing; only {given} is given")
    if record.shape != first.shape:
        raise CheckpointError(f"{record.name}: given with shape {list(first.shape)} and with shape {list(record.shape)}")
    if set(record.states) != set(first.states):
        raise CheckpointError(f"{record.name}: given with states {listed(first.states)} and with {listed(record.states)}")


def _box_record(source: TensorSource) -> BoxRecord:
    box = Box.full(source.shape) if source.box is None else source.box
    return BoxRecord(source.name, source.shape, tuple(source.values), box)


def _values(sources: Sequence[TensorSource]) -> Iterator[Tensor]:
    """Yield the values of each source and state as fp32 CPU tensors. Keeps no reference to a yielded tensor."""
    for source in sources:
        size = _box_record(source).box.size
        for state, value in source.values.items():
            yield _resolve(value, f"{source.name}: {state}", size)


def _resolve(value: Tensor | Callable[[], Tensor], label: str, size: tuple[int, ...]) -> Tensor:
    tensor = value if isinstance(value, Tensor) else value()
    if tuple(tensor.shape) != size:
        raise CheckpointError(f"{label} has shape {list(tensor.shape)}, expected {list(size)}")
    return tensor.detach().to("cpu", torch.float32)
