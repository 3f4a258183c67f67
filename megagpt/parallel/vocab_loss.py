"""Output layer and cross entropy of a vocabulary that is split over the tensor ranks, in chunks of tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.parallel.collectives import all_gather_into, copy_to_ranks, gather_sequence
from megagpt.parallel.deferred_gradients import accumulate_scaled, add_product
from megagpt.parallel.loss_kernels import (
    LocalLabels,
    LossTerms,
    cap_logits,
    eager_gradient,
    eager_statistics,
    loss_gradient,
    loss_statistics,
    unpadded_entries,
)
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of

CHUNK_MIB = {"cpu": 32, "cuda": 1024}
"""Default memory of the logits that exist at a time, in MiB: on a CPU what fits the caches, on a GPU few large products."""


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
        tokens, local = hidden.flatten(0, -2), LocalLabels.of(labels.flatten(), self.weight)
        terms = LossTerms(0.0, 0.0, self.softcap)
        losses = [
            _token_losses(tokens[chunk] @ self.weight.t(), local.chunk(chunk), self.parallel, terms, train=False)[0]
            for chunk in _chunks(len(tokens), self._chunk_tokens(hidden))
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
        local = LocalLabels.of(labels.flatten(), weight)
        chunk_tokens = min(len(tokens), chunk_tokens)
        buffer = tokens.new_empty(chunk_tokens, weight.shape[0])  # reused: new pages cost more than the arithmetic
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(tokens) if train and hidden.requires_grad else None  # [tokens, hidden]
        grad_weight = _fp32_zeros_like(weight) if train and weight.requires_grad else None  # [entries, hidden]
        for chunk in _chunks(len(tokens), chunk_tokens):
            logits = torch.mm(tokens[chunk], weight.t(), out=buffer[: len(tokens[chunk])])  # [chunk, entries]
            losses, gradient = _token_losses(logits, local.chunk(chunk), parallel, terms, train)
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


def _chunks(n_tokens: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n_tokens, size)]


def _fp32_zeros_like(weight: nn.Parameter) -> Tensor:
    return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)


def _token_losses(
    logits: Tensor, labels: LocalLabels, parallel: ParallelContext, terms: LossTerms, train: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the losses of a chunk, [tokens], and when training the gradient by this rank's logits, [tokens, entries].

    Both are 0 at ignored tokens. The logits are overwritten: compiled functions write the gradient over them. Collective.
    """
    kernels = parallel.kernels
    if not kernels.compiled:
        statistics, scores = eager_statistics(logits, labels, terms, train)
        losses, log_total = _joined_losses(statistics, parallel, terms, labels.ignored)
        return losses, eager_gradient(scores, statistics[0], log_total, labels, terms) if train else None
    statistics = kernels.run(loss_statistics, logits, labels, terms)
    losses, log_total = _joined_losses(statistics, parallel, terms, labels.ignored)
    if not train:
        return losses, None
    kernels.run(loss_gradient, logits, log_total, labels, terms)
    return losses, logits


def _joined_losses(statistics: Tensor, parallel: ParallelContext, terms: LossTerms, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of a chunk, 0 at ignored tokens, and the logarithm of the sum of exp(score) over all ranks.

    statistics: largest score, sum of exp(score - largest) and target's score of each token on this rank, [3, tokens].
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


def _gather_statistics(local: Tensor, parallel: ParallelContext) -> tuple[Tensor, ...]:
    """Gather every rank's three numbers per token. [3, tokens] -> three of [ranks, tokens]"""
    gathered = local.new_empty(parallel.tp_size * 3, local.shape[1])
    all_gather_into(gathered, local, group=parallel.tp_group)
    return gathered.view(parallel.tp_size, *local.shape).unbind(1)
