"""Loss on held-out data: the same batches in every evaluation, reduced by the same function as the training loss."""

import math
from typing import Any

import torch

from megagpt.config.schema import Config
from megagpt.data.blend import Dataset
from megagpt.engine.engine import Engine
from megagpt.training.metrics import reduce_loss, sum_tokens
from megagpt.training.micro_batches import global_batches, to_host_batch


def evaluate(engine: Engine, dataset: Dataset, config: Config, name: str = "eval") -> dict[str, Any]:
    """Return NAME_loss (nats per token over `evaluation.steps` global batches) and NAME_perplexity. Collective."""
    micro_batch_size = config.evaluation.micro_batch_size or config.training.micro_batch_size
    batches = global_batches(dataset, config, engine.topology, micro_batch_size)
    total: torch.Tensor | None = None
    n_tokens = 0
    for step in range(config.evaluation.steps):
        engine.phase.enter(f"evaluation batch {step}")
        batch = to_host_batch(batches.micro_batches(step * batches.size), config, engine.topology)
        n_tokens += batch.n_tokens
        loss_sum = engine.evaluate(batch.to(engine.device))
        if loss_sum is not None:
            total = loss_sum.double() if total is None else total + loss_sum
    global_tokens = sum_tokens(n_tokens, engine.topology, engine.device)
    loss = reduce_loss(total, global_tokens, engine.topology, engine.device).loss
    return {f"{name}_loss": loss, f"{name}_perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
