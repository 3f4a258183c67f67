"""Rows of tokens to what the model reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megagpt.config.schema import Config, DataConfig
from megagpt.data.blend import Dataset
from megagpt.data.sampler import GlobalBatches, Rows
from megagpt.model.gpt import MicroBatch
from megagpt.parallel.embedding import IGNORED
from megagpt.parallel.random import stable_seed
from megagpt.parallel.topology import Topology


@dataclass(frozen=True)
class MaskedRows(Rows):
    """Rows that know what the run does where a document begins."""

    masks: DataConfig


class MaskedBatches(GlobalBatches):
    """Global batches of `MaskedRows`."""

    def __init__(self, dataset: Dataset, config: Config, topology: Topology, micro_batch_size: int) -> None:
        at, layout = topology.at, topology.layout
        vocab_size = config.model.tokens_in_vocab
        super().__init__(dataset, config.training.global_batch_size, micro_batch_size, at.data, layout.data, vocab_size)
        self._masks = config.data

    def at(self, first: int) -> list[Rows]:
        """As of `GlobalBatches`."""
        return [MaskedRows(**vars(rows), masks=self._masks) for rows in super().at(first)]


def global_batches(dataset: Dataset, config: Config, topology: Topology, micro_batch_size: int) -> GlobalBatches:
    """This data rank's part of a dataset's global batches."""
    return MaskedBatches(dataset, config, topology, micro_batch_size)


def to_micro_batches(rows: Sequence[Rows], seed: int, step: int, device: torch.device) -> list[MicroBatch]:
    """Tokens [batch, seq + 1] to inputs and labels [batch, seq] on `device`; dropout is seeded by (seed, step, micro-batch).

    Where `MaskedRows` say so, positions and attention begin anew with each document, and no label is the first of one.
    """
    found = []
    for row in rows:
        masks = row.masks if isinstance(row, MaskedRows) else DataConfig()
        tokens = _on(device, row.tokens)
        labels = tokens[:, 1:]
        if masks.mask_document_ends:
            labels = labels.masked_fill(_on(device, row.starts[:, 1:]), IGNORED)
        starts = row.starts[:, :-1]
        positions = _on(device, positions_in_document(starts)) if masks.reset_positions else None
        documents = _on(device, np.cumsum(starts, 1)) if masks.reset_attention else None
        found.append(MicroBatch(tokens[:, :-1], labels, stable_seed(seed, step, row.index), positions, documents))
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
