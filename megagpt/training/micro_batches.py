"""Token batches of the data loader, converted to the model's micro-batches on the host and copied to the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megagpt.config.schema import Config
from megagpt.data.blend import Dataset
from megagpt.data.sampler import GlobalBatches, TokenBatch
from megagpt.labels import IGNORED
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel.context_parallel import ContextParallel
from megagpt.parallel.topology import Topology


def global_batches(dataset: Dataset, config: Config, topology: Topology, micro_batch_size: int) -> GlobalBatches:
    """Return this data-parallel rank's share of a dataset's global batches; context ranks read the same samples."""
    size, vocab_size = config.training.global_batch_size, config.model.tokens_in_vocab
    return GlobalBatches(dataset, size, micro_batch_size, topology.dp_rank, topology.layout.data, vocab_size)


@dataclass(frozen=True)
class HostBatch:
    """This rank's share of one global batch in host memory, pinned if it will be copied to a GPU."""

    first_sample: int
    """Index of the first sample of the global batch."""
    size: int
    """Sequences in the global batch."""
    n_tokens: int
    """Unmasked tokens of this rank; for preferences, pairs. The loss is their mean."""
    micro_batch_size: int
    samples: Tensor
    """Number of each sample in the run, [micro-batches * batch]."""
    tokens: Tensor
    """All micro-batches together, [micro-batches * batch, seq], as are the following."""
    labels: Tensor
    positions: Tensor | None
    documents: Tensor | None
    references: Tensor | None = None
    source: Tensor | None = None
    """Input of the encoder, [micro-batches * batch, encoder seq], or this context rank's positions of it."""
    source_lengths: Tensor | None = None
    """Tokens of each source, [micro-batches * batch]."""

    def to(self, device: torch.device) -> list[MicroBatch]:
        """Copy to `device`, with one copy per tensor, and return the micro-batches."""
        size = self.micro_batch_size
        samples = self.samples.to(device, non_blocking=True).split(size)
        tokens = self.tokens.to(device, non_blocking=True).split(size)
        labels = self.labels.to(device, non_blocking=True).split(size)
        positions, documents, references, source, source_lengths = (
            None if tensor is None else tensor.to(device, non_blocking=True).split(size)
            for tensor in (self.positions, self.documents, self.references, self.source, self.source_lengths)
        )
        return [
            MicroBatch(
                tokens=tokens[index],
                labels=labels[index],
                samples=samples[index],
                positions=positions[index] if positions is not None else None,
                documents=documents[index] if documents is not None else None,
                references=references[index] if references is not None else None,
                source=source[index] if source is not None else None,
                source_lengths=source_lengths[index] if source_lengths is not None else None,
            )
            for index in range(len(samples))
        ]

    def without_rows(self, rows: Tensor) -> "HostBatch":
        """Return the batch with some rows left out of the loss. `rows`: True for those, [micro-batches * batch]."""
        labels = self.labels.masked_fill(rows.unsqueeze(1), IGNORED)
        references = None if self.references is None else self.references.masked_fill(rows.unsqueeze(1), math.nan)
        return replace(self, labels=labels, references=references, n_tokens=_count(labels, references))


def to_host_batch(
    batches: Sequence[TokenBatch],
    config: Config,
    topology: Topology,
    first_sample: int = 0,
    size: int | None = None,
    pin_memory: bool = False,
) -> HostBatch:
    """Convert token batches [batch, seq + 1] to inputs and labels [batch, seq], or to this context rank's positions.

    Positions and attention restart at each document, and a document's first token is no label, if the config says so.
    Labels that the data gives replace the next tokens.
    `size`: sequences in the global batch; training.global_batch_size by default.
    """
    data = config.data
    context = ContextParallel(rank=topology.cp_rank, size=topology.layout.context)
    tokens = torch.from_numpy(np.concatenate([batch.tokens for batch in batches]))  # [micro-batches * batch, seq + 1]
    starts = np.concatenate([batch.starts for batch in batches])
    samples = np.concatenate([batch.first_sample + np.arange(len(batch.tokens)) for batch in batches])
    given = [batch.labels for batch in batches if batch.labels is not None]
    labels = torch.from_numpy(np.concatenate(given)) if given else tokens[:, 1:]
    if data.mask_document_ends:
        labels = labels.masked_fill(torch.from_numpy(starts[:, 1:]), IGNORED)
    labels = context.local_positions(labels)
    references = _padded([row for batch in batches for row in batch.references])
    source = _joined([batch.source for batch in batches])
    source_lengths = _joined([batch.source_lengths for batch in batches])
    positions = documents = None
    if data.separates_positions:
        positions = _to_host(torch.from_numpy(positions_in_document(starts[:, :-1])), pin_memory)
    if data.separates_attention:
        documents = _to_host(torch.from_numpy(np.cumsum(starts[:, :-1], 1)), pin_memory)
    return HostBatch(
        first_sample=first_sample,
        size=size or config.training.global_batch_size,
        n_tokens=_count(labels, references) if data.mask_document_ends or given else labels.numel(),
        micro_batch_size=len(batches[0].tokens),
        samples=_to_host(torch.from_numpy(samples), pin_memory),
        tokens=_to_host(context.local_positions(tokens[:, :-1]), pin_memory),
        labels=_to_host(labels, pin_memory),
        positions=positions,
        documents=documents,
        references=None if references is None else _to_host(references, pin_memory),
        source=None if source is None else _to_host(context.local_positions(source), pin_memory),
        source_lengths=None if source_lengths is None else _to_host(source_lengths, pin_memory),
    )


def _joined(parts: Sequence[npt.NDArray[np.int64] | None]) -> Tensor | None:
    """Return the arrays of all micro-batches as one tensor; None if there are none."""
    given = [part for part in parts if part is not None]
    return torch.from_numpy(np.concatenate(given)) if given else None


def _count(labels: Tensor, references: Tensor | None) -> int:
    """Return how many tokens, or pairs, the loss is the mean of."""
    return int((labels != IGNORED).sum() if references is None else (~references.isnan()).sum())


def _padded(rows: Sequence[npt.NDArray[np.float32]]) -> Tensor | None:
    """Return the references of all samples as one tensor, filled up with NaN; None if there are none. [rows, pairs]"""
    if not rows:
        return None
    tensors = [torch.from_numpy(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=math.nan)


def positions_in_document(starts: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the tokens since the last document start, or since the start of the row. [batch, seq] -> [batch, seq]"""
    index = np.arange(starts.shape[1])
    return index - np.maximum.accumulate(np.where(starts, index, 0), 1)


def _to_host(tensor: Tensor, pin_memory: bool) -> Tensor:
    """Make the tensor contiguous, and pinned if asked: only copies from pinned memory overlap with the GPU's work."""
    tensor = tensor.contiguous()
    return tensor.pin_memory() if pin_memory else tensor
