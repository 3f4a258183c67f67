"""Checkpoints of a run: find, verify and load the one to resume from; save while training continues."""

import time
from pathlib import Path

from megagpt.checkpoint.files import write_safetensors
from megagpt.checkpoint.format import checkpoint_folders, read_manifest, resolve_checkpoint
from megagpt.checkpoint.save import AsyncSaver, SaveResult
from megagpt.checkpoint.shared_filesystem import require_shared
from megagpt.checkpoint.tokenizer_files import RunTokenizer, read_carried, read_tokenizer, tokenizer_change
from megagpt.checkpoint.verify import newest_complete, remove_unfinished, require_complete
from megagpt.checkpoint.write import WriteFile
from megagpt.config.schema import CheckpointConfig
from megagpt.distributed.object_collectives import broadcast_object, run_on_ranks
from megagpt.distributed.rank_zero import rank_zero_print, rank_zero_warn
from megagpt.engine.engine import Engine
from megagpt.errors import CheckpointError
from megagpt.training.train_state import Restored, RunProgress, entries, restore, run_state


def find_checkpoint(config: CheckpointConfig) -> Path | None:
    """Return the complete checkpoint that the config asks for, or None if the run starts from scratch. Collective.

    Raises CheckpointError if it is damaged, if the nodes do not share the folder, and if a run from scratch would
    overwrite the checkpoints of another run.
    """
    directory = Path(config.dir) if config.dir is not None else None
    if directory is not None:
        require_shared(directory)
        run_on_ranks(lambda: remove_unfinished(directory, rank_zero_warn), only_rank=0)
    if config.resume not in ("auto", "never"):
        folder = run_on_ranks(lambda: resolve_checkpoint(config.resume), only_rank=0)
        return require_complete(broadcast_object(folder))
    if directory is None:
        return None
    if config.resume == "auto":
        return newest_complete(directory, rank_zero_warn)
    run_on_ranks(lambda: _require_no_checkpoint(directory), only_rank=0)
    return None


def load_checkpoint(engine: Engine, folder: Path) -> Restored:
    """Load a verified checkpoint into the engine, and report it on rank 0. Collective."""
    restored = restore(engine, folder)
    least, most = min(restored.bytes_read), max(restored.bytes_read)
    read = format_bytes(most) if least == most else f"{format_bytes(least)} to {format_bytes(most)}"
    per_rank = " per rank" if len(restored.bytes_read) > 1 else ""
    rank_zero_print(
        f"loaded {folder}: step {restored.step}, sample {restored.state.consumed_samples}; "
        f"{format_bytes(restored.total_bytes)} verified, {read} read{per_rank}"
    )
    for note in restored.notes:
        rank_zero_print(f"loaded {folder}: {note}")
    return restored


class Checkpointer:
    """Saves a run's checkpoints asynchronously; does nothing if checkpoint.dir is not set."""

    def __init__(self, engine: Engine, loaded: Path | None, step: int, write_file: WriteFile = write_safetensors) -> None:
        """`loaded`: the checkpoint of step `step` that the run started from, which is never deleted. Collective.

        `write_file`: writes one safetensors file.
        """
        self._engine = engine
        self._config = engine.config.checkpoint
        self.last_step = step if loaded is not None else None
        """Step of the last save that was started, or of the loaded checkpoint; None after a failed save."""
        self.newest = loaded
        """The last checkpoint that this run has written or loaded."""
        self._prepared = False
        self._saver: AsyncSaver | None = None
        path = engine.config.data.tokenizer
        tokenizer = run_on_ranks(lambda: _tokenizer_to_carry(path, loaded), only_rank=0)
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
        """Start a save. Training waits for the previous save, if it is still running, and for a copy in host memory."""
        if self._saver is None:
            return
        start = time.monotonic()
        self.finish()
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
        """End the writer thread."""
        if self._saver is not None:
            self._saver.close()

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


def _tokenizer_to_carry(path: str | None, loaded: Path | None) -> RunTokenizer | None:
    """Return the tokenizer that this run's checkpoints carry, and warn if the loaded checkpoint has another one.

    `path`: data.tokenizer; a run whose config names none keeps the one of the loaded checkpoint.
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
    if folders:
        raise CheckpointError(
            f'checkpoint.resume: "never", but checkpoint.dir {directory} has checkpoints (the newest is {folders[0].name}), '
            'which this run would overwrite; name another folder, or use "auto" to resume'
        )
