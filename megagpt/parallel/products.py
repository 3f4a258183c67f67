"""The matrix products of a linear layer with its input: in the type of the weights, or in 8 bits.

8 bits (Micikevicius et al., arXiv 2209.05433): inputs and weights in e4m3, gradients of outputs in e5m2, sums in fp32. Each row
of both factors has its own scale, which is found from its largest value at every use. The scales are powers of two. So a
layout that splits a row over tensor ranks gives its values the same bits, unless they are about 2^14 (e5m2: 2^30) times
smaller than the largest one: the losses depend on the layout by rounding only. The price is up to one bit of the range, which
is not precision. The product for the weight gradient stays in the type of the weights: it sums over tokens, so it would need
both factors quantized once more along the other dim, and its error would stay in the weights.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# The name is bound here because DeepSpeed's ZeRO-3 replaces the attribute of torch.nn.functional in the entire process, by
# a slower function that rounds twice in bf16.
from torch.nn.functional import linear as torch_linear

from megagpt.config.rules import FP8_MULTIPLE
from megagpt.errors import ConfigError
from megagpt.parallel.kernels import Kernels

FIRST_CAPABILITY = (9, 0)
"""CUDA compute capability of Hopper, the first with scales for each row."""


class Products(Protocol):
    """How a linear layer multiplies."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b. x: [..., in]; weight: [out, in]; bias: [out]; -> [..., out]"""

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Return grad W. grad: [..., out]; weight: [out, in]; -> [..., in]"""


class PlainProducts:
    """Products in the type of the factors."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b."""
        return torch_linear(x, weight, bias)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Return grad W."""
        return grad @ weight


class Fp8Products:
    """Products of factors that are rounded to 8 bits."""

    def __init__(self, kernels: Kernels) -> None:
        """`kernels`: runs the rounding, which is memory-bound."""
        self._kernels = kernels

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b, with x and W rounded to e4m3."""
        out = self._product(x, torch.float8_e4m3fn, weight)
        return out if bias is None else out + bias

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Return grad W, the gradient rounded to e5m2, whose range is larger, and the weight to e4m3."""
        return self._product(grad, torch.float8_e5m2, weight.t())

    def _product(self, left: Tensor, left_dtype: torch.dtype, right: Tensor) -> Tensor:
        """Return left right^T. left: [..., n]; right: [m, n]; -> [..., m] in the dtype of `left`"""
        rows, row_scales = self._kernels.run(quantize, left.flatten(0, -2), left_dtype)
        columns, column_scales = self._kernels.run(quantize, right, torch.float8_e4m3fn)
        n_rows = len(rows)
        n_padding = -n_rows % FP8_MULTIPLE  # the other sizes have a rule of the config
        if n_padding:
            rows, row_scales = F.pad(rows, (0, 0, 0, n_padding)), F.pad(row_scales, (0, 0, 0, n_padding), value=1.0)
        out = torch._scaled_mm(rows, columns.t(), scale_a=row_scales, scale_b=column_scales.t(), out_dtype=left.dtype)
        return out[:n_rows].view(*left.shape[:-1], -1)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x divided by a power of two for each row, in an 8-bit dtype, and those powers, fp32. [n, m] -> [n, m], [n, 1]

    The largest value of a row is then in the upper half of the dtype's range.
    """
    largest = x.abs().amax(1, keepdim=True).float()
    # For a row of zeros, or of numbers below 2^-100: a scale whose inverse is finite, too.
    exponent = torch.frexp(largest.clamp(min=2.0**-100) / torch.finfo(dtype).max).exponent
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return (x.float() / scale).to(dtype).contiguous(), scale


def require_fp8(device: torch.device) -> None:
    """Raise ConfigError if the device has no 8-bit matrix products. A CPU computes them slowly, for tests."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < FIRST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        needed = f"a GPU of NVIDIA with compute capability {FIRST_CAPABILITY[0]}.{FIRST_CAPABILITY[1]} (Hopper) or newer"
        raise ConfigError(f'training.precision: "fp8" needs {needed}, not {name}; use "bf16"')
