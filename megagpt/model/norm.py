"""Norms: LayerNorm, RMSNorm and Gemma's form of it. A new norm is one class and one line in `NORMS`."""

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import replicated_parameter


class LayerNorm(nn.Module):
    """Normalise the last dim of [batch, seq, hidden], or of this rank's positions (Ba et al., arXiv 1607.06450)."""

    def __init__(self, name: str, width: int, epsilon: float, parallel: ParallelContext, own_heads: bool = False) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = replicated_parameter(f"{name}.weight", (width,), parallel, mean=1.0, own_heads=own_heads)
        self.bias = replicated_parameter(f"{name}.bias", (width,), parallel, own_heads=own_heads)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class RMSNorm(nn.Module):
    """Divide the last dim by its root mean square, times a weight (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, name: str, width: int, epsilon: float, parallel: ParallelContext, own_heads: bool = False) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = replicated_parameter(f"{name}.weight", (width,), parallel, mean=1.0, own_heads=own_heads)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class RMSNormPlusOne(nn.Module):
    """RMSNorm with the weight stored as its difference from 1 (Gemma), so that weight decay pulls it towards 1."""

    def __init__(self, name: str, width: int, epsilon: float, parallel: ParallelContext, own_heads: bool = False) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = replicated_parameter(f"{name}.weight", (width,), parallel, own_heads=own_heads)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, self.epsilon)


NORMS: dict[str, type[LayerNorm] | type[RMSNorm] | type[RMSNormPlusOne]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "rmsnorm_plus_one": RMSNormPlusOne,
}
"""`model.norm` -> class. `own_heads`: each tensor rank applies the norm to its own heads."""


def build_norm(name: str, model: ModelConfig, parallel: ParallelContext) -> nn.Module:
    """Return a norm over the residual stream, of the kind that the config names."""
    return NORMS[model.norm](name, model.n_embd, model.layer_norm_epsilon, parallel)
