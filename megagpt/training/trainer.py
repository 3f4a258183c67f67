"""The loop: read a batch, step, report, evaluate, save; go back or end where a step or a signal says so."""

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from megagpt.checkpoint.check import require_whole
from megagpt.config.schema import Config
from megagpt.data.ahead import Ahead
from megagpt.data.blend import Datasets
from megagpt.data.sampler import Rows
from megagpt.errors import ConfigError, TrainingError
from megagpt.parallel.topology import Topology
from megagpt.parallel.whereabouts import Whereabouts
from megagpt.resilience.health import FINE, Health, Verdict
from megagpt.resilience.interruption import REQUEUE, Interruption
from megagpt.resilience.replicas import check_replicas
from megagpt.resilience.stragglers import Stragglers
from megagpt.training import resume, snapshot
from megagpt.training.batch_ramp import batch_size, batches_from, steps_between
from megagpt.training.batches import global_batches, to_micro_batches, token_count
from megagpt.training.engine import Engine, StepResult
from megagpt.training.evaluation import evaluate
from megagpt.training.loggers import FanOut, Logger, Record, build_loggers
from megagpt.training.lr_schedule import learning_rate
from megagpt.training.metrics import agree, count_tokens
from megagpt.training.noise_scale import NoiseScale
from megagpt.training.saves import Saves
from megagpt.training.say import warn

BATCHES_AHEAD = 2
"""Global batches that a rank has ready beside the one in work."""


class Batch(NamedTuple):
    """A global batch, and this data rank's rows of it."""

    first: int
    """Sample."""
    size: int
    rows: list[Rows]


class Made(NamedTuple):
    """A step that was made."""

    result: StepResult
    n_tokens: int
    """With a label, in the global batch."""
    loss: float
    """Mean over them, in nats; the same bits on every rank."""
    verdict: Verdict
    """On its loss, before the update."""


class Trainer:
    """One run: made from a config, a topology and open datasets; `train()` takes it to its last step."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        datasets: Datasets,
        device: torch.device,
        where: Whereabouts | None = None,
        begun: float | None = None,
    ) -> None:
        """`where`: what a watchdog looks at; `begun`: when training.max_hours began (`time.monotonic`)."""
        self.config, self.topology, self.datasets, self.device = config, topology, datasets, device
        self._begun, where = time.monotonic() if begun is None else begun, where or Whereabouts(device)
        total_steps(config, datasets)  # a run of no step ends before the engine is made
        where.at("the check of the checkpoints")
        loaded = resume.find(config.checkpoint)  # so does one that has nothing whole to go on from
        where.at("the making of the engine")
        self.engine = Engine(config, topology, device, where)
        self.step = self.samples = 0
        self.passed_over: list[tuple[int, int]] = []
        self._health = Health(config.resilience)
        if loaded is not None:
            where.at("the loading of a checkpoint")
            self._load(loaded)
        self._saves = Saves(self.engine, loaded, self.step)
        self.total_steps = total_steps(config, datasets, self.step, self.samples)
        run_config = {**config.model_dump(mode="json"), "layout": vars(topology.layout)}
        self.logger: Logger = FanOut()
        if topology.rank == 0:
            self.logger = build_loggers(config.logging, self.total_steps, run_config, self.step)
        self._noise = NoiseScale(self.engine)
        self._stragglers = Stragglers(self.engine.where, topology, device, config.resilience.straggler_factor, warn)
        self._asked_to_end = False
        self._interruption: Interruption | None = None
        self._window = Window()

    def train(self) -> int:
        """Step until the run's length, evaluating and saving on the way and at the end; returns the exit code.

        It is 0 for a run that is complete, `REQUEUE` for one that was asked to end and has saved. Raises TrainingError for
        one that must not go on, and CheckpointError where the last checkpoint could not be saved.
        """
        max_hours = self.config.training.max_hours if self.topology.rank == 0 else None  # one clock for all
        with Interruption(max_hours, self._begun) as self._interruption:
            complete = self._steps()
            if not complete:
                return self._end_early(self._interruption)
            if self.datasets.test is not None:
                self.logger.step({"step": self.step, **evaluate(self.engine, self.datasets.test, self.config, "test")})
            self._saves.finish(required=True)
        return 0

    def batches(self) -> Ahead[Batch]:
        """The global batches that are left of the run; a `with` block ends the reading."""
        config, topology = self.config, self.topology
        batches = global_batches(self.datasets.train, config, topology, config.training.micro_batch_size)
        left = islice(batches_from(self.samples, config.training, self.passed_over), max(0, self.total_steps - self.step))
        return Ahead((Batch(first, size, batches.at(first, size)) for first, size in left), BATCHES_AHEAD)

    def advance(self, batch: Batch) -> Verdict:
        """One optimizer step on a global batch, and its report; what is to be done after it."""
        config = self.config
        rate = learning_rate(self.step, self.total_steps, config.optimizer.learning_rate, config.lr_schedule)
        made = self.step_on(batch, rate, self._health.of_loss)
        verdict = made.verdict
        if verdict is FINE:
            verdict = self._health.of_gradient(made.result.skipped, config.training.precision == "fp16")
        verdict = self._health.settle(made.loss, verdict)
        self._report(made, rate)
        return verdict

    def step_on(self, batch: Batch, rate: float, judge: Callable[[float], Verdict] = lambda loss: FINE) -> Made:
        """One optimizer step at learning rate `rate`, whose update is made if the loss is `FINE` to `judge`."""
        config, topology = self.config, self.topology
        self.engine.where.step = self.step + 1
        self.engine.where.at("its tokens")
        micro_batches = to_micro_batches(batch.rows, config, topology, self.step, self.device)
        n_tokens = count_tokens(token_count(micro_batches), topology, self.device)
        interval = config.logging.noise_scale_interval
        measures = interval is not None and (self.step + 1) % interval == 0
        loss, verdict = 0.0, FINE

        def judged(loss_sum: torch.Tensor | None) -> bool:
            nonlocal loss, verdict
            asked = self._interruption is not None and self._interruption.reason is not None
            loss, self._asked_to_end = agree(loss_sum, n_tokens, asked, topology, self.device)
            verdict = judge(loss)
            return verdict is FINE

        result = self.engine.train_step(micro_batches, n_tokens, rate, self._noise.look if measures else None, judged)
        if measures:
            self._noise.update(result, n_tokens, batch.size)
        self.step += 1
        self.samples = batch.first + batch.size
        self._window.batch_size = batch.size
        return Made(result, n_tokens, loss, verdict)

    def close(self) -> None:
        """Free what the run holds."""
        self._saves.close()
        self.logger.close()
        self.engine.close()

    def _steps(self) -> bool:
        """To the last step, or until any rank is asked to end: whether it is the former."""
        while self.step < self.total_steps:
            with self.batches() as ready:
                self.engine.where.at("the first batch")
                for batch in ready:
                    self._window.seconds_waited += ready.seconds_waited
                    ready.seconds_waited = 0.0
                    verdict = self.advance(batch)
                    self._warn_of(verdict)
                    if verdict.action == "stop":
                        self._saves.finish()
                        raise TrainingError(f"step {self.step}: {verdict.reason}")
                    if verdict.action == "rollback":
                        self._go_back(batch, verdict)
                        break  # to the batches from there
                    self._check_replicas_if_due()
                    self._evaluate_if_due()
                    self._save_if_due()
                    if self._asked_to_end and self.step < self.total_steps:
                        return False
                    self.engine.where.at("the next batch")
        return True

    def _end_early(self, interruption: Interruption) -> int:
        """Save, unless that is done, and end; the exit code."""
        why = interruption.reason or "another rank was asked to"
        if not self._saves.are_made:
            warn(f"step {self.step}: ends early ({why}); nothing is saved, since checkpoint.dir is not set")
            return interruption.exit_code
        if self._saves.last != self.step:
            self._save()
        self._saves.finish(required=True)
        warn(f"step {self.step}: ends early ({why}) with exit code {REQUEUE}; started again it goes on from here")
        interruption.leave()
        return REQUEUE

    def _load(self, folder: Path) -> None:
        restored = resume.load(self.engine, folder)
        state = restored.state
        self.step, self.samples, self.passed_over = restored.step, state.samples, state.passed_over
        self._health.load(state.recent_losses, state.skipped_in_a_row)

    def _go_back(self, batch: Batch, verdict: Verdict) -> None:
        """To the last checkpoint, to pass over this batch when the run comes to it again. Raises TrainingError without one."""
        self._saves.finish()
        wrong, passed = self.step, [*self.passed_over, (batch.first, batch.first + batch.size)]
        self.engine.where.at("going back to a checkpoint")
        if self._saves.newest is None:
            raise TrainingError(f"step {wrong}: {verdict.reason}, and there is no checkpoint yet to go back to")
        self._load(require_whole(self._saves.newest))
        self.passed_over, self._saves.last = sorted(set(passed) | set(self.passed_over)), self.step
        self.logger.rewind(self.step)
        self._new_window()
        warn(f"gone back to step {self.step}; samples {batch.first} to {batch.first + batch.size - 1} are passed over")

    def _report(self, made: Made, rate: float) -> None:
        self._window.tokens += made.n_tokens
        self._window.steps += 1
        if self.step % self.config.logging.interval and self.step not in (1, self.total_steps):
            return
        result, seconds = made.result, time.monotonic() - self._window.start
        record: Record = {
            "step": self.step,
            "loss": made.loss,
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
        record |= self._stragglers.look(seconds, self._window.steps)
        self.logger.step(record)
        self._new_window()

    def _warn_of(self, verdict: Verdict) -> None:
        if verdict.action == "skip":
            warn(f"step {self.step}: {verdict.reason}; its update is dropped")
        elif verdict.action != "none":
            warn(f"step {self.step}: {verdict.reason}")

    def _check_replicas_if_due(self) -> None:
        interval = self.config.resilience.replica_check_interval
        if interval is None or self.step % interval:
            return
        self.engine.where.at("the comparison of replicas")
        try:
            check_replicas(self.engine.parameters, self.engine.tied, self.topology, self.config.zero.stage == 3)
        except TrainingError:
            self._saves.finish()
            raise

    def _evaluate_if_due(self) -> None:
        if self.datasets.valid is None or not self._due(self.config.evaluation.interval):
            return
        self.logger.step({"step": self.step, **evaluate(self.engine, self.datasets.valid, self.config)})
        self._new_window()

    def _save_if_due(self) -> None:
        self._saves.look()
        if self._saves.are_made and self._due(self.config.checkpoint.interval):
            self._save()

    def _save(self) -> None:
        self._saves.save(self.step, snapshot.Position(self.samples, self.passed_over, *self._health.memory))
        self._new_window()

    def _new_window(self) -> None:
        self._window = Window()
        self.engine.where.take_waited()

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
