"""Vocabulary-parallel embedding, output layer and cross entropy: token ids are split over the tensor ranks."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.labels import IGNORED
from megagpt.parallel.collectives import (
    all_gather_into,
    copy_to_ranks,
    gather_sequence,
    reduce_from_ranks,
    reduce_scatter_to_sequence,
)
from megagpt.parallel.deferred_gradients import DeferredGradients, accumulate, accumulate_scaled, add_product
from megagpt.parallel.kernels import loss_gradient, loss_statistics
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of, sharded_parameter

CHUNK_MIB = {"cpu": 32, "cuda": 1024}
"""Default memory of the logits that exist at a time, in MiB: on a CPU what fits the caches, on a GPU few large products."""


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


class VocabParallelLoss(nn.Module):
    """Output layer and cross entropy in one; each tensor rank holds a range of the vocabulary.

    hidden [batch, seq, hidden] ([batch, seq / ranks, hidden] under sequence parallelism) and labels [batch, seq] -> sum of
    the token losses in nats, an fp32 scalar. Tokens are processed in chunks, and the gradient of each chunk is computed in
    the forward, so the logits of a micro-batch never exist all at once.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        parallel: ParallelContext,
        label_smoothing: float = 0.0,
        chunk_mib: float | None = None,
        softcap: float | None = None,
        z_loss: float = 0.0,
    ) -> None:
        """`chunk_mib`: memory of the logits that exist at a time on this rank, in MiB; `CHUNK_MIB` of the device by default.

        `softcap`: logits are softcap * tanh(logit / softcap).
        """
        super().__init__()
        self.parallel = parallel
        self.weight = weight
        self.chunk_mib = chunk_mib
        self.label_smoothing = label_smoothing
        """Share of each label that is spread evenly over the vocabulary (Szegedy et al., arXiv 1512.00567). Used in
        training mode only: evaluations report the plain cross entropy."""
        self.z_loss = z_loss
        """Weight of log(sum of exp(logits))^2 in the training loss (PaLM, arXiv 2204.02311, section 5)."""
        self.softcap = softcap

    def forward(self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """`weights`: factors of the token losses, [batch, seq]; 1 if absent."""
        enter = gather_sequence if self.parallel.sequence_parallel else copy_to_ranks
        hidden = enter(hidden, self.parallel.tp_group)
        train = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        terms = LossTerms(self.label_smoothing if self.training else 0.0, self.z_loss if self.training else 0.0, self.softcap)
        n_tokens = self._chunk_tokens(hidden)
        return _ChunkedLoss.apply(hidden, self.weight, labels, weights, self.parallel, terms, train, n_tokens)

    @torch.no_grad()
    def token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of each token without a gradient, 0 at ignored ones. Arguments as in `forward`.

        Shape of `labels`, fp32.
        """
        if self.parallel.sequence_parallel:
            hidden = gather_sequence(hidden, self.parallel.tp_group)
        targets, ignored = labels.flatten() - shard_of(self.weight).start, labels.flatten() == IGNORED
        terms, n_tokens = LossTerms(0.0, 0.0, self.softcap), self._chunk_tokens(hidden)
        chunks = zip(*(part.split(n_tokens) for part in (hidden.flatten(0, -2), targets, ignored)), strict=True)
        losses = [
            _token_losses(tokens @ self.weight.t(), self.weight, target, skipped, self.parallel, terms, train=False)[0]
            for tokens, target, skipped in chunks
        ]
        return torch.cat(losses).view(labels.shape)

    def _chunk_tokens(self, hidden: Tensor) -> int:
        """Return how many tokens make a chunk: as many in each one, except that the last may have fewer."""
        chunk_mib = self.chunk_mib or CHUNK_MIB.get(hidden.device.type, CHUNK_MIB["cuda"])
        most = max(1, int(chunk_mib * 2**20) // (self.weight.shape[0] * hidden.element_size()))
        n_tokens = hidden.shape[:-1].numel()
        n_chunks = -(-n_tokens // most)
        return -(-n_tokens // n_chunks)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of this rank's tokens. [batch, seq, hidden] -> [batch, seq, this rank's vocabulary]"""
        return cap_logits(F.linear(hidden, self.weight[: unpadded_entries(self.weight)]), self.softcap)

    def full_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of all tokens on every tensor rank. [..., hidden] -> [..., vocab_size]. Collective."""
        local, group, entries = self.logits(hidden), self.parallel.tp_group, self.weight.shape[0]
        if group is None:
            return local
        padded = F.pad(local.flatten(0, -2), (0, entries - local.shape[-1]))  # [tokens, entries]
        gathered = padded.new_empty(self.parallel.tp_size * len(padded), entries)
        all_gather_into(gathered, padded, group=group)
        full = gathered.view(self.parallel.tp_size, len(padded), entries).transpose(0, 1).flatten(1)
        return full[:, : shard_of(self.weight).shape[0]].unflatten(0, hidden.shape[:-1])

    def flops_per_token(self) -> int:
        """Forward FLOPs of the unsharded output layer for one token, padding included."""
        entries, width = self.weight.shape
        return 2 * entries * self.parallel.tp_size * width


def unpadded_entries(weight: nn.Parameter) -> int:
    """Return how many entries of this rank's vocabulary range are tokens, not padding."""
    shard = shard_of(weight)
    return max(0, min(weight.shape[0], shard.shape[0] - shard.start))


class LossTerms(NamedTuple):
    """What the loss adds to the plain cross entropy."""

    smoothing: float
    z_loss: float
    softcap: float | None


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Return softcap * tanh(logits / softcap), or the logits without a cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: nn.Parameter,
        labels: Tensor,
        weights: Tensor | None,
        parallel: ParallelContext,
        terms: LossTerms,
        train: bool,
        chunk_tokens: int,
    ) -> Tensor:
        tokens = hidden.flatten(0, -2)  # [tokens, hidden]
        targets = labels.flatten() - shard_of(weight).start  # [tokens], as indices into this rank's vocabulary
        ignored = labels.flatten() == IGNORED  # [tokens]
        chunk_tokens = min(len(tokens), chunk_tokens)
        buffer = tokens.new_empty(chunk_tokens, weight.shape[0])  # reused: new pages cost more than the arithmetic
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(tokens) if train and hidden.requires_grad else None  # [tokens, hidden]
        grad_weight = _fp32_zeros_like(weight) if train and weight.requires_grad else None  # [entries, hidden]
        for start in range(0, len(tokens), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = torch.mm(tokens[chunk], weight.t(), out=buffer[: len(tokens[chunk])])  # [chunk, entries]
            token_losses = _compiled_token_losses if parallel.kernels.compiled else _token_losses
            losses, gradient = token_losses(logits, weight, targets[chunk], ignored[chunk], parallel, terms, train)
            if weights is not None:
                factors = weights.flatten()[chunk]
                losses = losses * factors
                gradient = None if gradient is None else gradient * factors.unsqueeze(-1)
            total += losses.sum()
            if gradient is None:
                continue
            gradient = gradient.to(hidden.dtype)  # [chunk, entries]
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                add_product(grad_weight, gradient.t(), tokens[chunk])
        if train:
            ctx.save_for_backward(grad_hidden)
            ctx.grad_weight, ctx.weight, ctx.deferred, ctx.shape = (
                grad_weight,
                weight,
                parallel.deferred_gradients,
                hidden.shape,
            )
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, None, None, None]:
        scale, (grad_hidden,) = grads[0].detach(), ctx.saved_tensors
        weight, grad_weight = ctx.weight, ctx.grad_weight
        ctx.grad_weight = None

        def job() -> None:
            accumulate_scaled(weight, grad_weight, scale)

        if grad_weight is not None:
            ctx.deferred.add(job)
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale.to(grad_hidden.dtype)).view(ctx.shape)
        return grad_hidden, None, None, None, None, None, None, None


def _fp32_zeros_like(weight: nn.Parameter) -> Tensor:
    return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)


def _compiled_token_losses(
    logits: Tensor,
    weight: nn.Parameter,
    targets: Tensor,
    ignored: Tensor,
    parallel: ParallelContext,
    terms: LossTerms,
    train: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return what `_token_losses` returns, in two compiled passes over the logits, which the gradient overwrites.

    The exchange of three numbers per token stands between the passes.
    """
    entries = unpadded_entries(weight)
    even_share = terms.smoothing / shard_of(weight).shape[0]
    is_local = (targets >= 0) & (targets < entries)
    index = torch.where(is_local, targets, 0)
    kernels = parallel.kernels
    statistics = kernels.run(loss_statistics, logits, index, is_local, entries, even_share, terms.smoothing, terms.softcap)
    losses, log_total = _losses(statistics, parallel, terms, ignored)
    if not train:
        return losses, None
    kernels.run(
        loss_gradient,
        logits,
        log_total,
        index,
        is_local,
        ignored,
        entries,
        even_share,
        terms.smoothing,
        terms.softcap,
        terms.z_loss,
    )
    return losses, logits


def _losses(statistics: Tensor, parallel: ParallelContext, terms: LossTerms, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of a chunk, 0 at ignored tokens, and the logarithm of the sum of exp(logit) over all ranks.

    statistics: largest logit, sum of exp(logit - largest) and target's logit of each token on this rank, [3, tokens].
    """
    if parallel.tp_group is None:
        largest, total, target = statistics.unbind(0)
    else:
        all_largest, all_totals, all_targets = _gather_statistics(statistics, parallel)
        largest = all_largest.amax(0)
        total, target = (all_totals * (all_largest - largest).exp()).sum(0), all_targets.sum(0)
    log_total = largest + total.log()
    losses = log_total - target
    if terms.z_loss > 0:
        losses = losses + terms.z_loss * log_total.square()
    return losses.masked_fill(ignored, 0), log_total


def _token_losses(
    logits: Tensor,
    weight: nn.Parameter,
    targets: Tensor,
    ignored: Tensor,
    parallel: ParallelContext,
    terms: LossTerms,
    train: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the losses of one chunk, [tokens], and when training their gradients by this rank's logits, [tokens, entries].

    Losses and gradients are zero at `ignored` positions. fp32 logits are overwritten.
    Each rank subtracts its own largest logit, so one exchange of three numbers per token is enough for all ranks.
    """
    scores = logits.float()
    smoothing = terms.smoothing
    slope = None
    if terms.softcap is not None:
        ratio = scores.div_(terms.softcap).tanh_()
        slope = 1 - ratio.square() if train else None  # d capped / d logit
        scores = ratio.mul_(terms.softcap)
    entries = unpadded_entries(weight)
    even_share = smoothing / shard_of(weight).shape[0]  # each vocabulary entry's share of the smoothed label
    scores[:, entries:] = float("-inf")  # padding has probability 0: no effect on the loss, no gradient
    is_local = (targets >= 0) & (targets < entries)  # [tokens]
    index = torch.where(is_local, targets, 0).unsqueeze(-1)  # [tokens, 1]
    largest = scores.amax(-1).clamp_(min=torch.finfo(torch.float32).min)  # [tokens]
    target = torch.where(is_local, scores.gather(-1, index).squeeze(-1), 0.0)  # [tokens]
    if smoothing > 0:
        target = target.mul_(1 - smoothing).add_(scores[:, :entries].sum(-1), alpha=even_share)
    exponentials = scores.sub_(largest.unsqueeze(-1)).exp_()  # [tokens, entries]
    total = exponentials.sum(-1)  # [tokens]
    losses, log_total = _losses(torch.stack((largest, total, target)), parallel, terms, ignored)
    if not train:
        return losses, None
    gradient = exponentials.mul_((largest - log_total).exp_().masked_fill(ignored, 0).unsqueeze(-1))
    if terms.z_loss > 0:  # added below to the gradient of the cross entropy, which is proportional to the probabilities, too
        gradient.mul_((1 + 2 * terms.z_loss * log_total).unsqueeze(-1))
    gradient.scatter_add_(-1, index, (is_local & ~ignored).unsqueeze(-1).to(gradient.dtype).mul_(smoothing - 1))
    if smoothing > 0:
        gradient[:, :entries].sub_(even_share * (~ignored).unsqueeze(-1).to(gradient.dtype))
    return losses, gradient if slope is None else gradient.mul_(slope)


def _gather_statistics(local: Tensor, parallel: ParallelContext) -> tuple[Tensor, ...]:
    """Gather every rank's three numbers per token. [3, tokens] -> three of [ranks, tokens]"""
    gathered = local.new_empty(parallel.tp_size * 3, local.shape[1])
    all_gather_into(gathered, local, group=parallel.tp_group)
    return gathered.view(parallel.tp_size, *local.shape).unbind(1)
