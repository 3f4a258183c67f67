"""Checkpoints of a run: find, verify and load the one to start from; save while training continues."""

import time
from pathlib import Path

from megagpt.checkpoint.files import write_safetensors
from megagpt.checkpoint.format import checkpoint_folders, read_manifest, resolve_checkpoint, step_of
from megagpt.checkpoint.run_lock import RunLock
from megagpt.checkpoint.save import AsyncSaver, SaveResult
from megagpt.checkpoint.shared_filesystem import require_shared
from megagpt.checkpoint.tokenizer_files import RunTokenizer, read_carried, read_tokenizer, tokenizer_change
from megagpt.checkpoint.verify import (
    first_complete,
    newest_complete,
    recover_interrupted,
    remove_unfinished,
    require_complete,
    require_latest,
)
from megagpt.checkpoint.write import WriteFile
from megagpt.config.schema import CheckpointConfig
from megagpt.distributed.object_collectives import broadcast_object, run_on_ranks
from megagpt.distributed.rank_zero import rank_zero_print, rank_zero_warn
from megagpt.engine.engine import Engine
from megagpt.errors import CheckpointError, StorageError
from megagpt.training.train_state import LoadedWeights, Restored, RunProgress, entries, restore, restore_weights, run_state


def open_checkpoint_folder(config: CheckpointConfig) -> RunLock | None:
    """Create checkpoint.dir, lock it for this run, and clean up after interrupted saves. Collective.

    Returns the lock on rank 0, and None on other ranks or if checkpoint.dir is not set.
    Raises CheckpointError if the nodes do not share the folder or another run is using it.
    """
    if config.dir is None:
        return None
    directory = Path(config.dir)
    require_shared(directory)
    lock = run_on_ranks(lambda: RunLock.acquire(directory, rank_zero_warn), only_rank=0)
    run_on_ranks(lambda: _clean_up(directory), only_rank=0)
    return lock


def find_checkpoint(config: CheckpointConfig) -> Path | None:
    """Return the complete checkpoint to resume from, or None if the run starts at step 0. Collective.

    Raises CheckpointError if it is damaged, and if the run would overwrite the checkpoints of another run.
    """
    directory = Path(config.dir) if config.dir is not None else None
    if config.resume not in ("auto", "never"):
        source = broadcast_object(run_on_ranks(lambda: _resolve("checkpoint.resume", config.resume), only_rank=0))
        if directory is None:
            return require_complete(source)
        return _newest_since(source, directory, config.resume) or require_complete(source)
    if directory is None:
        return None
    if config.resume == "auto":
        return newest_complete(directory, rank_zero_warn)
    run_on_ranks(lambda: _require_no_checkpoint(directory), only_rank=0)
    return None


def find_initial_weights(config: CheckpointConfig) -> Path | None:
    """Return the complete checkpoint of checkpoint.initialize_from, or None if the key is not set. Collective.

    Raises CheckpointError if it is damaged.
    """
    path = config.initialize_from
    if path is None:
        return None
    return require_complete(broadcast_object(run_on_ranks(lambda: _resolve("checkpoint.initialize_from", path), only_rank=0)))


def load_checkpoint(engine: Engine, folder: Path) -> Restored:
    """Load a verified checkpoint into the engine, and report it on rank 0. Collective."""
    restored = restore(engine, folder)
    rank_zero_print(f"loaded {folder}: step {restored.step}, sample {restored.state.consumed_samples}; {_amounts(restored)}")
    for note in restored.notes:
        rank_zero_print(f"loaded {folder}: {note}")
    return restored


def load_initial_weights(engine: Engine, folder: Path) -> None:
    """Load only the weights of a verified checkpoint into the engine, and report it on rank 0. Collective."""
    loaded = restore_weights(engine, folder)
    rank_zero_print(
        f"initialized from the weights of {folder}: step {loaded.step} there; the optimizer, the learning rate schedule and "
        f"the data start from the beginning; {_amounts(loaded)}"
    )


class Checkpointer:
    """Saves a run's checkpoints asynchronously; does nothing if checkpoint.dir is not set."""

    def __init__(
        self,
        engine: Engine,
        loaded: Path | None,
        step: int,
        lock: RunLock | None = None,
        write_file: WriteFile = write_safetensors,
        initial_weights: Path | None = None,
    ) -> None:
        """`loaded`: the checkpoint of step `step` that the run started from, which is never deleted. Collective.

        `lock`: the folder's lock, on rank 0; `write_file`: writes one safetensors file; `initial_weights`: the checkpoint
        that gave only its weights.
        """
        self._engine = engine
        self._lock = lock
        self._config = engine.config.checkpoint
        self.last_step = step if loaded is not None else None
        """Step of the last save that was started, or of the loaded checkpoint; None after a failed save."""
        self.newest = loaded
        """The last checkpoint that this run has written or loaded."""
        self._prepared = False
        self._saver: AsyncSaver | None = None
        path = engine.config.data.tokenizer
        tokenizer = run_on_ranks(lambda: _tokenizer_to_carry(path, loaded or initial_weights), only_rank=0)
        if self._config.dir is not None:
            self._saver = AsyncSaver(
                Path(self._config.dir),
                self._config.keep,
                self._config.keep_every,
                loaded,
                tokenizer=tokenizer,
                write_file=write_file,
            )

    @property
    def enabled(self) -> bool:
        """Whether the run saves checkpoints."""
        return self._saver is not None

    def save(self, step: int, progress: RunProgress) -> None:
        """Start a save. Training waits for the previous save, if it is still running, and for a copy in host memory.

        Raises CheckpointError if another run has taken the folder over.
        """
        if self._saver is None:
            return
        start = time.monotonic()
        self.finish()
        self._engine.phase.enter("check of the run lock")
        run_on_ranks(self._require_lock)
        self._engine.phase.enter("copy of the state for a checkpoint")
        config = self._engine.config.model_dump(mode="json")
        self._saver.start(step, entries(self._engine), run_state(self._engine, progress), config)
        self.last_step = step
        rank_zero_print(f"saving step {step}: training waited {time.monotonic() - start:.3f} s")

    def poll(self) -> None:
        """Report a save that has finished. After the first step, when optimizer states exist, prepare host memory."""
        if self._saver is None:
            return
        if not self._prepared:
            self._saver.prepare(entries(self._engine))
            self._prepared = True
        self._report(self._saver.poll())

    def finish(self, required: bool = False) -> None:
        """Wait for the running save. With `required`, raise CheckpointError if it failed."""
        if self._saver is None:
            return
        self._engine.phase.enter("wait for a checkpoint to be written")
        result = self._saver.finish()
        self._report(result)
        if required and result is not None and result.problem is not None:
            raise CheckpointError(f"the checkpoint of step {result.step} could not be saved: {result.problem}")

    def close(self) -> None:
        """End the writer thread and free the folder for other runs."""
        if self._saver is not None:
            self._saver.close()
        self.release_lock()

    def release_lock(self) -> None:
        """Free the folder for other runs, which would otherwise wait until this process is known to have ended."""
        if self._lock is not None:
            self._lock.release()

    def _require_lock(self) -> None:
        if self._lock is not None:
            self._lock.require_owned()

    def _report(self, result: SaveResult | None) -> None:
        """Report how a save ended. A failed save does not end training: the earlier checkpoints are unchanged."""
        if result is None:
            return
        if result.problem is None:
            self.newest = result.folder
            rank_zero_print(f"saved {result.folder} in {result.seconds:.1f} s")
            if result.left_over is not None:
                rank_zero_warn(f"an older checkpoint could not be deleted: {result.left_over}")
            return
        self.last_step = None
        rank_zero_warn(
            f"NOT SAVED: the checkpoint of step {result.step}: {result.problem}; training continues, and the earlier "
            "checkpoints are unchanged"
        )


def format_bytes(n_bytes: float) -> str:
    """Format a number of bytes for people, in decimal units, for example "4.27 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:  # less than 1000 when rounded
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} TB"


def _resolve(key: str, path: str) -> Path:
    try:
        return resolve_checkpoint(path)
    except CheckpointError as error:
        raise type(error)(f"{key}: {error}") from None


def _clean_up(directory: Path) -> None:
    """Recover and remove what interrupted saves left behind."""
    recover_interrupted(directory, rank_zero_warn)
    remove_unfinished(directory, rank_zero_warn)


def _newest_since(source: Path, directory: Path, resume: str) -> Path | None:
    """Return the newest complete checkpoint that this run has saved since it was set to resume from `source`. Collective.

    None if there is none: it is the first start. Raises CheckpointError if the folder has the checkpoints of another run.
    """
    if directory.resolve() == Path(resume).resolve():
        return newest_complete(directory, rank_zero_warn)
    candidates = broadcast_object(run_on_ranks(lambda: _saved_since(source, directory, resume), only_rank=0))
    folder, problems = first_complete(candidates)
    for problem in problems:
        rank_zero_warn(problem)
    if folder is not None:
        rank_zero_print(
            f"{folder.name} in {directory} was saved after this run resumed from {source}: the run continues from there; to "
            "start from the older checkpoint again, set another checkpoint.dir"
        )
    return folder


def _saved_since(source: Path, directory: Path, resume: str) -> list[Path]:
    """Return the checkpoints of runs with the same checkpoint.resume, newest first; on rank 0."""
    folders = sorted(checkpoint_folders(directory), key=lambda folder: step_of(folder) or 0, reverse=True)
    first_step = read_manifest(source).step
    mine = [folder for folder in folders if (step_of(folder) or 0) > first_step and _resume_of(folder) == resume]
    inside = source.resolve().parent == directory.resolve()
    if folders and not mine and not inside:
        raise CheckpointError(
            f"checkpoint.resume: {resume}, but checkpoint.dir {directory} has the checkpoints of another run (the newest is "
            f'{folders[0].name}), which this run would overwrite; name another folder, or use "auto" to resume from them'
        )
    later = [folder.name for folder in folders if (step_of(folder) or 0) > first_step]
    if later and not mine:
        rank_zero_warn(f"set back to {source.name}: this run will replace {', '.join(reversed(later))} in {directory}")
    return mine


def _resume_of(folder: Path) -> str | None:
    """Return the checkpoint.resume of the run that saved a checkpoint; None if that cannot be read."""
    try:
        section = read_manifest(folder).config.get("checkpoint")
    except StorageError:
        raise
    except CheckpointError:
        return None
    return section.get("resume") if isinstance(section, dict) else None


def _amounts(loaded: LoadedWeights) -> str:
    least, most = min(loaded.bytes_read), max(loaded.bytes_read)
    per_rank = format_bytes(most) if least == most else f"{format_bytes(least)} to {format_bytes(most)}"
    suffix = " per rank" if len(loaded.bytes_read) > 1 else ""
    return f"{format_bytes(loaded.total_bytes)} verified, {per_rank} read{suffix}"


def _tokenizer_to_carry(path: str | None, loaded: Path | None) -> RunTokenizer | None:
    """Return the tokenizer that this run's checkpoints carry, and warn if the loaded checkpoint has another one.

    `path`: data.tokenizer; a run whose config names none keeps the one of the checkpoint that its weights come from.
    """
    tokenizer = None if path is None else read_tokenizer(path)
    if loaded is None:
        return tokenizer
    manifest = read_manifest(loaded)
    change = tokenizer_change(loaded, manifest, tokenizer)
    if change is not None:
        rank_zero_warn(change)
    return tokenizer or read_carried(loaded, manifest)


def _require_no_checkpoint(directory: Path) -> None:
    folders = checkpoint_folders(directory)
    require_latest(directory, folders)
    if folders:
        raise CheckpointError(
            f'checkpoint.resume: "never", but checkpoint.dir {directory} has checkpoints (the newest is {folders[0].name}), '
            'which this run would overwrite; name another folder, or use "auto" to resume'
        )
