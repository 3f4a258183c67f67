"""The model on the meta device: its parameter names, sizes and FLOPs, without allocating weights.

The modules are the only place that knows the model's shape. Counts and the balance of the pipeline come from here.
"""

import torch
from torch import nn

from megagpt.config.schema import Config
from megagpt.model.gpt import GPTChunk
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of
from megagpt.pipeline.partition import balance


def meta_chunk(config: Config, parallel: ParallelContext, layers: range) -> GPTChunk:
    """Build a chunk on the meta device, which allocates nothing."""
    with torch.device("meta"):
        return GPTChunk(config, parallel, layers)


def meta_model(config: Config) -> GPTChunk:
    """Build the entire unsharded model on the meta device. `model.vocab_size` must be known."""
    return meta_chunk(config, ParallelContext(), range(config.model.n_layer))


def parameter_names(model: nn.Module) -> list[str]:
    """Return the parameter names, in model order."""
    return [shard_of(parameter).name for parameter in model.parameters()]


def stage_layers(config: Config, n_stages: int) -> list[range]:
    """Return the layers of each pipeline stage, balanced by forward FLOPs, embedding and output layer included.

    `model.vocab_size` must be known. Raises ValueError if there are more stages than layers.
    """
    model = meta_model(config)
    length = config.model.n_positions
    costs = [float(block.flops_per_token(length)) for block in model.blocks]
    return balance(costs, n_stages, float(model.positions.flops_per_token()), float(model.loss.flops_per_token()))
