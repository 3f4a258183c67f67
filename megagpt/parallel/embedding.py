"""The two ends of the vocabulary: an embedding and a cross entropy split over tensor ranks by token id."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.parallel.collectives import (
    copy_to_ranks,
    gather_into,
    gather_sequence,
    reduce_from_ranks,
    reduce_scatter_to_sequence,
)
from megagpt.parallel.shard import TensorParallel, shard_of, sharded_parameter
from megagpt.parallel.weight_gradients import WeightGradients, accumulate

IGNORED = -100
"""Label of a position that has no part in the loss (torch's convention)."""
_LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2**26}
"""Logits alive at a time: on a CPU what the caches like, on a GPU enough rows for a full matrix product."""


class _Lookup(torch.autograd.Function):
    """Rows of `weight`; the gradient of `weight` is work for `WeightGradients`. Negative ids give zeros."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: nn.Parameter, later: WeightGradients) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.later = weight, later
        ctx.shape = weight.shape  # ZeRO-3 empties the weight between forward and backward
        return F.embedding(ids.clamp(min=0), weight).masked_fill_((ids < 0).unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        grad, (ids,), weight, rows = grads[0].detach(), ctx.saved_tensors, ctx.weight, ctx.shape[0]

        def job() -> None:
            # One more row takes what the other ranks' tokens would add. This kernel, unlike index_add, gives
            # the same bits on every run on a GPU.
            indices = torch.where(ids < 0, rows, ids)
            whole = torch.ops.aten.embedding_dense_backward(grad, indices, rows + 1, -1, False)
            accumulate(weight, whole[:rows])

        if weight.requires_grad:
            ctx.later.add(job)
        return None, None, None


class VocabParallelEmbedding(nn.Module):
    """Each tensor rank holds a slice of the rows of parameter `name`; `padded` rows in all, of which `vocab_size` are real.

    Token ids [batch, seq] -> replicated [batch, seq, hidden], or [batch, seq / ranks, hidden] under sequence parallelism.
    """

    def __init__(self, name: str, vocab_size: int, padded: int, width: int, tp: TensorParallel, std: float) -> None:
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter(name, (padded, width), 0, tp, std, kept=vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        first, rows = shard_of(self.weight).start, self.weight.shape[0]
        local = tokens - first
        local = torch.where((local >= 0) & (local < rows), local, -1)
        # The lookup has no input that needs a gradient, so the graph starts at the weight.
        found = _Lookup.apply(local, self.weight, self.tp.weight_gradients)
        leave = reduce_scatter_to_sequence if self.tp.sequence_parallel else reduce_from_ranks
        return leave(found, self.tp.group)


class VocabParallelLoss(nn.Module):
    """Output layer and cross entropy in one, over a slice of the vocabulary on each tensor rank.

    hidden [batch, seq (/ ranks under sequence parallelism), hidden] and labels [batch, seq] -> sum of the token losses,
    a scalar in fp32. Tokens are taken in chunks whose gradient is made in the forward, so that the logits of a
    micro-batch never exist together, on one rank or gathered.
    """

    def __init__(self, weight: nn.Parameter, tp: TensorParallel, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.tp = tp
        self.weight = weight
        self.label_smoothing = label_smoothing
        """Share of the label that is spread evenly over the vocabulary (Szegedy et al., arXiv 1512.00567), in training
        mode alone: an evaluation tells the plain cross entropy."""

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        enter = gather_sequence if self.tp.sequence_parallel else copy_to_ranks
        hidden = enter(hidden, self.tp.group)
        train = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        smoothing = self.label_smoothing if self.training else 0.0
        return _ChunkedLoss.apply(hidden, self.weight, labels, self.tp, smoothing, train)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of this rank's real tokens. [batch, seq, hidden] -> [batch, seq, vocabulary of this rank]"""
        return F.linear(hidden, self.weight[: real_rows(self.weight)])


def real_rows(weight: nn.Parameter) -> int:
    """Rows of this rank's slice that are tokens, not padding."""
    shard = shard_of(weight)
    return max(0, min(weight.shape[0], shard.shape[0] - shard.start))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: nn.Parameter, labels: Tensor, tp: TensorParallel, smoothing: float, train: bool
    ) -> Tensor:
        tokens, targets = hidden.flatten(0, -2), labels.flatten() - shard_of(weight).start  # [tokens, hidden], [tokens]
        ignored = labels.flatten() == IGNORED
        chunk = min(len(tokens), max(1, _LOGITS_AT_ONCE.get(hidden.device.type, 2**26) // weight.shape[0]))
        scores = tokens.new_empty(chunk, weight.shape[0])  # one buffer for all: fresh pages cost more than the arithmetic
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(tokens) if train and hidden.requires_grad else None
        grad_weight = _zeros_in_fp32(weight) if train and weight.requires_grad else None
        for start in range(0, len(tokens), chunk):
            part = slice(start, start + chunk)
            logits = torch.mm(tokens[part], weight.t(), out=scores[: len(tokens[part])])
            losses, gradient = _token_losses(logits, weight, targets[part], ignored[part], tp, smoothing, train)
            total += losses.sum()
            if gradient is None:
                continue
            gradient = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, gradient.t(), tokens[part])
        if train:
            ctx.save_for_backward(grad_hidden)
            ctx.grad_weight, ctx.weight, ctx.later, ctx.shape = grad_weight, weight, tp.weight_gradients, hidden.shape
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        scale, (grad_hidden,) = grads[0].detach(), ctx.saved_tensors
        weight, grad_weight = ctx.weight, ctx.grad_weight
        ctx.grad_weight = None

        def job() -> None:
            accumulate(weight, grad_weight.mul_(scale))

        if grad_weight is not None:
            ctx.later.add(job)
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale.to(grad_hidden.dtype)).view(ctx.shape)
        return grad_hidden, None, None, None, None, None


def _zeros_in_fp32(weight: nn.Parameter) -> Tensor:
    return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, without a temporary where the types allow."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _token_losses(
    logits: Tensor,
    weight: nn.Parameter,
    targets: Tensor,
    ignored: Tensor,
    tp: TensorParallel,
    smoothing: float,
    train: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses [tokens] and, for training, their gradients by this rank's logits [tokens, rows], of one chunk.

    Zero where `ignored`. The logits are overwritten where they are fp32.
    Each rank normalises by its own largest logit, so that a single exchange of three numbers a token serves all ranks.
    """
    scores = logits.float()
    real = real_rows(weight)
    evenly = smoothing / shard_of(weight).shape[0]  # each token's part of the smoothed label
    scores[:, real:] = float("-inf")  # padding rows reach neither the loss nor, with probability 0, the gradient
    mine = (targets >= 0) & (targets < real)
    index = torch.where(mine, targets, 0).unsqueeze(-1)
    largest = scores.amax(-1).clamp_(min=torch.finfo(torch.float32).min)
    target = torch.where(mine, scores.gather(-1, index).squeeze(-1), 0.0)
    if smoothing > 0:
        target = target.mul_(1 - smoothing).add_(scores[:, :real].sum(-1), alpha=evenly)
    exponentials = scores.sub_(largest.unsqueeze(-1)).exp_()
    total = exponentials.sum(-1)
    if tp.group is None:
        share = 1.0 / total
        losses = largest + total.log() - target
    else:
        all_largest, all_totals, all_targets = _exchange(torch.stack((largest, total, target)), tp)
        top = all_largest.amax(0)
        whole = (all_totals * (all_largest - top).exp()).sum(0)
        share = (largest - top).exp() / whole
        losses = top + whole.log() - all_targets.sum(0)
    losses = losses.masked_fill(ignored, 0)
    if not train:
        return losses, None
    gradient = exponentials.mul_(share.masked_fill(ignored, 0).unsqueeze(-1))
    gradient.scatter_add_(-1, index, (mine & ~ignored).unsqueeze(-1).to(gradient.dtype).mul_(smoothing - 1))
    if smoothing > 0:
        gradient[:, :real].sub_(evenly * (~ignored).unsqueeze(-1).to(gradient.dtype))
    return losses, gradient


def _exchange(mine: Tensor, tp: TensorParallel) -> tuple[Tensor, ...]:
    """Every rank's three numbers for every token. [3, tokens] -> three of [ranks, tokens]"""
    everyone = mine.new_empty(tp.size * 3, mine.shape[1])
    gather_into(everyone, mine, group=tp.group)
    return everyone.view(tp.size, *mine.shape).unbind(1)
