"""Which linear layers of a model get a low-rank adapter."""

from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from megagpt.config.schema import LoRAConfig
from megagpt.parallel.adapter import add_adapter, layer_name
from megagpt.parallel.linear import ColumnParallelLinear, RowParallelLinear


def add_adapters(model: nn.Module, lora: LoRAConfig) -> None:
    """Give an adapter to each linear layer that the config selects; none without a rank."""
    if lora.rank is None:
        return
    for layer in list(linear_layers(model)):
        if any(fnmatchcase(layer_name(layer), pattern) for pattern in lora.targets):
            add_adapter(layer, lora.rank, lora.alpha / lora.rank)


def linear_layers(model: nn.Module) -> Iterator[ColumnParallelLinear | RowParallelLinear]:
    """Yield the parallel linear layers of a model."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            yield module
