"""Dropout masks that are pure functions of what they drop: no generator, no state, the same bits on every device.

A mask is a table. Its rows are tokens: run seed, number of the sample in the run, position in the sample. Its columns are
the hidden channels, or for attention weights each head's keys. Every site of the model has a table of its own. A rank
computes the entries that it needs, so the layout, the division into micro-batches, recomputation and a resume change
nothing.

An entry is a hash of the row's 64-bit key and the column number. Both hashes are of the well-known kind "xor with shifted
self, multiply by an odd constant": `_mix64` is the finalizer of MurmurHash3 (A. Appleby, public domain); `keep_mask` uses
the constants of lowbias32 (C. Wellons, hash-prospector, public domain) and adds half of the key between the two rounds.
"""

import torch
from torch import Tensor

_MIX64 = (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64)
_MIX32 = (0x7FEB352D, 0x846CA68B - 2**32)


def token_keys(seed: int, samples: Tensor, length: int) -> Tensor:
    """Return a random 64-bit key for every token of the samples.

    seed: any int64. samples: number of each sample in the run, [batch], int64. Returns int64, [batch, length].
    """
    sample_keys = _mix64(samples + seed)
    return _mix64(sample_keys.unsqueeze(1) + torch.arange(length, device=samples.device))


def keep_mask(keys: Tensor, columns: Tensor, probability: float) -> Tensor:
    """Return a mask that is False with `probability`, independently for each pair of a row and a column.

    keys: 64-bit keys of rows, int64. columns: column numbers, int32. Their shapes are broadcast to the shape of the mask.
    """
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)
    x = low ^ columns
    _xor_shifted(x, 16, bits=32).mul_(_MIX32[0])
    x.bitwise_xor_(high)
    _xor_shifted(x, 15, bits=32).mul_(_MIX32[1])
    # The last step of lowbias32 is left out: it only changes the low half, and the comparison needs the high bits.
    return x >= min(round(probability * 2**32), 2**32 - 1) - 2**31


def _mix64(x: Tensor) -> Tensor:
    x = _xor_shifted(x.clone(), 33, bits=64).mul_(_MIX64[0])
    x = _xor_shifted(x, 33, bits=64).mul_(_MIX64[1])
    return _xor_shifted(x, 33, bits=64)


def _xor_shifted(x: Tensor, shift: int, bits: int) -> Tensor:
    """Replace x by x ^ (x >> shift), in place. torch shifts in copies of the sign, so these are masked out."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (bits - shift)) - 1))
