"""Vocabulary-parallel embedding: token ids are split over the tensor ranks. For the output layer see `vocab_loss.py`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.parallel.collectives import reduce_from_ranks, reduce_scatter_to_sequence
from megagpt.parallel.deferred_gradients import DeferredGradients, accumulate
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of, sharded_parameter


class _Lookup(torch.autograd.Function):
    """Select entries of `weight`; its gradient goes to the `DeferredGradients` queue. Negative ids give zeros.

    ids [batch, seq], weight [entries, hidden] -> [batch, seq, hidden]
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: nn.Parameter, deferred: DeferredGradients) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.deferred = weight, deferred
        ctx.entries = weight.shape[0]  # ZeRO-3 empties the weight between forward and backward
        return F.embedding(ids.clamp(min=0), weight).masked_fill_((ids < 0).unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        grad, (ids,), weight, entries = grads[0].detach(), ctx.saved_tensors, ctx.weight, ctx.entries

        def job() -> None:
            # One extra entry collects the gradients of other ranks' tokens. This kernel, unlike index_add, gives
            # the same bits on every run on a GPU.
            indices = torch.where(ids < 0, entries, ids)  # [batch, seq]
            gradient = torch.ops.aten.embedding_dense_backward(grad, indices, entries + 1, -1, False)  # [entries + 1, hidden]
            accumulate(weight, gradient[:entries])

        if weight.requires_grad:
            ctx.deferred.add(job)
        return None, None, None


class VocabParallelEmbedding(nn.Module):
    """Token embedding; each tensor rank holds a range of the vocabulary.

    Token ids [batch, seq] -> replicated [batch, seq, hidden], or [batch, seq / ranks, hidden] under sequence parallelism.
    """

    def __init__(self, name: str, vocab_size: int, padded_size: int, width: int, parallel: ParallelContext, std: float) -> None:
        """`padded_size`: entries in total, of which the first `vocab_size` are tokens and the rest are padding."""
        super().__init__()
        self.parallel = parallel
        self.weight = sharded_parameter(name, (padded_size, width), 0, parallel, std, unpadded=vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        first, entries = shard_of(self.weight).start, self.weight.shape[0]
        local = tokens - first
        local = torch.where((local >= 0) & (local < entries), local, -1)  # [batch, seq]
        # The lookup has no input that needs a gradient, so the graph starts at the weight.
        embedded = _Lookup.apply(local, self.weight, self.parallel.deferred_gradients)  # [batch, seq, hidden]
        reduce = reduce_scatter_to_sequence if self.parallel.sequence_parallel else reduce_from_ranks
        return reduce(embedded, self.parallel.tp_group)
