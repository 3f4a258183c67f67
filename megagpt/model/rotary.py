"""Rotary position embedding (Su et al., arXiv 2104.09864): each pair of a head's dims is rotated by position x frequency."""

import math

import torch
from torch import Tensor

from megagpt.config.schema import ModelConfig, RotaryConfig

RotaryTable = tuple[Tensor, Tensor]
"""Cosine and sine of each position and pair, [batch or 1, 1, seq, pairs], in fp32 or the dtype of the queries."""


def rotary_frequencies(rotary: RotaryConfig, head_size: int) -> tuple[Tensor, float]:
    """Return the angle per position of each pair, [pairs], and the factor of cosines and sines (1 except for yarn).

    Formulas: "linear" divides all frequencies by `factor`; "ntk" changes theta so that the lowest frequency is divided by it;
    "yarn" and "llama3" divide low frequencies only, with a ramp between.
    """
    pairs = rotated_dims(rotary, head_size) // 2
    exponents = torch.arange(pairs, dtype=torch.float64) / pairs
    theta = rotary.theta
    if rotary.scaling == "ntk":
        theta *= rotary.factor ** (pairs / max(pairs - 1, 1))
    frequencies = theta**-exponents
    if rotary.scaling == "linear":
        return (frequencies / rotary.factor).float(), 1.0
    if rotary.scaling == "llama3":
        return (frequencies * _llama3_factors(rotary, frequencies)).float(), 1.0
    if rotary.scaling == "yarn":
        factors = _yarn_factors(rotary, pairs)
        return (frequencies * factors).float(), 0.1 * math.log(rotary.factor) + 1.0
    return frequencies.float(), 1.0


def rotated_dims(rotary: RotaryConfig, head_size: int) -> int:
    """Return how many dims of each head are rotated: the first ones, an even number."""
    return int(head_size * rotary.fraction) // 2 * 2


def rotary_table(frequencies: Tensor, amplitude: float, positions: Tensor, dtype: torch.dtype) -> RotaryTable:
    """Return cosines and sines for `positions`, [seq] or [batch, seq]. Angles are computed in fp32."""
    angles = positions.float().unsqueeze(-1) * frequencies.to(positions.device)  # [(batch,) seq, pairs]
    angles = angles.view(-1, 1, *angles.shape[-2:])
    return (angles.cos() * amplitude).to(dtype), (angles.sin() * amplitude).to(dtype)


def rotary_table_of(model: ModelConfig, positions: Tensor, dtype: torch.dtype) -> RotaryTable | None:
    """Return the cosines and sines of `positions`, [seq] or [batch, seq]; None without rotary embeddings."""
    if model.position_embedding != "rotary":
        return None
    frequencies, amplitude = rotary_frequencies(model.rotary, model.head_size)
    return rotary_table(frequencies, amplitude, positions, dtype)


def rotate(x: Tensor, table: RotaryTable, interleaved: bool) -> Tensor:
    """Rotate the first dims of each head. x: [batch, heads, seq, head size]."""
    cosine, sine = table
    n_rotated = 2 * cosine.shape[-1]
    rotated, rest = x[..., :n_rotated], x[..., n_rotated:]
    if interleaved:
        first, second = rotated.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = rotated.chunk(2, -1)
    pair = (first * cosine - second * sine, second * cosine + first * sine)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out


def _llama3_factors(rotary: RotaryConfig, frequencies: Tensor) -> Tensor:
    """Return 1 for short wavelengths, 1 / factor for long ones, and a linear ramp in the wavelength's inverse between."""
    assert rotary.original_positions is not None
    rotations = rotary.original_positions * frequencies / (2 * math.pi)  # over the original sequence length
    low, high = rotary.low_freq_factor, rotary.high_freq_factor
    smooth = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) / rotary.factor + smooth


def _yarn_factors(rotary: RotaryConfig, pairs: int) -> Tensor:
    """Return 1 for fast dims, 1 / factor for slow ones, and a linear ramp over the dims between."""
    original = rotary.original_positions
    assert original is not None

    def pair_with(rotations: float) -> float:
        return pairs * math.log(original / (rotations * 2 * math.pi)) / math.log(rotary.theta)

    low = max(math.floor(pair_with(rotary.beta_fast)), 0)
    high = min(math.ceil(pair_with(rotary.beta_slow)), 2 * pairs - 1)
    ramp = ((torch.arange(pairs, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return ramp / rotary.factor + (1 - ramp)
