"""Loss on held-out data: the mean over a fixed set of samples, the same under every layout and batch size."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megagpt.config.schema import Config
from megagpt.data.blend import Dataset
from megagpt.data.gpt_dataset import Sample
from megagpt.data.sampler import GlobalBatches
from megagpt.distributed.rank_zero import rank_zero_note
from megagpt.engine.engine import Engine
from megagpt.parallel.topology import Topology
from megagpt.training.metrics import reduce_loss, sum_tokens
from megagpt.training.micro_batches import HostBatch, to_host_batch
from megagpt.training.objectives import run_objective

PROGRESS_SECONDS = 10.0
"""Time between two progress lines of a long evaluation."""


class FirstSamples:
    """The first samples of a dataset. An index beyond them gives the last one again, for rows that are only padding."""

    def __init__(self, dataset: Dataset, n_samples: int) -> None:
        self._dataset = dataset
        self.samples_per_epoch = self.unrepeated_samples = n_samples

    def sample(self, index: int) -> Sample:
        """Return sample `index` >= 0."""
        return self._dataset.sample(min(index, self.samples_per_epoch - 1))


def evaluated_samples(dataset: Dataset, asked: int | None) -> int:
    """Return the number of samples of an evaluation: all of the dataset if `asked` is None, and never more than it has."""
    available = dataset.unrepeated_samples
    return available if asked is None else min(asked, available)


def evaluate(
    engine: Engine,
    dataset: Dataset,
    config: Config,
    samples: int | None,
    name: str = "eval",
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Return the metrics of the first `samples` samples (all if None): NAME_loss, a mean in nats, and those that the objective
    adds, such as NAME_perplexity. Collective.

    The samples are divided into batches of training.global_batch_size. Rows that fill up the last batch are masked.
    Returns None, on all ranks after the same batch, if `stop_requested` is true on some rank before the end.
    """
    topology = engine.topology
    n_samples = evaluated_samples(dataset, samples)
    batch_size = config.training.global_batch_size
    micro_batch_size = config.evaluation.micro_batch_size or config.training.micro_batch_size
    micro_batches_of = GlobalBatches(
        FirstSamples(dataset, n_samples),
        batch_size,
        micro_batch_size,
        topology.dp_rank,
        topology.layout.data,
        config.model.tokens_in_vocab,
    ).micro_batches
    progress = _Progress(n_samples, name)
    total: torch.Tensor | None = None
    n_tokens = 0
    stop = torch.zeros(1, device=engine.device)
    for first in range(0, n_samples, batch_size):
        engine.phase.enter(f"evaluation of sample {first}")
        size = min(batch_size, _round_up(n_samples - first, micro_batch_size * topology.layout.data))
        batch = to_host_batch(micro_batches_of(first, size), config, topology, first, size)
        batch = _mask_padding(batch, topology, n_samples)
        n_tokens += batch.n_tokens
        loss_sum = engine.evaluate(batch.to(engine.device))
        if loss_sum is not None:
            total = loss_sum.double() if total is None else total + loss_sum
        if stop.item():  # asked for before this batch, so that the device does not wait for the host
            return None
        stop.fill_(stop_requested())
        dist.all_reduce(stop, group=topology.world_group)
        progress.report(first + size)
    global_tokens = sum_tokens(n_tokens, topology, engine.device)
    loss = reduce_loss(total, global_tokens, topology, engine.device).loss
    return run_objective(config).evaluation_metrics(engine, name, loss)


def _mask_padding(batch: HostBatch, topology: Topology, n_samples: int) -> HostBatch:
    """Return the batch with the labels of all rows beyond the first `n_samples` samples masked."""
    if batch.first_sample + batch.size <= n_samples:
        return batch
    first_row = batch.first_sample + topology.dp_rank * len(batch.labels)
    is_padding = torch.arange(first_row, first_row + len(batch.labels)) >= n_samples
    return batch.without_rows(is_padding)


def _round_up(number: int, factor: int) -> int:
    return -(-number // factor) * factor


class _Progress:
    """Prints how far a long evaluation is, on rank 0."""

    def __init__(self, n_samples: int, name: str) -> None:
        self._n_samples = n_samples
        self._name = name
        self._start = self._last = time.monotonic()

    def report(self, done: int) -> None:
        """Print a line if the last one is `PROGRESS_SECONDS` old. `done`: evaluated samples so far."""
        now = time.monotonic()
        if done >= self._n_samples or now - self._last < PROGRESS_SECONDS:
            return
        self._last = now
        left = timedelta(seconds=round((now - self._start) / done * (self._n_samples - done)))
        rank_zero_note(f"{self._name}: {done:,} of {self._n_samples:,} samples, {left} left")
