"""What a run starts from, or goes back to: the checkpoint that is whole, and what is said of it."""

from pathlib import Path

from megagpt.checkpoint.check import newest_whole, remove_unfinished, require_whole
from megagpt.checkpoint.format import folders_of, resolve_checkpoint
from megagpt.checkpoint.shared import require_shared
from megagpt.checkpoint.together import of_rank_0, together
from megagpt.config.schema import CheckpointConfig
from megagpt.errors import CheckpointError
from megagpt.training import snapshot
from megagpt.training.engine import Engine
from megagpt.training.say import say, warn
from megagpt.training.snapshot import Restored


def find(config: CheckpointConfig) -> Path | None:
    """The checkpoint that the config asks for, whole; None for a run that begins anew (collective).

    Raises CheckpointError where it is damaged, where nodes do not share the folder, and where a run that is to begin anew
    would write over another's checkpoints.
    """
    directory = Path(config.dir) if config.dir is not None else None
    if directory is not None:
        require_shared(directory)
        together(lambda: remove_unfinished(directory, warn), only_rank=0)
    if config.resume not in ("auto", "never"):
        return require_whole(of_rank_0(together(lambda: resolve_checkpoint(config.resume), only_rank=0)))
    if directory is None:
        return None
    if config.resume == "auto":
        return newest_whole(directory, warn)
    together(lambda: _require_none(directory), only_rank=0)
    return None


def load(engine: Engine, folder: Path) -> Restored:
    """Put a checkpoint into the engine, and say so on rank 0 (collective)."""
    restored = snapshot.restore(engine, folder)
    least, most = min(restored.bytes_read), max(restored.bytes_read)
    say(
        f"loaded {folder}: step {restored.step}, sample {restored.state.samples}; {size(restored.total_bytes)} checked, "
        f"{size(least)} to {size(most)} read by a rank"
    )
    for note in restored.notes:
        say(f"loaded {folder}: {note}")
    return restored


def size(n_bytes: float) -> str:
    """A number of bytes for people, in the units of disks."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} TB"


def _require_none(directory: Path) -> None:
    found = folders_of(directory)
    if found:
        raise CheckpointError(
            f'checkpoint.resume: "never", but checkpoint.dir {directory} has checkpoints ({found[0].name} the newest), which '
            'this run would write over; name another folder, or "auto" to go on from it'
        )
