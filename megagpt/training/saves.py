"""A run's saves, and what is said of them: begun at a step, written while the next ones are made."""

import time
from pathlib import Path

from megagpt.checkpoint.save import Saved, Saver
from megagpt.errors import CheckpointError
from megagpt.training import snapshot
from megagpt.training.engine import Engine
from megagpt.training.say import say, warn
from megagpt.training.snapshot import Position


class Saves:
    """Of a run without checkpoint.dir there are none, and nothing is done."""

    def __init__(self, engine: Engine, loaded: Path | None, step: int) -> None:
        """`loaded`: what the run began with, at `step` (collective)."""
        self._engine, self._config = engine, engine.config.checkpoint
        self.last = step if loaded is not None else None
        """The step whose save was begun last, or that was loaded; None after one that failed."""
        self.newest = loaded
        """The last checkpoint that this start of the run has written, or that it began with."""
        self._prepared = False
        self._saver: Saver | None = None
        if self._config.dir is not None:
            self._saver = Saver(Path(self._config.dir), self._config.keep, self._config.keep_every, loaded)

    @property
    def are_made(self) -> bool:
        """Whether the run has a folder for them."""
        return self._saver is not None

    def save(self, step: int, position: Position) -> None:
        """Begin a save: training waits for the one before, if that is still being written, and for a copy in memory."""
        if self._saver is None:
            return
        begun = time.monotonic()
        self.finish()
        self._engine.where.at("copying its state for a checkpoint")
        state, config = snapshot.run_state(self._engine, position), self._engine.config.model_dump(mode="json")
        self._saver.start(step, snapshot.entries(self._engine), state, config)
        self.last = step
        say(f"saving step {step}: training waited {time.monotonic() - begun:.3f} s")

    def look(self) -> None:
        """After each step: tell of a save that has ended since; after the first, when there are moments, prepare for one."""
        if self._saver is None:
            return
        if not self._prepared:
            self._saver.prepare(snapshot.entries(self._engine))
            self._prepared = True
        self._tell(self._saver.news())

    def finish(self, required: bool = False) -> None:
        """Wait for the save in work. `required`: raise CheckpointError if it failed."""
        if self._saver is None:
            return
        self._engine.where.at("waiting until a checkpoint is written")
        saved = self._saver.finish()
        self._tell(saved)
        if required and saved is not None and saved.problem is not None:
            raise CheckpointError(f"the checkpoint of step {saved.step} could not be saved: {saved.problem}")

    def close(self) -> None:
        """End the thread that writes."""
        if self._saver is not None:
            self._saver.close()

    def _tell(self, saved: Saved | None) -> None:
        """How a save ended. One that failed does not end the training: the checkpoints before it are as they were."""
        if saved is None:
            return
        if saved.problem is None:
            self.newest = saved.folder
            say(f"saved {saved.folder} in {saved.seconds:.1f} s")
            if saved.left_over is not None:
                warn(f"an older checkpoint could not be deleted: {saved.left_over}")
            return
        self.last = None
        warn(
            f"NOT SAVED: the checkpoint of step {saved.step}: {saved.problem}; training goes on, and the checkpoints before "
            "it stay"
        )
