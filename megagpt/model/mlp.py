"""The feed-forward half of a block."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megagpt.parallel.shard import TensorParallel

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class MLP(nn.Module):
    """hidden -> ffn / ranks -> hidden. Input and output as of `ColumnParallelLinear` and `RowParallelLinear`."""

    def __init__(self, name: str, model: ModelConfig, tp: TensorParallel, residual_std: float) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(f"{name}.up", model.n_embd, model.ffn_width, tp, model.init_std)
        self.down = RowParallelLinear(f"{name}.down", model.ffn_width, model.n_embd, tp, residual_std)
        self.activation = ACTIVATIONS[model.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))
