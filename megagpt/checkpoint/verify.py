"""Verify that a checkpoint is complete and undamaged before anything is loaded from it; all ranks share the work."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megagpt.checkpoint.coverage import box_problems
from megagpt.checkpoint.files import remove_tree, write_durably
from megagpt.checkpoint.format import (
    LATEST,
    MANIFEST,
    MANIFEST_SUM,
    MAX_MANIFEST_BYTES,
    REPLACED,
    WRITING,
    FileRecord,
    Manifest,
    checkpoint_folders,
    content_problem,
    latest_name,
    read_manifest,
    unfinished_folders,
)
from megagpt.checkpoint.tokenizer_files import folders_of, tokenizer_problems
from megagpt.distributed.object_collectives import all_gather_object, attempt, broadcast_object, run_on_ranks
from megagpt.distributed.phase import host_name
from megagpt.errors import CheckpointError, StorageError, listed
from megagpt.regular_file import read_regular_file

Warn = Callable[[str], None]
"""Prints a warning."""


class FolderDifferences(NamedTuple):
    """Differences between a checkpoint's folder and its manifest, by file name only."""

    missing: list[FileRecord]
    foreign: list[str]
    """Names of files that are not in the manifest; hidden files, which file systems and desktops create, are ignored."""

    @classmethod
    def find(cls, folder: Path, manifest: Manifest) -> "FolderDifferences":
        """Compare the names in the folder with the manifest. A link that leads nowhere counts as missing."""
        with os.scandir(folder) as entries:
            present = {entry.name for entry in entries if not entry.is_symlink() or Path(entry).exists()}
        expected = {file.name for file in manifest.files} | {MANIFEST, MANIFEST_SUM}
        missing = [file for file in manifest.files if file.name not in present]
        return cls(missing, sorted(name for name in present - expected - folders_of(manifest) if not name.startswith(".")))

    def problems(self, folder: Path) -> list[str]:
        """Return one sentence for each difference."""
        problems = [f"{folder / file.name}: missing; node {file.node} wrote it" for file in self.missing]
        return problems + [f"{folder / name}: not a file of this checkpoint; move it elsewhere" for name in self.foreign]


def damaged_files(folder: Path, files: Iterable[FileRecord]) -> list[str]:
    """Return one sentence for each file that is missing or whose size or SHA-256 is not as written.

    Raises StorageError if a file cannot be read, which says nothing about its content.
    """
    problems = []
    for file in files:
        path = folder / file.name
        try:
            problem = content_problem(path, file.bytes, file.sha256)
        except FileNotFoundError:
            problem = f"{path}: missing; node {file.node} wrote it"
        except OSError as error:
            problem = f"{path}: {error.strerror}; the file is damaged"
        if problem is not None:
            problems.append(problem)
    return problems


def local_problems(folder: Path) -> list[str]:
    """Return all problems with a checkpoint. This process reads every file; not collective.

    Raises StorageError if a file cannot be read.
    """
    try:
        manifest = read_manifest(folder)
    except StorageError:
        raise
    except CheckpointError as error:
        return [str(error)]
    differences, uncovered = _compare_folder(folder, manifest)
    present = [file for file in manifest.files if file not in differences.missing]
    return differences.problems(folder) + uncovered + damaged_files(folder, present)


def newest_complete(directory: Path, warn: Warn) -> Path | None:
    """Return the newest complete checkpoint in a run's folder, or None if it contains no checkpoints. Collective.

    The one that `latest` names counts as the newest. Problems with newer checkpoints are passed to `warn`, which should
    print on rank 0 only. Raises CheckpointError if there are checkpoints but none is complete, if `latest` names one but
    there is none, if files are on the disks of single nodes, and (StorageError) if a file cannot be read.
    """
    candidates, latest_problem = broadcast_object(run_on_ranks(lambda: _candidates(directory), only_rank=0))
    folder, problems = first_complete(candidates)
    if latest_problem is not None:
        problems.insert(0, latest_problem)
    if folder is None:
        if candidates:
            raise CheckpointError(
                f"{directory}: no complete checkpoint found: {listed(problems)}; to start from scratch, set another "
                "checkpoint.dir"
            )
        return None
    for problem in problems:
        warn(problem)
    if problems:
        warn(f"resuming from {folder}, the newest complete checkpoint")
    return folder


def first_complete(candidates: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """Return the first complete checkpoint, or None, and the problems of those before it. Collective."""
    problems: list[str] = []
    for folder in candidates:
        folder_problems = checkpoint_problems(folder)
        if not folder_problems:
            return folder, problems
        problems += folder_problems
    return None, problems


def require_latest(directory: Path, candidates: Sequence[Path]) -> None:
    """Raise CheckpointError if `latest` names a checkpoint although there are no `candidates` at all.

    A volume that is not mounted and folders that were moved look like this: a run from scratch would lose the training.
    """
    latest = latest_name(directory)
    if latest is not None and not candidates:
        raise CheckpointError(
            f"{directory / LATEST}: names {latest!r}, but there is no checkpoint in this folder; is the volume mounted, and "
            f"were the folders moved? To start from scratch, delete {directory / LATEST} or set another checkpoint.dir"
        )


def require_complete(folder: Path) -> Path:
    """Return the folder. Raises CheckpointError with all problems if the checkpoint is not complete. Collective."""
    raise_all(folder, checkpoint_problems(folder))
    return folder


def raise_all(folder: Path, problems: Sequence[str]) -> None:
    """Raise CheckpointError with all problems, one per line; return if there are none."""
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        raise CheckpointError("\n".join([f"{folder}: {len(problems)} problems", *(f"  {problem}" for problem in problems)]))


def checkpoint_problems(folder: Path) -> list[str]:
    """Return all problems with a checkpoint, on every rank. Collective: each rank reads a share of the files.

    Raises CheckpointError if the nodes do not see the same files, and StorageError if a file cannot be read.
    """
    _require_same_manifest(folder)
    manifest, error = attempt(lambda: read_manifest(folder))
    errors = [other for other in all_gather_object(error) if other is not None]
    storage_error = next((error for error in errors if isinstance(error, StorageError)), None)
    if storage_error is not None:
        raise storage_error
    if manifest is None or errors:
        return [str(errors[0])]
    differences, uncovered = broadcast_object(run_on_ranks(lambda: _compare_folder(folder, manifest), only_rank=0))
    _require_files_of_all_nodes(folder, manifest, differences.missing)
    present = sorted((file for file in manifest.files if file not in differences.missing), key=lambda file: file.name)
    local_files = present[dist.get_rank() :: dist.get_world_size()]
    local_damage = run_on_ranks(lambda: damaged_files(folder, local_files))
    damaged = [problem for problems in all_gather_object(local_damage) for problem in problems or ()]
    return differences.problems(folder) + uncovered + damaged


def recover_interrupted(directory: Path, warn: Warn) -> None:
    """Finish saves that ended while a checkpoint replaced an older one of the same step. Call it on rank 0 only.

    At that moment both copies are complete, but neither has the final name. The new copy gets it if it is undamaged, and
    else the old copy. Call it before `remove_unfinished`. Raises StorageError if a folder cannot be read or renamed.
    """
    for old in unfinished_folders(directory):
        if not old.name.endswith(REPLACED):
            continue
        new = old.with_name(old.name.removesuffix(REPLACED))
        final = directory / old.name.split(WRITING)[0]
        if os.path.lexists(final):
            continue
        complete = new if new.is_dir() and not local_problems(new) else old
        complete.rename(final)
        if complete is new:
            write_durably(directory / LATEST, final.name + "\n")
        warn(f"{final}: recovered from {complete.name}, which an interrupted save left behind")


def remove_unfinished(directory: Path, warn: Warn) -> None:
    """Delete what interrupted saves and deletions left behind. Call it on rank 0 only, after `recover_interrupted`."""
    for folder in unfinished_folders(directory):
        removed = remove_tree(folder)
        warn(f"{folder}: left by an interrupted save or deletion; {'removed' if removed else 'it could not be removed'}")


def _compare_folder(folder: Path, manifest: Manifest) -> tuple[FolderDifferences, list[str]]:
    """Return the differences between folder and manifest, and the problems with the manifest's boxes."""
    uncovered = [f"{folder / MANIFEST}: {problem}" for problem in box_problems(manifest)]
    return FolderDifferences.find(folder, manifest), uncovered + tokenizer_problems(folder, manifest)


def _candidates(directory: Path) -> tuple[list[Path], str | None]:
    """Return the folders to try, in order, and what is wrong with `latest`. Raises what `require_latest` raises."""
    candidates = checkpoint_folders(directory)
    require_latest(directory, candidates)
    latest = latest_name(directory)
    if latest is None or latest in {folder.name for folder in candidates}:
        return candidates, None
    return candidates, f"{directory / LATEST}: names {latest!r}, which is not a checkpoint in this folder"


def _require_same_manifest(folder: Path) -> None:
    """Raise CheckpointError unless every rank sees the same manifest, or none."""
    content, _ = attempt(lambda: read_regular_file(folder / MANIFEST, MAX_MANIFEST_BYTES))
    checksum = hashlib.sha256(content).hexdigest() if content is not None else None
    views = all_gather_object((host_name(), checksum))
    first_node, first_checksum = views[0]
    others = [node for node, other in views if other != first_checksum]
    if others:
        raise CheckpointError(
            f"{folder}: node {first_node} and {listed(dict.fromkeys(others))} do not see the same {MANIFEST}; "
            "checkpoints must be on a file system that all nodes share"
        )


def _require_files_of_all_nodes(folder: Path, manifest: Manifest, missing: list[FileRecord]) -> None:
    """Raise CheckpointError if all files of a node are missing: it wrote to its own disk.

    The run must not resume from an older checkpoint without notice.
    """
    missing_names = {file.name for file in missing}
    present = {file.node for file in manifest.files if file.name not in missing_names}
    absent = list(dict.fromkeys(file.node for file in missing if file.node not in present))
    if absent and present:
        raise CheckpointError(
            f"{folder}: all files of {listed(absent)} are missing: these nodes wrote to their own disks; copy their "
            f"{folder.name} into one folder that all nodes share"
        )
