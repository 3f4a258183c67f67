"""The training loop: fetch a batch, step, log, evaluate, save; roll back or stop on request."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megagpt.checkpoint.verify import require_complete
from megagpt.config.schema import Config
from megagpt.data.blend import Dataset, Datasets
from megagpt.data.encoder_samples import encoder_format
from megagpt.data.identity import DataIdentity, data_identity, training_data_changes
from megagpt.data.prefetch import Prefetcher
from megagpt.distributed.object_collectives import all_gather_object, run_on_ranks
from megagpt.distributed.phase import PhaseTracker
from megagpt.distributed.rank_zero import rank_zero_note, rank_zero_print, rank_zero_warn
from megagpt.distributed.same_everywhere import require_same
from megagpt.engine.engine import Engine, StepResult
from megagpt.errors import DataError, TrainingError
from megagpt.parallel.topology import Topology
from megagpt.planner.flops import training_flops_per_token
from megagpt.resilience.health import OK, Health, Verdict
from megagpt.resilience.interruption import Interruption, exit_code
from megagpt.resilience.replicas import check_replicas
from megagpt.resilience.stragglers import Stragglers
from megagpt.training.batch_schedule import SampleRange, batches_from, trained_samples
from megagpt.training.checkpointing import (
    Checkpointer,
    find_checkpoint,
    find_initial_weights,
    load_checkpoint,
    load_initial_weights,
    open_checkpoint_folder,
)
from megagpt.training.evaluation import evaluate
from megagpt.training.loggers.base import FanOut, Logger, MetricsRecord
from megagpt.training.loggers.build import build_loggers
from megagpt.training.lr_schedule import learning_rate, weight_decay
from megagpt.training.metrics import LossMean, reduce_loss, sum_tokens
from megagpt.training.micro_batches import HostBatch, global_batches, to_host_batch
from megagpt.training.noise_scale import NoiseScale
from megagpt.training.objectives import run_objective
from megagpt.training.run_length import learning_rate_change, require_not_shorter, total_steps
from megagpt.training.samples import SampleTexts
from megagpt.training.test_result import TestResult
from megagpt.training.throughput import ThroughputWindow, peak_memory_gib, peak_of_run
from megagpt.training.train_state import RunProgress

PREFETCHED_BATCHES = 2
"""Global batches that a rank prepares while it trains on another."""
EVERY_LABEL_MASKED = Verdict("skip", "every label of the global batch is masked, so there is nothing to learn from it")


class StepOutcome(NamedTuple):
    """Outcome of one training step, equal on all ranks."""

    result: StepResult
    learning_rate: float
    n_tokens: int
    """Unmasked tokens in the global batch."""
    loss: float
    """Mean loss per token in nats."""
    verdict: Verdict
    """What to do next."""
    stop_requested: bool
    """Some rank was asked to stop."""


class Trainer:
    """One run: built from a config, a topology and open datasets; `train()` runs it to its last step."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        datasets: Datasets,
        device: torch.device,
        phase: PhaseTracker | None = None,
        start_time: float | None = None,
    ) -> None:
        """Build the engine and load the checkpoint to resume from. Collective.

        `phase`: read by the watchdog; `start_time`: when training.max_hours starts to count (`time.monotonic`).
        """
        self.config = config
        self.topology = topology
        self.datasets = datasets
        self.device = device
        self.phase = phase or PhaseTracker(device)
        self._start_time = time.monotonic() if start_time is None else start_time
        total_steps(config, datasets)  # fail before the engine is built if the run has no step
        self.phase.enter("comparison of the data")
        self._data = same_data_on_all_ranks(config)
        self.phase.enter("search for a checkpoint")
        lock = open_checkpoint_folder(config.checkpoint)
        with ExitStack() as on_failure:
            if lock is not None:
                on_failure.callback(lock.release)
            checkpoint = find_checkpoint(config.checkpoint)  # fail early here, too
            initial_weights = find_initial_weights(config.checkpoint) if checkpoint is None else None
            self.phase.enter("engine construction")
            self.engine = Engine(config, topology, device, self.phase)
            self.step = 0
            self.consumed_samples = 0
            self.skipped_ranges: list[SampleRange] = []
            self.health = Health(config.resilience)
            self._objective = run_objective(config)
            self._objective.prepare(self.engine, datasets)
            saved_config = self._load(checkpoint) if checkpoint is not None else None
            if initial_weights is not None:
                self.phase.enter("loading of the initial weights")
                load_initial_weights(self.engine, initial_weights)
            require_not_shorter(config, datasets, self.step, self.consumed_samples)
            self.checkpointer = Checkpointer(self.engine, checkpoint, self.step, lock, initial_weights=initial_weights)
            self.total_steps = total_steps(config, datasets, self.step, self.consumed_samples)
            if saved_config is not None and self.step < self.total_steps:
                change = learning_rate_change(saved_config, config, datasets, self.step, self.total_steps)
                if change is not None:
                    rank_zero_warn(change)
            self._test_result = TestResult(config)
            self._test_is_due = datasets.test is not None and not self._test_result.exists(self.step, self.total_steps)
            self.logger: Logger = FanOut()
            if topology.rank == 0 and not self.is_complete:
                self.logger = build_loggers(config, topology.layout, device, self.step, self.total_steps)
            self._noise_scale = NoiseScale(self.engine)
            self._samples = SampleTexts(self.engine) if config.evaluation.sample_prompts else None
            self._stragglers = Stragglers(self.phase, topology, device, config.resilience.straggler_factor)
            self._flops_per_token = training_flops_per_token(config)
            self._peak_tflops = peak_of_run(config, device)
            self._window = ThroughputWindow()
            self._losses = LossMean()
            self._interruption: Interruption | None = None
            on_failure.pop_all()

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do, not even the evaluation on the test data."""
        return self.step >= self.total_steps and not self._test_is_due

    def train(self) -> int:
        """Train to the last step, with evaluations and saves, and return the exit code.

        0: the run is complete; a run that was complete before writes nothing. `REQUEUE`: it was asked to stop and has saved.
        Raises TrainingError if the run must stop, and CheckpointError if the last checkpoint could not be saved.
        """
        if self.step >= self.total_steps:
            rank_zero_print(
                f"complete: step {self.step} of {self.total_steps} is in the checkpoint, so no step is left to train"
            )
        if self.is_complete:
            return 0
        if self.engine.compiles and self.step < self.total_steps:
            rank_zero_note("training.compile: the first step compiles its functions, which takes 10 s or longer")
        max_hours = self.config.training.max_hours if self.topology.rank == 0 else None  # one clock for all ranks
        try:
            with Interruption(max_hours, self._start_time, self.topology.rank) as self._interruption:
                if not self._train_steps() or not self._evaluate_test():
                    return self._stop_early(self._interruption)
                self.checkpointer.finish(required=True)
        except BaseException:
            self.checkpointer.release_lock()
            raise
        return 0

    def batches(self) -> Prefetcher[HostBatch]:
        """Return the remaining global batches of the run, prepared by a thread; a `with` block ends the thread."""
        return Prefetcher(self._host_batches(), PREFETCHED_BATCHES)

    def train_step(self, batch: HostBatch, learning_rate: float, seconds_waited: float = 0.0) -> StepOutcome:
        """Run one optimizer step on a global batch. Collective. `seconds_waited`: time spent waiting for the batch."""
        self.phase.step = self.step + 1
        self.phase.enter("copy of the batch")
        micro_batches = batch.to(self.device)
        n_tokens = sum_tokens(batch.n_tokens, self.topology, self.device)
        measure_noise = _is_due(self.step + 1, self.config.logging.noise_scale_interval)
        if measure_noise:
            self._noise_scale.measure(micro_batches)
        loss_sum = self.engine.forward_backward(micro_batches, n_tokens)
        self.phase.enter("reduction of the loss")
        summary = reduce_loss(loss_sum, n_tokens, self.topology, self.device, self._stop_requested())
        verdict = self.health.check_loss(summary.loss) if summary.n_tokens else EVERY_LABEL_MASKED
        result = self.engine.step(learning_rate) if verdict is OK else self.engine.discard()
        if verdict is OK:
            verdict = self.health.check_gradient(result.skipped, self.config.training.precision == "fp16")
        verdict = self.health.record(summary.loss, verdict)
        if measure_noise:
            self._noise_scale.update(result, summary.n_tokens, batch.size)
        self.step += 1
        self.consumed_samples = batch.first_sample + batch.size
        self._window.add_step(batch.size * self.config.model.sample_tokens, batch.size, seconds_waited)
        self._losses.add(summary.loss, summary.n_tokens, result.skipped)
        return StepOutcome(result, learning_rate, summary.n_tokens, summary.loss, verdict, summary.stop_requested)

    def close(self) -> None:
        """Free the resources of the run."""
        self.checkpointer.close()
        self.logger.close()
        self.engine.close()

    def _train_steps(self) -> bool:
        """Train to the last step; return False if interrupted first."""
        config = self.config
        while self.step < self.total_steps:
            with self.batches() as batches:
                self.phase.enter("wait for the first batch")
                for batch in batches:
                    rate = learning_rate(self.step, self.total_steps, config.optimizer.learning_rate, config.lr_schedule)
                    self.engine.set_weight_decay(weight_decay(self.step, self.total_steps, config.optimizer))
                    outcome = self.train_step(batch, rate, batches.take_wait_seconds())
                    self._log(outcome)
                    if outcome.verdict.action == "stop":
                        self.checkpointer.finish()
                        raise TrainingError(f"step {self.step}: {outcome.verdict.reason}")
                    if outcome.verdict.action == "rollback":
                        self._roll_back(batch, outcome.verdict)
                        break  # restart the batches from the checkpoint
                    self._check_replicas_if_due()
                    stop = outcome.stop_requested and self.step < self.total_steps
                    stop = stop or not self._evaluate_if_due()
                    self._save_if_due()
                    if stop:
                        return False
                    self.phase.enter("wait for the next batch")
        return True

    def _host_batches(self) -> Iterator[HostBatch]:
        """Yield the remaining global batches; runs on the prefetch thread."""
        config, topology = self.config, self.topology
        dataset = global_batches(self.datasets.train, config, topology, config.training.micro_batch_size)
        remaining = range(self.step, self.total_steps)
        ranges = islice(batches_from(self.consumed_samples, config.training, self.skipped_ranges), len(remaining))
        pin_memory = self.device.type == "cuda"
        for first_sample, size in ranges:
            token_batches = dataset.micro_batches(first_sample, size)
            yield to_host_batch(token_batches, config, topology, first_sample, size, pin_memory)

    def _stop_requested(self) -> bool:
        return self._interruption is not None and self._interruption.reason is not None

    def _stop_early(self, interruption: Interruption) -> int:
        """Save unless this step is saved already, and return the exit code. Collective."""
        self.phase.enter("exchange of the reasons to stop")
        reasons = all_gather_object(interruption.reason)
        reason = interruption.reason or next(f"{text} on rank {rank}" for rank, text in enumerate(reasons) if text is not None)
        code = exit_code(reasons, saved=self.checkpointer.enabled)
        if not self.checkpointer.enabled:
            rank_zero_warn(f"step {self.step}: stopping early ({reason}); nothing is saved, because checkpoint.dir is not set")
            return code
        if self.checkpointer.last_step != self.step:
            self._save()
        self.checkpointer.finish(required=True)
        rank_zero_warn(
            f"step {self.step}: stopping early ({reason}) with exit code {code}; start again to resume from this step"
        )
        interruption.leave()
        return code

    def _load(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint and return its config. Collective."""
        self.phase.enter("checkpoint loading")
        restored = load_checkpoint(self.engine, folder)
        state = restored.state
        self.step = restored.step
        self.consumed_samples = state.consumed_samples
        self.skipped_ranges = state.skipped_sample_ranges
        self.health.restore(state.recent_losses, state.consecutive_skips)
        changes = training_data_changes(state.data, self._data) if state.data is not None else []
        if changes:
            rank_zero_warn(
                f"the training data differs from the checkpoint's: {'; '.join(changes)}. The run continues at sample "
                f"{self.consumed_samples} of this data; to start at its first sample, use checkpoint.initialize_from"
            )
        return restored.config

    def _roll_back(self, batch: HostBatch, verdict: Verdict) -> None:
        """Load the last checkpoint, and skip this batch when it comes up again. Raises TrainingError without a checkpoint."""
        self.checkpointer.finish()
        failed_step = self.step
        failed_range = (batch.first_sample, batch.first_sample + batch.size)
        skipped_ranges = {*self.skipped_ranges, failed_range}
        self.phase.enter("rollback")
        if self.checkpointer.newest is None:
            raise TrainingError(f"step {failed_step}: {verdict.reason}, and there is no checkpoint yet to roll back to")
        self._load(require_complete(self.checkpointer.newest))
        self.skipped_ranges = sorted(skipped_ranges | set(self.skipped_ranges))
        self.checkpointer.last_step = self.step
        self.logger.rewind(self.step)
        self._start_window()
        self._losses = LossMean()
        rank_zero_warn(f"rolled back to step {self.step}; skipping samples {failed_range[0]}-{failed_range[1] - 1}")

    def _log(self, outcome: StepOutcome) -> None:
        """Report a bad step at once, and the metrics every logging.interval steps."""
        verdict = outcome.verdict
        if verdict.action == "skip":
            rank_zero_warn(f"step {self.step}: {verdict.reason}; its update is skipped")
        elif verdict is not OK:
            rank_zero_warn(f"step {self.step}: {verdict.reason}")
        if self.step in (1, self.total_steps) or _is_due(self.step, self.config.logging.interval):
            self.logger.step(self._metrics(outcome))
            self._start_window()
            self._losses = LossMean()

    def _metrics(self, outcome: StepOutcome) -> MetricsRecord:
        """Build the record of the steps since the last one. Collective."""
        config, window = self.config, self._window
        seconds = window.seconds
        trained = trained_samples(self.consumed_samples, self.skipped_ranges)
        record: MetricsRecord = {
            "step": self.step,
            "loss": self._losses.mean,
            "learning_rate": outcome.learning_rate,
            "grad_norm": outcome.result.grad_norm,
            "tokens": trained * config.model.sample_tokens,
            **window.record(self._flops_per_token, self.topology.layout.world_size, self._peak_tflops),
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        if config.training.batch_ramp.start is not None:
            record["batch_size"] = window.batch_size
        record |= self._objective.training_metrics(self.engine)
        record |= self._noise_scale.take_report()
        if config.training.precision == "fp16":
            record["loss_scale"] = outcome.result.loss_scale
        if config.training.precision == "fp16" or self._losses.skipped:
            record["skipped"] = self._losses.skipped
        return record | self._stragglers.report(seconds, window.steps)

    def _check_replicas_if_due(self) -> None:
        if not _is_due(self.step, self.config.resilience.replica_check_interval):
            return
        self.phase.enter("comparison of replicas")
        try:
            check_replicas(self.engine.parameters, self.engine.shared, self.topology)
        except TrainingError:
            self.checkpointer.finish()
            raise

    def _evaluate_if_due(self) -> bool:
        """Return False, on all ranks, if the evaluation was abandoned because some rank was asked to stop."""
        if not self._due_or_last(self.config.evaluation.interval):
            return True
        completed = all(
            self._evaluate(dataset, self.config.evaluation.samples, name) is not None
            for name, dataset in self.datasets.valid.items()
        )
        if completed and self._samples is not None:
            self.phase.enter("continuation of the sample prompts")
            self.logger.step({"step": self.step, "samples": self._samples.texts()})
        self._start_window()
        return completed

    def _evaluate_test(self) -> bool:
        """Return False, on all ranks, if the evaluation was abandoned because some rank was asked to stop."""
        if self.datasets.test is None:
            return True
        losses = self._evaluate(self.datasets.test, self.config.evaluation.test_samples, "test")
        if losses is not None and self.topology.rank == 0:
            self._test_result.write(self.step, losses)
        return losses is not None

    def _evaluate(self, dataset: Dataset, samples: int | None, name: str) -> dict[str, Any] | None:
        losses = evaluate(self.engine, dataset, self.config, samples, name, self._stop_requested)
        if losses is not None:
            self.logger.step({"step": self.step, **losses})
        return losses

    def _save_if_due(self) -> None:
        self.checkpointer.poll()
        if self.checkpointer.enabled and self._due_or_last(self.config.checkpoint.interval):
            self._save()

    def _save(self) -> None:
        progress = RunProgress(
            consumed_samples=self.consumed_samples,
            skipped_sample_ranges=self.skipped_ranges,
            recent_losses=self.health.recent_losses,
            consecutive_skips=self.health.consecutive_skips,
            data=self._data,
        )
        self.checkpointer.save(self.step, progress)
        self._start_window()

    def _start_window(self) -> None:
        self._window = ThroughputWindow()
        self.phase.take_wait_seconds()

    def _due_or_last(self, interval: int | None) -> bool:
        return self.step == self.total_steps or _is_due(self.step, interval)


def same_data_on_all_ranks(config: Config) -> DataIdentity:
    """Return the identity of the run's data. Raises DataError if a rank sees other data than rank 0. Collective."""
    identity = run_on_ranks(lambda: data_identity(config.data, config.model.n_positions, encoder_format(config.model)))
    assert identity is not None
    contents = {f"data.{part}": str([corpus.content for corpus in corpora]) for part, corpora in identity.parts.items()}
    require_same(contents, DataError, "copy the same .bin and .idx files to all nodes, or put them on a shared file system")
    return identity


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
