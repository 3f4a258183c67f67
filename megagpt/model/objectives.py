"""What the last chunk computes from its hidden states: one small class for each data.task, and one table."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.config.schema import Config
from megagpt.labels import IGNORED
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel.collectives import gather_sequence
from megagpt.parallel.vocab_loss import VocabParallelLoss


class Objective(Protocol):
    """The loss of a micro-batch."""

    def __call__(self, output: VocabParallelLoss, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Return the sum of the losses, an fp32 scalar. `output`: the output layer; hidden: its input, [batch, seq, hidden]."""


class TokenLoss:
    """Cross entropy of the labels."""

    def __init__(self, config: Config) -> None:
        pass

    def __call__(self, output: VocabParallelLoss, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        loss: Tensor = output(hidden, micro_batch.labels)
        return loss


class Rewards(NamedTuple):
    """Sums over the pairs since the last report."""

    margin: Tensor
    """Reward of the chosen answer minus that of the rejected one."""
    accuracy: Tensor
    """Pairs in which the chosen answer has the higher reward."""
    pairs: Tensor


class PreferenceLoss:
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290, equation 7).

    The loss of a pair is -log sigmoid(beta * (margin - reference)). The margin is log p(chosen) - log p(rejected) of the model,
    and the reference that of the model before training. The documents of a sample are chosen and rejected answers in turn.
    """

    def __init__(self, config: Config) -> None:
        self._beta = config.dpo.beta
        self._recorded: list[Tensor] | None = None
        self._rewards: dict[bool, Rewards] = {}

    def __call__(self, output: VocabParallelLoss, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        references, documents = micro_batch.references, micro_batch.documents
        assert references is not None and documents is not None, "the task preference gives both"
        pair, is_chosen = (documents - 1) // 2, documents % 2 == 1  # [batch, seq]
        sign = torch.where(is_chosen, 1.0, -1.0)
        # The gradient of a token depends on the margin of its pair, so the output layer runs twice.
        log_probs = -output.token_losses(hidden, micro_batch.labels)  # [batch, seq]
        n_pairs = references.shape[1]
        margins = log_probs.new_zeros(len(pair), n_pairs + 1)  # the last column is that of the padding
        margins = margins.scatter_add_(1, pair.clamp(max=n_pairs), sign * log_probs)[:, :n_pairs]
        if self._recorded is not None:  # of the reference model, so there are no rewards yet
            self._recorded.append(margins)
            return margins.sum()
        is_pair = ~references.isnan()
        rewards = self._beta * (margins - references.nan_to_num())  # [batch, pairs]
        self._count(rewards, is_pair, output.training)
        losses = torch.where(is_pair, -F.logsigmoid(rewards), 0.0)
        if not torch.is_grad_enabled():
            return losses.sum()
        slopes = F.pad(self._beta * torch.sigmoid(-rewards) * is_pair, (0, 1))  # d loss / d (loss of a chosen token)
        weights = sign * slopes.gather(1, pair.clamp(max=n_pairs))
        weighted = output(hidden, micro_batch.labels, weights)
        return weighted + (losses.sum() - weighted).detach()  # the value of the loss, with the gradient of the weighted sum

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Collect the margins of the forwards in this block, each [batch, pairs], instead of losses and rewards."""
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None

    def take_rewards(self, training: bool) -> Rewards | None:
        """Return the sums of the training steps, or of the evaluation, since the last call; None without a forward."""
        return self._rewards.pop(training, None)

    def _count(self, rewards: Tensor, is_pair: Tensor, training: bool) -> None:
        rewards = rewards.detach()
        sums = Rewards((rewards * is_pair).sum(), ((rewards > 0) & is_pair).sum(), is_pair.sum())
        before = self._rewards.get(training)
        self._rewards[training] = sums if before is None else Rewards(*(a + b for a, b in zip(before, sums, strict=True)))


class ClassLoss(TokenLoss):
    """Cross entropy of classes, with the confusion matrix of evaluations."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._n_classes = len(config.data.classes)
        self._confusion: Tensor | None = None

    def __call__(self, output: VocabParallelLoss, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        if not output.training:
            labels = micro_batch.labels  # [batch, seq]
            everywhere = gather_sequence(hidden, output.parallel.tp_group) if output.parallel.sequence_parallel else hidden
            predicted = output.full_logits(everywhere[labels != IGNORED]).argmax(-1)
            pairs = labels[labels != IGNORED] * self._n_classes + predicted
            counts = torch.bincount(pairs, minlength=self._n_classes**2).view(self._n_classes, self._n_classes)
            self._confusion = counts if self._confusion is None else self._confusion + counts
        return super().__call__(output, hidden, micro_batch)

    def take_confusion(self) -> Tensor | None:
        """Return the counts of the evaluation since the last call, [class, predicted class]; None without a forward."""
        counts, self._confusion = self._confusion, None
        return counts


OBJECTIVES: dict[str, type[TokenLoss] | type[PreferenceLoss]] = {
    "text": TokenLoss,
    "chat": TokenLoss,
    "preference": PreferenceLoss,
    "classification": ClassLoss,
    "span_corruption": TokenLoss,
    "prefix_lm": TokenLoss,
    "pairs": TokenLoss,
}
"""data.task -> what the last chunk computes."""


def build_objective(config: Config) -> Objective:
    """Return the objective of the config."""
    return OBJECTIVES[config.data.task](config)
