"""Verify that a checkpoint is complete and undamaged before anything is loaded from it; all ranks share the work."""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megagpt.checkpoint.coverage import box_problems
from megagpt.checkpoint.files import sha256_of_file
from megagpt.checkpoint.format import (
    LATEST,
    MANIFEST,
    MANIFEST_SUM,
    FileRecord,
    Manifest,
    checkpoint_folders,
    latest_name,
    read_manifest,
    unfinished_folders,
)
from megagpt.checkpoint.tokenizer_files import folders_of, tokenizer_problems
from megagpt.distributed.object_collectives import all_gather_object, attempt, broadcast_object, run_on_ranks
from megagpt.distributed.phase import host_name
from megagpt.errors import CheckpointError, listed

Warn = Callable[[str], None]
"""Prints a warning."""


class FolderDifferences(NamedTuple):
    """Differences between a checkpoint's folder and its manifest, by file name only."""

    missing: list[FileRecord]
    foreign: list[str]
    """Names of files that are not in the manifest; hidden files, which file systems and desktops create, are ignored."""

    @classmethod
    def find(cls, folder: Path, manifest: Manifest) -> "FolderDifferences":
        """Compare the names in the folder with the manifest."""
        present = {path.name for path in folder.iterdir()}
        expected = {file.name for file in manifest.files} | {MANIFEST, MANIFEST_SUM}
        missing = [file for file in manifest.files if file.name not in present]
        return cls(missing, sorted(name for name in present - expected - folders_of(manifest) if not name.startswith(".")))

    def problems(self, folder: Path) -> list[str]:
        """Return one sentence for each difference."""
        problems = [f"{folder / file.name}: missing; node {file.node} wrote it" for file in self.missing]
        return problems + [f"{folder / name}: not a file of this checkpoint; move it elsewhere" for name in self.foreign]


def damaged_files(folder: Path, files: Iterable[FileRecord]) -> list[str]:
    """Return one sentence for each file whose size or SHA-256 is not as written. Missing files are ignored."""
    problems = []
    for file in files:
        path = folder / file.name
        try:
            size = path.stat().st_size
            if size != file.bytes:
                problems.append(f"{path}: {size} bytes, expected {file.bytes}; the file is damaged")
            elif sha256_of_file(path) != file.sha256:
                problems.append(f"{path}: its SHA-256 differs from the manifest's; the file is damaged")
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return problems


def local_problems(folder: Path) -> list[str]:
    """Return all problems with the files of a checkpoint. This process reads every file; not collective."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    return FolderDifferences.find(folder, manifest).problems(folder) + damaged_files(folder, manifest.files)


def newest_complete(directory: Path, warn: Warn) -> Path | None:
    """Return the newest complete checkpoint in a run's folder, or None if it contains no checkpoints. Collective.

    The one that `latest` names counts as the newest. Problems with newer checkpoints are passed to `warn`, which should
    print on rank 0 only. Raises CheckpointError if there are checkpoints but none is complete, and if files are on the
    disks of single nodes.
    """
    candidates, latest_problem = broadcast_object(run_on_ranks(lambda: _candidates(directory), only_rank=0))
    problems = [] if latest_problem is None else [latest_problem]
    for folder in candidates:
        folder_problems = checkpoint_problems(folder)
        if folder_problems:
            problems += folder_problems
            continue
        for problem in problems:
            warn(problem)
        if problems:
            warn(f"resuming from {folder}, the newest complete checkpoint")
        return folder
    if candidates:
        raise CheckpointError(
            f"{directory}: no complete checkpoint found: {listed(problems)}; to start from scratch, set another checkpoint.dir"
        )
    for problem in problems:
        warn(problem)
    return None


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

    Raises CheckpointError if the nodes do not see the same files.
    """
    _require_same_manifest(folder)
    manifest, error = attempt(lambda: read_manifest(folder))
    errors = [other for other in all_gather_object(error) if other is not None]
    if manifest is None or errors:
        return [str(errors[0])]
    differences, uncovered = broadcast_object(run_on_ranks(lambda: _compare_folder(folder, manifest), only_rank=0))
    _require_files_of_all_nodes(folder, manifest, differences.missing)
    local_files = sorted(manifest.files, key=lambda file: file.name)[dist.get_rank() :: dist.get_world_size()]
    damaged = [problem for problems in all_gather_object(damaged_files(folder, local_files)) for problem in problems]
    return differences.problems(folder) + uncovered + damaged


def remove_unfinished(directory: Path, warn: Warn) -> None:
    """Delete what interrupted saves and deletions left behind. Call it on rank 0 only."""
    for folder in unfinished_folders(directory):
        warn(f"{folder}: left by an interrupted save or deletion; removed")
        shutil.rmtree(folder, ignore_errors=True)


def _compare_folder(folder: Path, manifest: Manifest) -> tuple[FolderDifferences, list[str]]:
    """Return the differences between folder and manifest, and the problems with the manifest's boxes."""
    uncovered = [f"{folder / MANIFEST}: {problem}" for problem in box_problems(manifest)]
    return FolderDifferences.find(folder, manifest), uncovered + tokenizer_problems(folder, manifest)


def _candidates(directory: Path) -> tuple[list[Path], str | None]:
    """Return the folders to try, in order, and what is wrong with `latest`."""
    candidates = checkpoint_folders(directory)
    latest = latest_name(directory)
    if latest is None or latest in {folder.name for folder in candidates}:
        return candidates, None
    return candidates, f"{directory / LATEST}: names {latest!r}, which is not a checkpoint in this folder"


def _require_same_manifest(folder: Path) -> None:
    """Raise CheckpointError unless every rank sees the same manifest, or none."""
    content, _ = attempt((folder / MANIFEST).read_bytes)
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
