"""Random numbers that depend on their purpose only, never on the layout or on earlier draws.

Initial weights: drawn in fixed blocks along the dim that may be split; each block has its own seed, made from the run's
seed, the parameter name and the block number. A rank draws only its own blocks, and every layout gets the same weights
bit for bit.

Dropout draws nothing: `megagpt/model/dropout_masks.py` computes its masks from keys made here.
"""

import hashlib

import torch
from torch import nn

from megagpt.parallel.parameter import Shard, shard_of

_BLOCK = 64
"""Entries along the split dim that share one seed: small, so that a shard draws little that it does not keep."""


def stable_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that is equal on every machine and different for different `parts`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def initialize(parameter: nn.Parameter, seed: int) -> None:
    """Fill `parameter` with its shard of the full parameter's initial values, drawn on the CPU in fp32."""
    shard = shard_of(parameter)
    parameter.fill_(shard.mean)
    if shard.std == 0:
        return
    dim = shard.init_dim if shard.dim is None else shard.dim
    end = shard.start + parameter.shape[dim]
    stop = max(shard.start, min(end, shard.shape[dim]))  # entries beyond are padding, maybe all of this rank
    for block in range(shard.start // _BLOCK, -(-stop // _BLOCK)):
        values = _draw_block(shard, dim, block, seed)
        first, last = max(block * _BLOCK, shard.start), min((block + 1) * _BLOCK, stop)
        local = values.narrow(dim, first - block * _BLOCK, last - first)
        parameter.narrow(dim, first - shard.start, last - first).copy_(local)
    parameter.narrow(dim, stop - shard.start, end - stop).zero_()


def _draw_block(shard: Shard, dim: int, block: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(stable_seed(seed, shard.name, block))
    shape = (*shard.shape[:dim], _BLOCK, *shard.shape[dim + 1 :])
    return torch.empty(shape).normal_(shard.mean, shard.std, generator=generator)
