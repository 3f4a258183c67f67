"""The feed-forward part of a block."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.model.init_scheme import init_stds
from megagpt.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megagpt.parallel.parallel_context import ParallelContext

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "silu": F.silu,
}


class MLP(nn.Module):
    """hidden -> ffn_hidden_size / ranks -> hidden. Input and output shapes as in the parallel linear layers."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext, residual_std: float) -> None:
        super().__init__()
        width, inner = model.n_embd, model.ffn_hidden_size
        self.up = ColumnParallelLinear(f"{name}.up", width, inner, parallel, init_stds(model).hidden, model.mlp_bias)
        self.down = RowParallelLinear(f"{name}.down", inner, width, parallel, residual_std, model.mlp_bias)
        self.activation = ACTIVATIONS[model.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

    def flops_per_token(self) -> int:
        """Forward FLOPs of the unsharded matrix products for one token."""
        return self.up.flops_per_token() + self.down.flops_per_token()


class GatedMLP(nn.Module):
    """down(activation(gate) * up), as in SwiGLU (Shazeer, arXiv 2002.05202). Gate and up are one matrix product."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext, residual_std: float) -> None:
        super().__init__()
        width, inner, bias = model.n_embd, model.ffn_hidden_size, model.mlp_bias
        self.gate_up = ColumnParallelLinear(
            f"{name}.gate_up", width, 2 * inner, parallel, init_stds(model).hidden, bias, parts=2
        )
        self.down = RowParallelLinear(f"{name}.down", inner, width, parallel, residual_std, bias)
        self.activation = ACTIVATIONS[model.activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.activation(gate) * up)

    def flops_per_token(self) -> int:
        """Forward FLOPs of the unsharded matrix products for one token."""
        return self.gate_up.flops_per_token() + self.down.flops_per_token()


def build_mlp(name: str, model: ModelConfig, parallel: ParallelContext, residual_std: float) -> MLP | GatedMLP:
    """Return the MLP that the config describes."""
    return (GatedMLP if model.gated_mlp else MLP)(name, model, parallel, residual_std)
