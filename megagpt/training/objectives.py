"""What a run does for its data.task beyond the loss: preparation and metrics. One small class each, and one table.

`megagpt/model/objectives.py` has the losses.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist

from megagpt.config.schema import Config
from megagpt.data.blend import Datasets
from megagpt.engine.engine import Engine
from megagpt.model.objectives import ClassLoss, PreferenceLoss
from megagpt.training.checkpointing import find_initial_weights
from megagpt.training.metrics import perplexity
from megagpt.training.reference import compute_margins, examples_of, reference_fingerprint, stored_margins
from megagpt.training.train_state import restore_weights


class RunObjective(Protocol):
    """The part of a run that depends on what its data is for."""

    def prepare(self, engine: Engine, datasets: Datasets) -> None:
        """Get ready, before the run loads its weights. Collective."""

    def training_metrics(self, engine: Engine) -> dict[str, Any]:
        """Return further metrics of the steps since the last call. Collective."""

    def evaluation_metrics(self, engine: Engine, name: str, loss: float) -> dict[str, Any]:
        """Return the metrics of an evaluation NAME with a mean loss. Collective."""


class LanguageModelling:
    """Next tokens, of a text or of answers."""

    def prepare(self, engine: Engine, datasets: Datasets) -> None:
        """Do nothing."""

    def training_metrics(self, engine: Engine) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def evaluation_metrics(self, engine: Engine, name: str, loss: float) -> dict[str, Any]:
        """Return loss and perplexity."""
        return {f"{name}_loss": loss, f"{name}_perplexity": perplexity(loss)}


class PreferenceTuning:
    """Pairs of answers. The reference model is that of checkpoint.initialize_from."""

    def prepare(self, engine: Engine, datasets: Datasets) -> None:
        """Load the reference log-probabilities from beside the data, or compute them. Collective.

        Raises CheckpointError if checkpoint.initialize_from is damaged, and DataError if they cannot be stored.
        """
        config = engine.config
        checkpoint = find_initial_weights(config.checkpoint)
        assert checkpoint is not None, "a rule of the config requires it"
        fingerprint = reference_fingerprint(checkpoint, config.training.precision)
        corpora = examples_of(datasets.all)
        if not stored_margins(corpora, fingerprint):
            restore_weights(engine, checkpoint)
            compute_margins(engine, config, corpora, fingerprint)

    def training_metrics(self, engine: Engine) -> dict[str, Any]:
        """Return reward_margin and reward_accuracy, means over pairs."""
        return _reward_metrics(engine, "", training=True)

    def evaluation_metrics(self, engine: Engine, name: str, loss: float) -> dict[str, Any]:
        """Return the loss, and the margin and accuracy of the rewards."""
        return {f"{name}_loss": loss, **_reward_metrics(engine, f"{name}_", training=False)}


class Classification:
    """Classes of texts."""

    def prepare(self, engine: Engine, datasets: Datasets) -> None:
        """Do nothing."""

    def training_metrics(self, engine: Engine) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def evaluation_metrics(self, engine: Engine, name: str, loss: float) -> dict[str, Any]:
        """Return the loss, the accuracy, and the confusion matrix: for each class the number of each predicted class."""
        n_classes = len(engine.config.data.classes)
        confusion = torch.zeros(n_classes, n_classes, dtype=torch.float64, device=engine.device)
        for chunk in engine.chunks.values():
            counts = chunk.objective.take_confusion() if isinstance(chunk.objective, ClassLoss) else None
            if counts is not None and engine.topology.tp_rank == 0:
                confusion += counts
        if engine.topology.world_group is not None:
            dist.all_reduce(confusion, group=engine.topology.world_group)
        accuracy = float(confusion.trace() / confusion.sum().clamp(min=1))
        counts_by_class = [[int(count) for count in row] for row in confusion.tolist()]
        return {f"{name}_loss": loss, f"{name}_accuracy": accuracy, f"{name}_confusion": counts_by_class}


def _reward_metrics(engine: Engine, prefix: str, training: bool) -> dict[str, float]:
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    objectives = [chunk.objective for chunk in engine.chunks.values() if chunk.is_last]
    for objective in objectives:
        rewards = objective.take_rewards(training) if isinstance(objective, PreferenceLoss) else None
        if rewards is not None and engine.topology.tp_rank == 0:
            sums += torch.stack(list(rewards)).to(sums)
    if engine.topology.world_group is not None:
        dist.all_reduce(sums, group=engine.topology.world_group)
    margin, accuracy, pairs = sums.tolist()
    return {f"{prefix}reward_margin": margin / max(1, pairs), f"{prefix}reward_accuracy": accuracy / max(1, pairs)}


OBJECTIVES: dict[str, type[RunObjective]] = {
    "text": LanguageModelling,
    "chat": LanguageModelling,
    "preference": PreferenceTuning,
    "classification": Classification,
    "span_corruption": LanguageModelling,
    "prefix_lm": LanguageModelling,
    "pairs": LanguageModelling,
}
"""data.task -> what a run does for it."""


def run_objective(config: Config) -> RunObjective:
    """Return the run's objective."""
    return OBJECTIVES[config.data.task]()
