"""Random numbers that depend on what they are for, never on the layout or on what was drawn before.

Initial weights: drawn in fixed blocks along the dim that may be split, each block from a seed made of the run's
seed, the parameter's name and the block's number. A rank draws only the blocks it holds, and every layout
gets the same weights, bit for bit.

Dropout: the generator is set anew before each use from (run seed, step, micro-batch, layer, place). Resuming
needs no saved random state, and a recomputed forward finds its masks again.
"""

import hashlib

import torch
from torch import nn

from megagpt.parallel.shard import Shard, shard_of

_BLOCK = 64
"""Rows (or columns) drawn from one seed: small enough that a shard draws little it does not keep."""


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed that is the same on every machine and differs for any other `parts`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_dropout(*parts: int | str) -> None:
    """Set torch's default generators, which dropout draws from, for the place that `parts` name."""
    torch.manual_seed(stable_seed(*parts))


@torch.no_grad()
def initialize(parameter: nn.Parameter, seed: int) -> None:
    """Fill `parameter` with its part of the logical parameter's initial values (drawn on the CPU, in fp32)."""
    shard = shard_of(parameter)
    parameter.fill_(shard.mean)
    if shard.std == 0:
        return
    dim = shard.dim or 0
    stop = min(shard.start + parameter.shape[dim], shard.shape[dim])  # what lies beyond is padding
    for block in range(shard.start // _BLOCK, -(-stop // _BLOCK)):
        values = _draw_block(shard, dim, block, seed)
        first, last = max(block * _BLOCK, shard.start), min((block + 1) * _BLOCK, stop)
        part = values.narrow(dim, first - block * _BLOCK, last - first)
        parameter.narrow(dim, first - shard.start, last - first).copy_(part)
    if stop < shard.start + parameter.shape[dim]:
        kept = max(0, stop - shard.start)
        parameter.narrow(dim, kept, parameter.shape[dim] - kept).zero_()


def _draw_block(shard: Shard, dim: int, block: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(stable_seed(seed, shard.name, block))
    shape = (*shard.shape[:dim], _BLOCK, *shard.shape[dim + 1 :])
    return torch.empty(shape).normal_(shard.mean, shard.std, generator=generator)
