"""Layer normalisation (Ba et al., arXiv 1607.06450), replicated over tensor ranks."""

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.parallel.shard import TensorParallel, replicated_parameter


class LayerNorm(nn.Module):
    """Over the last dim of [batch, seq, hidden], or of this rank's part of the sequence."""

    def __init__(self, name: str, width: int, epsilon: float, tp: TensorParallel) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = replicated_parameter(f"{name}.weight", (width,), tp, mean=1.0)
        self.bias = replicated_parameter(f"{name}.bias", (width,), tp)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)
