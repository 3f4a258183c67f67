"""Rows of tokens to what the model reads."""

from collections.abc import Sequence

import torch

from megagpt.config.schema import Config
from megagpt.data.blend import Dataset
from megagpt.data.sampler import GlobalBatches, Rows
from megagpt.model.gpt import MicroBatch
from megagpt.parallel.embedding import IGNORED
from megagpt.parallel.random import stable_seed
from megagpt.parallel.topology import Topology


def global_batches(dataset: Dataset, config: Config, topology: Topology, micro_batch_size: int) -> GlobalBatches:
    """This data rank's part of a dataset's global batches."""
    at, layout = topology.at, topology.layout
    vocab_size = config.model.tokens_in_vocab
    return GlobalBatches(dataset, config.training.global_batch_size, micro_batch_size, at.data, layout.data, vocab_size)


def to_micro_batches(rows: Sequence[Rows], seed: int, step: int, device: torch.device) -> list[MicroBatch]:
    """Tokens [batch, seq + 1] to inputs and labels [batch, seq] on `device`; dropout is seeded by (seed, step, micro-batch)."""
    found = []
    for row in rows:
        tokens = torch.from_numpy(row.tokens).to(device, non_blocking=True)
        found.append(MicroBatch(tokens[:, :-1], tokens[:, 1:], stable_seed(seed, step, row.index)))
    return found


def token_count(micro_batches: Sequence[MicroBatch]) -> int:
    """Tokens that have a label."""
    return int(torch.stack([(batch.labels != IGNORED).sum() for batch in micro_batches]).sum())
