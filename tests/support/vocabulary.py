"""Vocabulary tables of ranks, for tests of the embedding and of the loss."""

import torch
from torch import Tensor

from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.embedding import VocabParallelEmbedding
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of
from megagpt.parallel.topology import Topology

WIDTH, PADDED = 16, 64
PADDING_VALUE = 3.0
"""Value of the padding entries, which must not matter."""


def parallel_context(tensor: int, sequence_parallel: bool) -> ParallelContext:
    return ParallelContext.of(Topology.create(tensor, 1), sequence_parallel, DeferredGradients())


def table_of(weight: Tensor, parallel: ParallelContext) -> VocabParallelEmbedding:
    """Return an embedding with this rank's entries of `weight`, [vocab_size, WIDTH], and padding."""
    table = VocabParallelEmbedding("w", len(weight), PADDED, WIDTH, parallel, 0.0)
    start = shard_of(table.weight).start
    with torch.no_grad():
        table.weight.fill_(PADDING_VALUE)
        local = weight.float()[start : start + len(table.weight)]
        table.weight[: len(local)] = local
    return table


def local_positions(full: Tensor, parallel: ParallelContext) -> Tensor:
    return full.chunk(parallel.tp_size, 1)[parallel.tp_rank] if parallel.sequence_parallel else full
