"""Layer normalisation (Ba et al., arXiv 1607.06450), replicated over the tensor ranks."""

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import replicated_parameter


class LayerNorm(nn.Module):
    """Normalise the last dim of [batch, seq, hidden], or of this rank's positions."""

    def __init__(self, name: str, width: int, epsilon: float, parallel: ParallelContext) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = replicated_parameter(f"{name}.weight", (width,), parallel, mean=1.0)
        self.bias = replicated_parameter(f"{name}.bias", (width,), parallel)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)
