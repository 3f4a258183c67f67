"""Norms: LayerNorm, RMSNorm and Gemma's form of it. A new norm is one function and one line in `NORMS`."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.model import fused
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import replicated_parameter


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Subtract the mean of the last dim and divide by its standard deviation (Ba et al., arXiv 1607.06450)."""
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Divide the last dim by its root mean square, times a weight (Zhang and Sennrich, arXiv 1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def rms_norm_plus_one(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """RMSNorm with the weight stored as its difference from 1 (Gemma), so that weight decay pulls it towards 1."""
    return F.rms_norm(x, weight.shape, 1 + weight, epsilon)


class NormKind(NamedTuple):
    """A kind of norm: what it computes, and its parameters."""

    function: fused.NormFunction
    initial_weight: float
    has_bias: bool


NORMS = {
    "layernorm": NormKind(layer_norm, 1.0, has_bias=True),
    "rmsnorm": NormKind(rms_norm, 1.0, has_bias=False),
    "rmsnorm_plus_one": NormKind(rms_norm_plus_one, 0.0, has_bias=False),
}
"""`model.norm` -> kind."""


class Norm(nn.Module):
    """Normalise the last dim of [batch, seq, hidden], or of this rank's positions or heads."""

    def __init__(self, name: str, model: ModelConfig, width: int, parallel: ParallelContext, own_heads: bool = False) -> None:
        """`own_heads`: each tensor rank applies the norm to its own heads."""
        super().__init__()
        kind = NORMS[model.norm]
        self.function = kind.function
        self.epsilon = model.layer_norm_epsilon
        self.kernels = parallel.kernels
        mean = kind.initial_weight
        self.weight = replicated_parameter(f"{name}.weight", (width,), parallel, mean=mean, own_heads=own_heads)
        self.bias = replicated_parameter(f"{name}.bias", (width,), parallel, own_heads=own_heads) if kind.has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return fused.norm(self.kernels, x, self.norm)

    @property
    def norm(self) -> fused.NormOf:
        """The function with its parameters."""
        return fused.NormOf(self.function, self.weight, self.bias, self.epsilon)


class AddNorm(Norm):
    """Add a residual branch and normalise the sum: both are returned."""

    def forward(self, x: Tensor, branch: fused.Branch) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return fused.add_norm(self.kernels, x, branch, self.norm)


def build_norm(name: str, model: ModelConfig, parallel: ParallelContext) -> Norm:
    """Return a norm over the residual stream, of the kind that the config names."""
    return Norm(name, model, model.n_embd, parallel)


def build_add_norm(name: str, model: ModelConfig, parallel: ParallelContext) -> AddNorm:
    """Return a norm over the residual stream that adds a branch first."""
    return AddNorm(name, model, model.n_embd, parallel)
