"""Loss on held-out data: the same batches at every evaluation, by the same loss path as training."""

import math
from typing import Any

import torch

from megagpt.config.schema import Config
from megagpt.data.blend import Dataset
from megagpt.training.batches import global_batches, to_micro_batches, token_count
from megagpt.training.engine import Engine
from megagpt.training.metrics import count_tokens, global_loss


def evaluate(engine: Engine, dataset: Dataset, config: Config, name: str = "eval") -> dict[str, Any]:
    """NAME_loss (nats per token over `evaluation.steps` global batches) and NAME_perplexity, on every rank."""
    size = config.evaluation.micro_batch_size or config.training.micro_batch_size
    batches = global_batches(dataset, config, engine.topology, size)
    total: torch.Tensor | None = None
    tokens = 0
    for step in range(config.evaluation.steps):
        engine.where.at(f"batch {step} of the evaluation")
        micro_batches = to_micro_batches(batches.at(step * batches.size), config, engine.topology, step, engine.device)
        tokens += token_count(micro_batches)
        loss_sum = engine.evaluate(micro_batches)
        if loss_sum is not None:
            total = loss_sum.double() if total is None else total + loss_sum
    loss = global_loss(total, count_tokens(tokens, engine.topology, engine.device), engine.topology, engine.device)
    return {f"{name}_loss": loss, f"{name}_perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
