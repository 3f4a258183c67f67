"""The feed-forward part of a block."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megagpt.parallel.parallel_context import ParallelContext

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class MLP(nn.Module):
    """hidden -> ffn_hidden_size / ranks -> hidden. Input and output shapes as in the parallel linear layers."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext, residual_std: float) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(f"{name}.up", model.n_embd, model.ffn_hidden_size, parallel, model.init_std)
        self.down = RowParallelLinear(f"{name}.down", model.ffn_hidden_size, model.n_embd, parallel, residual_std)
        self.activation = ACTIVATIONS[model.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

    def flops_per_token(self) -> int:
        """Forward FLOPs of the unsharded matrix products for one token."""
        return self.up.flops_per_token() + self.down.flops_per_token()
