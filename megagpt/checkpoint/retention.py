"""Which checkpoints stay: the last n, every m-th, the one that the run began with, and always the newest."""

import shutil
from collections.abc import Collection
from pathlib import Path

from megagpt.checkpoint.format import MANIFEST, folders_of, step_of


def remove_old(newest: Path, keep: int, keep_every: int | None, loaded: Path | None) -> None:
    """Delete the checkpoints beside `newest`, and older than it, that the rule does not keep. `keep` 0 keeps all.

    Folders without a manifest, and checkpoints of later steps, which a run left that went on from an earlier one, are
    not its to delete.
    """
    if not keep:
        return
    at = step_of(newest)
    assert at is not None
    found = {path: step_of(path) or 0 for path in folders_of(newest.parent) if (path / MANIFEST).exists()}
    steps = sorted(step for step in found.values() if step <= at)
    going = set(to_remove(steps, keep, keep_every))
    for path, step in found.items():
        if step in going and not (loaded is not None and loaded.exists() and path.samefile(loaded)):
            _delete(path)


def to_remove(steps: Collection[int], keep: int, keep_every: int | None) -> list[int]:
    """Of ascending `steps`, those that are neither among the last `keep` nor a multiple of `keep_every`."""
    older = list(steps)[:-keep]
    return [step for step in older if keep_every is None or step % keep_every]


def _delete(folder: Path) -> None:
    """Rename first, so that a deletion cut short leaves nothing that looks like a checkpoint."""
    going = folder.with_name(folder.name + ".deleting")
    folder.rename(going)
    shutil.rmtree(going)
