"""The model on the meta device: its parameter names, sizes and FLOPs, without allocating weights.

The modules are the only place that knows the model's shape. Counts and the balance of the pipeline come from here.
"""

import torch
from torch import nn

from megagpt.config.schema import Config
from megagpt.model.chunk import Chunk, new_chunk
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of
from megagpt.pipeline.partition import balance


def meta_chunk(config: Config, parallel: ParallelContext, layers: range) -> Chunk:
    """Build a chunk on the meta device, which allocates nothing."""
    with torch.device("meta"):
        return new_chunk(config, parallel, layers)


def meta_model(config: Config) -> Chunk:
    """Build the entire unsharded model on the meta device. `model.vocab_size` must be known."""
    return meta_chunk(config, ParallelContext(), range(config.model.n_blocks))


def parameter_names(model: nn.Module) -> list[str]:
    """Return the parameter names, in model order."""
    return [shard_of(parameter).name for parameter in model.parameters()]


def stage_layers(config: Config, n_stages: int, model: Chunk | None = None) -> list[range]:
    """Return the layers of each pipeline stage, balanced by forward FLOPs, embedding and output layer included.

    The layers of an encoder come first. `model`: the meta model, if the caller has it already.

    `model.vocab_size` must be known. Raises ValueError if there are more stages than layers.
    """
    model, length = model or meta_model(config), config.model.n_positions
    costs = [float(flops) for flops in model.layer_flops()]
    return balance(costs, n_stages, float(model.embedding_flops()), float(length * model.loss.flops_per_token()))
