"""The feed-forward part of a block."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.model import fused
from megagpt.model.dropout import ChannelDropout
from megagpt.model.forward_context import ForwardContext
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


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return activation(gate) * up

    return function


GATED_ACTIVATIONS = {name: _gated(activation) for name, activation in ACTIVATIONS.items()}
"""Functions of gate and up, one after the other in the last dim."""


class MLP(nn.Module):
    """hidden -> ffn_hidden_size / ranks -> hidden. Input and output shapes as in the parallel linear layers.

    A gated MLP is down(activation(gate) * up), as in SwiGLU (Shazeer, arXiv 2002.05202); gate and up are one matrix product.
    """

    def __init__(
        self, name: str, model: ModelConfig, parallel: ParallelContext, residual_std: float, add_bias: bool = True
    ) -> None:
        """`add_bias`: False leaves the output's bias to the residual addition."""
        super().__init__()
        width, inner, bias, std = model.n_embd, model.ffn_hidden_size, model.mlp_bias, init_stds(model).hidden
        first, parts = ("gate_up", 2) if model.gated_mlp else ("up", 1)
        self.kernels = parallel.kernels
        fuse = parallel.kernels.compiled
        self.up = ColumnParallelLinear(
            f"{name}.{first}", width, parts * inner, parallel, std, bias, parts=parts, add_bias=not fuse
        )
        self.down = RowParallelLinear(f"{name}.down", inner, width, parallel, residual_std, bias, add_bias)
        self.dropout = ChannelDropout(model.mlp_pdrop, inner, parallel, name, "hidden")
        self.activation = (GATED_ACTIVATIONS if model.gated_mlp else ACTIVATIONS)[model.activation]

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        hidden = fused.activate(self.kernels, self.activation, self.up(x), self.up.pending_bias)
        return self.down(self.dropout(hidden, ctx))

    def flops_per_token(self) -> int:
        """Forward FLOPs of the unsharded matrix products for one token."""
        return self.up.flops_per_token() + self.down.flops_per_token()
