"""What attention adds for the distance of query and key, and sinks. A new bias is one class and a line in `BIASES`.

All parameters are read in a module's forward: ZeRO-3 has them only there.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import replicated_parameter, sharded_parameter


class ALiBi(nn.Module):
    """Subtract slope x distance; each head has its own fixed slope (Press et al., arXiv 2108.12409)."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.slopes = alibi_slopes(model.n_head)[own_heads(model, parallel)]

    def forward(self, length: int, device: torch.device) -> Tensor:
        """Return the bias of this rank's heads for distances below `length`, [heads, length]."""
        return -torch.tensor(self.slopes, device=device).unsqueeze(1) * torch.arange(length, device=device)


class _BucketTable(nn.Module):
    """A learned number for each head and bucket of distances (T5, Raffel et al., arXiv 1910.10683, section 2.1).

    Half of the buckets are single distances, the other half grow to `relative_max_distance`.
    """

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.buckets = model.relative_buckets
        self.max_distance = model.relative_max_distance
        self.heads = own_heads_of_shard(model, parallel)
        # Flat, [heads x buckets]: neither weight decay nor muP treats it as a matrix.
        self.weight = sharded_parameter(
            f"{name}.relative_bias.weight", (model.n_head * self.buckets,), 0, parallel, model.init_std
        )

    def _of_buckets(self, buckets: Tensor) -> Tensor:
        """Return the numbers of this rank's heads, [heads, ...], for bucket numbers of any shape."""
        table = self.weight.view(-1, self.buckets)[self.heads]
        return F.embedding(buckets, table.t()).movedim(-1, 0)  # the gradient of an embedding has the same bits on every run


class RelativeBias(_BucketTable):
    """Add the number of the distance's bucket; each layer has its own numbers."""

    def forward(self, length: int, device: torch.device) -> Tensor:
        """Return the bias of this rank's heads for distances below `length`, [heads, length]."""
        return self._of_buckets(relative_buckets(torch.arange(length, device=device), self.buckets, self.max_distance))


class SharedBias(_BucketTable):
    """T5's bias, which all layers of a stack share. One that looks both ways has half of the buckets for later keys."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext, both_ways: bool) -> None:
        """`both_ways`: whether queries attend to later keys, too."""
        super().__init__(name, model, parallel)
        self.both_ways = both_ways

    def forward(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Return the bias of this rank's heads, [1, heads, queries, keys]; the queries are the last positions of the keys."""
        distances = torch.arange(keys - queries, keys, device=device).unsqueeze(1) - torch.arange(keys, device=device)
        return self._of_buckets(self._bucket(distances)).unsqueeze(0)

    def _bucket(self, distances: Tensor) -> Tensor:
        if not self.both_ways:
            return relative_buckets(distances.clamp(min=0), self.buckets, self.max_distance)
        half = self.buckets // 2
        return relative_buckets(distances.abs(), half, self.max_distance) + half * (distances < 0)


BIASES = {"alibi": ALiBi, "relative": RelativeBias}
"""`model.position_embedding` -> class; others have no bias of the scores."""


class _Vectors(nn.Module):
    """A learned vector of each distance, shared by the heads; distances from `last` on share one."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.last = model.relative_max_distance
        self.head_size = model.head_size
        # Flat, [distances x head size]: neither weight decay nor muP treats it as a matrix.
        size = ((self.last + 1) * model.head_size,)
        self.weight = replicated_parameter(f"{name}.weight", size, parallel, model.init_std, own_heads=True)

    @property
    def matrix(self) -> Tensor:
        """The vectors, [distances, head size]."""
        return self.weight.view(self.last + 1, self.head_size)

    def columns(self, distances: Tensor, like: Tensor) -> Tensor:
        """Return the vector of each pair; distances: [queries, keys] -> [batch, heads, queries, keys]."""
        return distances.clamp(min=0, max=self.last).expand(*like.shape[:3], -1)


class KeyVectors(_Vectors):
    """Products of queries with the vectors that are added to keys (Shaw et al., arXiv 1803.02155, equation 4)."""

    def forward(self, query: Tensor, distances: Tensor) -> Tensor:
        """Return what is added to the scores. query: [batch, heads, queries, head size], scaled; distances: [queries, keys]."""
        by_distance = query @ self.matrix.t()  # one product for each distance, not one for each pair
        return by_distance.gather(3, self.columns(distances, query))


class ValueVectors(_Vectors):
    """Weighted sums of the vectors that are added to values (Shaw et al., arXiv 1803.02155, equation 3)."""

    def forward(self, weights: Tensor, distances: Tensor) -> Tensor:
        """Return what is added to the output. weights: [batch, heads, queries, keys]; distances: [queries, keys]."""
        by_distance = weights.new_zeros(*weights.shape[:3], self.last + 1)
        return by_distance.scatter_add(3, self.columns(distances, weights), weights) @ self.matrix


class Sinks(nn.Module):
    """A learned score of each head for a key without a value, so that a head can attend to nothing (arXiv 2309.17453)."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.heads = own_heads_of_shard(model, parallel)
        self.weight = sharded_parameter(f"{name}.sinks.weight", (model.n_head,), 0, parallel, model.init_std)

    def forward(self) -> Tensor:
        """Return the scores of this rank's heads, [heads]."""
        return self.weight[self.heads].clone()


def own_heads_of_shard(model: ModelConfig, parallel: ParallelContext) -> slice:
    """Return the heads whose scores this rank computes, counted from the first head of its tensor shard."""
    heads = own_heads(model, parallel)
    first = parallel.tp_rank * (model.n_head // parallel.tp_size)
    return slice(heads.start - first, heads.stop - first)


def own_heads(model: ModelConfig, parallel: ParallelContext) -> slice:
    """Return the heads whose scores this rank computes: the context ranks divide those of a tensor rank."""
    heads = model.n_head // parallel.tp_size // parallel.context.size
    first = (parallel.tp_rank * parallel.context.size + parallel.context.rank) * heads
    return slice(first, first + heads)


def alibi_slopes(heads: int) -> list[float]:
    """Return the slopes: a geometric sequence from 2^(-8 / heads), and for the heads beyond a power of two every second
    number of the sequence of twice as many heads."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    between = [2 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)]
    return first + between


def relative_buckets(distances: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Return the bucket of each distance (0 or more), int64."""
    single = buckets // 2
    share = torch.log(distances.float().clamp(min=1) / single) / math.log(max_distance / single)
    logarithmic = single + (share * (buckets - single)).to(torch.int64)
    return torch.where(distances < single, distances, logarithmic.clamp(max=buckets - 1))
