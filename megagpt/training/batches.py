"""Rows of tokens to what the model reads."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megagpt.config.schema import Config
from megagpt.data.blend import Dataset
from megagpt.data.sampler import GlobalBatches, Rows
from megagpt.model.gpt import MicroBatch
from megagpt.parallel.context import ContextParallel
from megagpt.parallel.embedding import IGNORED
from megagpt.parallel.random import stable_seed
from megagpt.parallel.topology import Topology


def global_batches(dataset: Dataset, config: Config, topology: Topology, micro_batch_size: int) -> GlobalBatches:
    """This data rank's part of a dataset's global batches; context ranks read the same."""
    size, vocab_size = config.training.global_batch_size, config.model.tokens_in_vocab
    return GlobalBatches(dataset, size, micro_batch_size, topology.reader, topology.layout.readers, vocab_size)


def to_micro_batches(
    rows: Sequence[Rows], config: Config, topology: Topology, step: int, device: torch.device
) -> list[MicroBatch]:
    """Tokens [batch, seq + 1] to inputs and labels [batch, seq] on `device`, or to this context rank's part of them.

    Dropout is seeded by (seed, step, micro-batch). As the config says, positions and attention begin anew with each
    document, and no label is the first token of one.
    """
    data = config.data
    context = ContextParallel(rank=topology.context_rank, size=topology.layout.context)
    found = []
    for row in rows:
        tokens = _on(device, row.tokens)
        labels = tokens[:, 1:]
        if data.mask_document_ends:
            labels = labels.masked_fill(_on(device, row.starts[:, 1:]), IGNORED)
        starts = row.starts[:, :-1]
        positions = _on(device, positions_in_document(starts)) if data.reset_positions else None
        documents = _on(device, np.cumsum(starts, 1)) if data.reset_attention else None
        seed = stable_seed(config.training.seed, step, row.index)
        found.append(MicroBatch(context.part(tokens[:, :-1]), context.part(labels), seed, positions, documents))
    return found


def positions_in_document(starts: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Tokens since the last start, or since the row's first token before there is one. [batch, seq] -> [batch, seq]"""
    index = np.arange(starts.shape[1])
    return index - np.maximum.accumulate(np.where(starts, index, 0), 1)


def _on(device: torch.device, values: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def token_count(micro_batches: Sequence[MicroBatch]) -> int:
    """Tokens that have a label."""
    return int(torch.stack([(batch.labels != IGNORED).sum() for batch in micro_batches]).sum())
