"""Whether a checkpoint is whole, found before anything is read from it, by all ranks together."""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megagpt.checkpoint.coverage import box_problems
from megagpt.checkpoint.files import digest
from megagpt.checkpoint.format import (
    LATEST,
    MANIFEST,
    MANIFEST_SUM,
    FileRecord,
    Manifest,
    folders_of,
    pointed_at,
    read_manifest,
    unfinished,
)
from megagpt.checkpoint.together import attempt, of_all, of_rank_0, together
from megagpt.errors import CheckpointError, listed
from megagpt.parallel.whereabouts import node_name

Warn = Callable[[str], None]


class Listing(NamedTuple):
    """A checkpoint's folder beside its manifest."""

    missing: list[FileRecord]
    foreign: list[str]
    """Names that the manifest does not have; hidden files, which file systems and desktops leave, aside."""

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> "Listing":
        """Looks at names alone."""
        here = {path.name for path in folder.iterdir()}
        told = {file.name for file in manifest.files} | {MANIFEST, MANIFEST_SUM}
        missing = [file for file in manifest.files if file.name not in here]
        return cls(missing, sorted(name for name in here - told if not name.startswith(".")))

    def problems(self, folder: Path) -> list[str]:
        """One sentence for each thing that is wrong."""
        found = [f"{folder / file.name}: missing; node {file.node} wrote it" for file in self.missing]
        return found + [f"{folder / name}: not a file of this checkpoint; move it elsewhere" for name in self.foreign]


def damaged(folder: Path, files: Iterable[FileRecord]) -> list[str]:
    """Those of the files that are not as they were written, one sentence each; missing ones aside."""
    problems = []
    for file in files:
        path = folder / file.name
        try:
            size = path.stat().st_size
            if size != file.bytes:
                problems.append(f"{path}: {size} bytes, expected {file.bytes}; the file is damaged")
            elif digest(path) != file.sha256:
                problems.append(f"{path}: its SHA-256 is not the manifest's; the file is damaged")
        except FileNotFoundError:
            continue
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return problems


def problems_of(folder: Path) -> list[str]:
    """All that is wrong with a checkpoint, found by this process alone; every file is read."""
    manifest, problem = attempt_manifest(folder)
    if manifest is None:
        return [problem or ""]
    return Listing.of(folder, manifest).problems(folder) + damaged(folder, manifest.files)


def attempt_manifest(folder: Path) -> tuple[Manifest | None, str | None]:
    """The manifest, or why there is none."""
    try:
        return read_manifest(folder), None
    except CheckpointError as error:
        return None, str(error)


def newest_whole(directory: Path, warn: Warn) -> Path | None:
    """The newest whole checkpoint in a run's folder (collective); None where the folder has none of any kind.

    What is not whole is told to `warn`, on rank 0. Raises CheckpointError where there are checkpoints but none is whole,
    and where files are on the disks of single nodes.
    """
    found = together(lambda: _candidates(directory), only_rank=0)
    candidates, pointer_problem = of_rank_0(found)
    problems = [pointer_problem] if pointer_problem else []
    for folder in candidates:
        wrong = whole_problems(folder)
        if not wrong:
            for problem in problems:
                warn(problem)
            if problems:
                warn(f"going on from {folder}, the newest whole checkpoint")
            return folder
        problems += wrong
    if not candidates:
        for problem in problems:
            warn(problem)
        return None
    raise CheckpointError(
        f"{directory}: no checkpoint is whole: {'; '.join(problems[:8])}; to begin anew, name another checkpoint.dir"
    )


def require_whole(folder: Path) -> Path:
    """The folder (collective); raises CheckpointError with all that is wrong with it."""
    raise_all(folder, whole_problems(folder))
    return folder


def raise_all(folder: Path, problems: Sequence[str]) -> None:
    """Raise CheckpointError with all of them, one a line; nothing where there are none."""
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        raise CheckpointError("\n".join([f"{folder}: {len(problems)} problems", *(f"  {problem}" for problem in problems)]))


def whole_problems(folder: Path) -> list[str]:
    """All that is wrong with a checkpoint, on every rank (collective): each rank reads its share of the files.

    Raises CheckpointError where nodes do not see the same files.
    """
    _require_one_view(folder)
    manifest, problem = attempt_manifest(folder)
    unreadable = [text for text in of_all(problem) if text]
    if manifest is None or unreadable:
        return unreadable[:1]
    listing, uncovered = of_rank_0(together(lambda: _look(folder, manifest), only_rank=0))
    _require_all_nodes(folder, manifest, listing.missing)
    share = sorted(manifest.files, key=lambda file: file.name)[dist.get_rank() :: dist.get_world_size()]
    return listing.problems(folder) + uncovered + [text for texts in of_all(damaged(folder, share)) for text in texts]


def remove_unfinished(directory: Path, warn: Warn) -> None:
    """Delete what earlier starts left that ended within a save (on rank 0 alone)."""
    for folder in unfinished(directory):
        warn(f"{folder}: a save or deletion that was cut short; removed")
        shutil.rmtree(folder, ignore_errors=True)


def _look(folder: Path, manifest: Manifest) -> tuple[Listing, list[str]]:
    return Listing.of(folder, manifest), [f"{folder / MANIFEST}: {problem}" for problem in box_problems(manifest)]


def _candidates(directory: Path) -> tuple[list[Path], str | None]:
    candidates, named = folders_of(directory), pointed_at(directory)
    if named is None or named in {folder.name for folder in candidates}:
        return candidates, None
    return candidates, f"{directory / LATEST}: names {named!r}, which is no checkpoint here"


def _require_one_view(folder: Path) -> None:
    """Every rank must see the manifest that rank 0 sees, or none as rank 0."""
    content, _ = attempt((folder / MANIFEST).read_bytes)
    seen = of_all((node_name(), hashlib.sha256(content).hexdigest() if content is not None else None))
    others = [node for node, mark in seen if mark != seen[0][1]]
    if others:
        raise CheckpointError(
            f"{folder}: node {seen[0][0]} and {listed(dict.fromkeys(others))} do not see the same {MANIFEST}; "
            "checkpoints must be on a file system that all nodes share"
        )


def _require_all_nodes(folder: Path, manifest: Manifest, missing: list[FileRecord]) -> None:
    """A node of which nothing is here wrote to its own disk: that run is not to go on from an older checkpoint unnoticed."""
    gone = {file.name for file in missing}
    present = {file.node for file in manifest.files if file.name not in gone}
    absent = list(dict.fromkeys(file.node for file in missing if file.node not in present))
    if absent and present:
        raise CheckpointError(
            f"{folder}: all files of {listed(absent)} are missing: these nodes wrote to their own disks; copy their "
            f"{folder.name} into one folder that all nodes share"
        )
