"""Rows of tokens to what the model reads."""

from collections.abc import Sequence

import torch

from megagpt.data.sampler import Rows
from megagpt.model.gpt import MicroBatch
from megagpt.parallel.embedding import IGNORED
from megagpt.parallel.random import stable_seed


def to_micro_batches(rows: Sequence[Rows], seed: int, step: int, device: torch.device) -> list[MicroBatch]:
    """Tokens [batch, seq + 1] to inputs and labels [batch, seq] on `device`; dropout is seeded by (seed, step, micro-batch)."""
    found = []
    for row in rows:
        tokens = torch.from_numpy(row.tokens).to(device, non_blocking=True)
        found.append(MicroBatch(tokens[:, :-1], tokens[:, 1:], stable_seed(seed, step, row.index)))
    return found


def token_count(micro_batches: Sequence[MicroBatch]) -> int:
    """Tokens that have a label."""
    return sum(int((batch.labels != IGNORED).sum()) for batch in micro_batches)
