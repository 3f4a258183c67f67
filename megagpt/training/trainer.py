"""The loop: read a batch, step, report, evaluate, save."""

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from megagpt.checkpoint.format import find_checkpoint, resolve_checkpoint
from megagpt.config.schema import Config
from megagpt.data.ahead import Ahead
from megagpt.data.blend import Datasets
from megagpt.data.sampler import Rows
from megagpt.errors import ConfigError
from megagpt.parallel.topology import Topology
from megagpt.training import snapshot
from megagpt.training.batch_ramp import batch_size, batches_from, steps_between
from megagpt.training.batches import global_batches, to_micro_batches, token_count
from megagpt.training.engine import Engine, StepResult
from megagpt.training.evaluation import evaluate
from megagpt.training.loggers import FanOut, Logger, build_loggers
from megagpt.training.lr_schedule import learning_rate
from megagpt.training.metrics import count_tokens, global_loss
from megagpt.training.noise_scale import NoiseScale

BATCHES_AHEAD = 2
"""Global batches that a rank has ready beside the one in work."""


class Trainer:
    """One run: made from a config, a topology and open datasets; `train()` takes it to its last step."""

    def __init__(self, config: Config, topology: Topology, datasets: Datasets, device: torch.device) -> None:
        self.config, self.topology, self.datasets, self.device = config, topology, datasets, device
        total_steps(config, datasets)  # a run of no step ends before the engine is made
        self.engine = Engine(config, topology, device)
        self.step, self.samples = self._resume()
        self.total_steps = total_steps(config, datasets, self.step, self.samples)
        run_config = {**config.model_dump(mode="json"), "layout": vars(topology.layout)}
        self.logger: Logger = FanOut()
        if topology.rank == 0:
            self.logger = build_loggers(config.logging, self.total_steps, run_config, self.step)
        self._window = Window()
        self._noise = NoiseScale(self.engine)

    def train(self) -> None:
        """Step until the run's length, evaluating and saving on the way and at the end."""
        with self.batches() as ready:
            for rows in ready:
                self._window.seconds_waited += ready.seconds_waited
                ready.seconds_waited = 0.0
                self.advance(rows)
                self._evaluate_if_due()
                self._save_if_due()
        if self.datasets.test is not None:
            self.logger.step({"step": self.step, **evaluate(self.engine, self.datasets.test, self.config, "test")})

    def batches(self) -> Ahead[list[Rows]]:
        """This data rank's rows of the global batches that are left of the run; a `with` block ends the reading."""
        batches = global_batches(self.datasets.train, self.config, self.topology, self.config.training.micro_batch_size)
        left = islice(batches_from(self.samples, self.config.training), max(0, self.total_steps - self.step))
        return Ahead((batches.at(first, size) for first, size in left), BATCHES_AHEAD)

    def advance(self, rows: Sequence[Rows]) -> None:
        """One optimizer step on this data rank's rows of the global batch, and its report."""
        config = self.config
        rate = learning_rate(self.step, self.total_steps, config.optimizer.learning_rate, config.lr_schedule)
        result, n_tokens = self.step_on(rows, rate)
        self._report(result, n_tokens, rate)

    def step_on(self, rows: Sequence[Rows], rate: float) -> tuple[StepResult, int]:
        """One optimizer step at learning rate `rate`; its result, and the tokens with a label in the global batch."""
        config, topology = self.config, self.topology
        micro_batches = to_micro_batches(rows, config, topology, self.step, self.device)
        n_tokens = count_tokens(token_count(micro_batches), topology, self.device)
        size = batch_size(self.samples, config.training)
        interval = config.logging.noise_scale_interval
        measures = interval is not None and (self.step + 1) % interval == 0
        result = self.engine.train_step(micro_batches, n_tokens, rate, self._noise.look if measures else None)
        if measures:
            self._noise.update(result, n_tokens, size)
        self.step += 1
        self.samples += size
        self._window.batch_size = size
        return result, n_tokens

    def close(self) -> None:
        """Free what the run holds."""
        self.logger.close()
        self.engine.close()

    def _resume(self) -> tuple[int, int]:
        """Load what the config names; returns the steps already made and the samples already read."""
        checkpoint = self.config.checkpoint
        if checkpoint.resume == "never":
            return 0, 0
        if checkpoint.resume != "auto":
            return snapshot.restore(self.engine, resolve_checkpoint(checkpoint.resume))
        found = find_checkpoint(Path(checkpoint.dir)) if checkpoint.dir else None
        return snapshot.restore(self.engine, found) if found else (0, 0)

    def _report(self, result: StepResult, n_tokens: int, rate: float) -> None:
        self._window.tokens += n_tokens
        self._window.steps += 1
        if self.step % self.config.logging.interval and self.step not in (1, self.total_steps):
            return
        loss = global_loss(result.loss_sum, n_tokens, self.topology, self.device)
        seconds = time.monotonic() - self._window.start
        record = {
            "step": self.step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "tokens": self.samples * self.config.model.n_positions,
            "tokens_per_second": self._window.tokens / seconds,
            "step_seconds": seconds / self._window.steps,
            "data_wait": self._window.seconds_waited / seconds,
        }
        if self.config.training.batch_ramp.start is not None:
            record["batch_size"] = self._window.batch_size
        record |= self._noise.news()
        if self.config.training.precision == "fp16":
            record |= {"loss_scale": result.loss_scale, "skipped": int(result.skipped)}
        self.logger.step(record)
        self._window = Window()

    def _evaluate_if_due(self) -> None:
        if self.datasets.valid is None or not self._due(self.config.evaluation.interval):
            return
        self.logger.step({"step": self.step, **evaluate(self.engine, self.datasets.valid, self.config)})
        self._window = Window()

    def _save_if_due(self) -> None:
        checkpoint = self.config.checkpoint
        if checkpoint.dir is None or not self._due(checkpoint.interval):
            return
        folder = snapshot.save(self.engine, Path(checkpoint.dir), self.step, self.samples)
        if self.topology.rank == 0:
            print(f"saved {folder}", flush=True)
        self._window = Window()

    def _due(self, interval: int | None) -> bool:
        return self.step == self.total_steps or (interval is not None and self.step % interval == 0)


class Window:
    """The steps since the last report: what evaluations and saves take is not in their time."""

    def __init__(self) -> None:
        self.start, self.steps, self.tokens = time.monotonic(), 0, 0
        self.seconds_waited = 0.0
        """For data, on this rank."""
        self.batch_size = 0
        """Of the last step, sequences."""


def total_steps(config: Config, datasets: Datasets, step: int = 0, samples: int = 0) -> int:
    """Length of the run in optimizer steps, of which `step` are made and read `samples`, maybe with other batch sizes.

    Raises ConfigError where an epoch is less than one step.
    """
    training = config.training
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        wanted = -(-training.tokens // config.model.n_positions)
        return step + steps_between(samples, wanted, training)[0]
    assert training.epochs is not None
    wanted = int(training.epochs * datasets.train.samples_per_epoch)
    more, end = steps_between(samples, wanted, training)
    steps = step + more - (more > 0 and end > wanted)
    if steps == 0:
        key = "global_batch_size" if training.batch_ramp.start is None else "batch_ramp.start"
        raise ConfigError(
            f"training.epochs: {training.epochs:g} epochs of {datasets.train.samples_per_epoch} samples are less than "
            f"one step of training.{key} {batch_size(0, training)}"
        )
    return steps
