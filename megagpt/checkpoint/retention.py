"""Delete old checkpoints: keep the last n, every m-th, the one that the run started from, and always the newest."""

import shutil
from collections.abc import Collection
from pathlib import Path

from megagpt.checkpoint.format import MANIFEST, checkpoint_folders, step_of


def remove_old(newest: Path, keep: int, keep_every: int | None, loaded: Path | None) -> None:
    """Delete the checkpoints in the folder of `newest` that are older and not kept.

    `keep`: number of newest checkpoints to keep, 0 for all; `keep_every`: steps that are a multiple of it are kept, too;
    `loaded`: a checkpoint that is never deleted. Checkpoints of later steps, left by a run that was set back, and folders
    without a manifest are neither counted nor deleted.
    """
    if not keep:
        return
    newest_step = step_of(newest)
    assert newest_step is not None
    step_by_folder = {path: step_of(path) or 0 for path in checkpoint_folders(newest.parent) if (path / MANIFEST).exists()}
    steps = sorted(step for step in step_by_folder.values() if step <= newest_step)
    removed_steps = set(steps_to_remove(steps, keep, keep_every))
    for path, step in step_by_folder.items():
        is_loaded = loaded is not None and loaded.exists() and path.samefile(loaded)
        if step in removed_steps and not is_loaded:
            _delete(path)


def steps_to_remove(steps: Collection[int], keep: int, keep_every: int | None) -> list[int]:
    """Return those of the ascending `steps` that are neither among the last `keep` nor a multiple of `keep_every`."""
    older = list(steps)[:-keep]
    return [step for step in older if keep_every is None or step % keep_every]


def _delete(folder: Path) -> None:
    """Rename before deleting, so that an interrupted deletion leaves nothing that looks like a checkpoint."""
    renamed = folder.with_name(folder.name + ".deleting")
    folder.rename(renamed)
    shutil.rmtree(renamed)
