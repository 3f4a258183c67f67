"""The cross entropy of a chunk of tokens on one rank's range of the vocabulary, eagerly and in compiled passes.

The gradient of the loss by the logits is computed with the loss. Under tensor parallelism the ranks exchange three numbers per
token between the two halves: see `vocab_loss.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megagpt.labels import IGNORED
from megagpt.parallel.parameter import shard_of


class LossTerms(NamedTuple):
    """What the loss adds to the plain cross entropy."""

    smoothing: float
    z_loss: float
    softcap: float | None


class LocalLabels(NamedTuple):
    """Labels of some tokens, [tokens], as one rank's range of the vocabulary needs them."""

    entry: Tensor
    """Index of each label in this rank's range; 0 if another rank has it."""
    is_local: Tensor
    """Whether this rank has the label's entry."""
    ignored: Tensor
    """Whether the token has no loss."""
    n_entries: int
    """Entries of this rank that are tokens; those behind them are padding."""
    n_vocab: int
    """Tokens in the vocabulary of all ranks."""

    @classmethod
    def of(cls, labels: Tensor, weight: nn.Parameter) -> "LocalLabels":
        """Return the labels for the entries of `weight`. labels: [tokens]"""
        targets, n_entries = labels - shard_of(weight).start, unpadded_entries(weight)
        is_local = (targets >= 0) & (targets < n_entries)
        return cls(torch.where(is_local, targets, 0), is_local, labels == IGNORED, n_entries, shard_of(weight).shape[0])

    def chunk(self, tokens: slice) -> "LocalLabels":
        """Return the labels of some of the tokens."""
        return self._replace(entry=self.entry[tokens], is_local=self.is_local[tokens], ignored=self.ignored[tokens])


class EagerScores(NamedTuple):
    """What the eager form keeps between its halves, [tokens, entries]."""

    exponentials: Tensor
    """exp(score - largest score of the token on this rank)."""
    slope: Tensor | None
    """Derivative of the capped scores by the logits; None without a cap or without a gradient."""


def unpadded_entries(weight: nn.Parameter) -> int:
    """Return how many entries of this rank's vocabulary range are tokens, not padding."""
    shard = shard_of(weight)
    return max(0, min(weight.shape[0], shard.shape[0] - shard.start))


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Return softcap * tanh(logits / softcap), or the logits without a cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def eager_statistics(logits: Tensor, labels: LocalLabels, terms: LossTerms, train: bool) -> tuple[Tensor, EagerScores]:
    """Return what `loss_statistics` returns, and what `eager_gradient` needs. fp32 logits are overwritten.

    `train`: whether a gradient will be asked for.
    """
    scores, slope = logits.float(), None
    if terms.softcap is not None:
        ratio = scores.div_(terms.softcap).tanh_()
        slope = 1 - ratio.square() if train else None
        scores = ratio.mul_(terms.softcap)
    scores[:, labels.n_entries :] = float("-inf")  # padding has probability 0: no effect on the loss, no gradient
    largest = scores.amax(-1).clamp_(min=torch.finfo(torch.float32).min)  # [tokens]
    target = torch.where(labels.is_local, scores.gather(-1, labels.entry.unsqueeze(-1)).squeeze(-1), 0.0)  # [tokens]
    if terms.smoothing > 0:
        of_all = scores[:, : labels.n_entries].sum(-1)
        target = target.mul_(1 - terms.smoothing).add_(of_all, alpha=terms.smoothing / labels.n_vocab)
    exponentials = scores.sub_(largest.unsqueeze(-1)).exp_()
    return torch.stack((largest, exponentials.sum(-1), target)), EagerScores(exponentials, slope)


def eager_gradient(scores: EagerScores, largest: Tensor, log_total: Tensor, labels: LocalLabels, terms: LossTerms) -> Tensor:
    """Return the gradient of the loss by the logits, [tokens, entries] in fp32; 0 at ignored tokens and at padding.

    largest: largest score of each token on this rank; log_total: see `loss_gradient`. `scores` is overwritten.
    """
    counted = ~labels.ignored
    gradient = scores.exponentials.mul_((largest - log_total).exp_().masked_fill(labels.ignored, 0).unsqueeze(-1))
    if terms.z_loss > 0:  # its gradient is proportional to the probabilities, too
        gradient.mul_((1 + 2 * terms.z_loss * log_total).unsqueeze(-1))
    is_target = (labels.is_local & counted).unsqueeze(-1).to(gradient.dtype)
    gradient.scatter_add_(-1, labels.entry.unsqueeze(-1), is_target.mul_(terms.smoothing - 1))
    if terms.smoothing > 0:
        gradient[:, : labels.n_entries].sub_(terms.smoothing / labels.n_vocab * counted.unsqueeze(-1).to(gradient.dtype))
    return gradient if scores.slope is None else gradient.mul_(scores.slope)


def loss_statistics(logits: Tensor, labels: LocalLabels, terms: LossTerms) -> Tensor:
    """Return for each token of this rank's vocabulary the largest score, the sum of exp(score - largest), and the target's.

    logits: [tokens, padded entries]. Returns fp32, [3, tokens]. With smoothing, the third number is the weighted sum of the
    scores that the smoothed label asks for.
    """
    scores = cap_logits(logits.float(), terms.softcap)
    target = torch.where(labels.is_local, scores.gather(-1, labels.entry.unsqueeze(-1)).squeeze(-1), 0.0)
    valid = torch.arange(scores.shape[1], device=scores.device) < labels.n_entries
    if terms.smoothing > 0:
        of_all = torch.where(valid, scores, 0.0).sum(-1)
        target = target * (1 - terms.smoothing) + terms.smoothing / labels.n_vocab * of_all
    if labels.n_entries < scores.shape[1]:
        scores = torch.where(valid, scores, float("-inf"))
    largest = scores.amax(-1).clamp(min=torch.finfo(torch.float32).min)  # -inf on a rank that has padding only
    total = (scores - largest.unsqueeze(-1)).exp().sum(-1)
    return torch.stack((largest, total, target))


def loss_gradient(logits: Tensor, log_total: Tensor, labels: LocalLabels, terms: LossTerms) -> None:
    """Replace logits [tokens, padded entries] by the gradient of the loss by them; 0 at ignored tokens and at padding.

    log_total: logarithm of the sum of exp(score) over all ranks, [tokens].
    """
    scores = cap_logits(logits.float(), terms.softcap)
    columns = torch.arange(scores.shape[1], device=scores.device)
    gradient = (scores - log_total.unsqueeze(-1)).exp()
    if terms.z_loss > 0:
        gradient = gradient * (1 + 2 * terms.z_loss * log_total).unsqueeze(-1)
    is_target = (columns == labels.entry.unsqueeze(-1)) & labels.is_local.unsqueeze(-1)
    gradient = torch.where(is_target, gradient - (1 - terms.smoothing), gradient)
    if terms.smoothing > 0:
        gradient = gradient - terms.smoothing / labels.n_vocab
    if terms.softcap is not None:
        gradient = gradient * (1 - (scores / terms.softcap).square())
    kept = (columns < labels.n_entries) & ~labels.ignored.unsqueeze(-1)
    logits.copy_(torch.where(kept, gradient, 0.0))
