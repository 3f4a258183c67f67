"""Biases of attention scores that depend on the distance of query and key. A new one is one class and a line in `BIASES`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import sharded_parameter


class ALiBi(nn.Module):
    """Subtract slope x distance; each head has its own fixed slope (Press et al., arXiv 2108.12409)."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.heads = own_heads(model, parallel)
        self.slopes = alibi_slopes(model.n_head)

    def forward(self, distances: Tensor) -> Tensor:
        """Return the bias of this rank's heads, [heads, queries, keys]; `distances`: query minus key, [queries, keys]."""
        slopes = torch.tensor(self.slopes[self.heads], device=distances.device)
        return -slopes.view(-1, 1, 1) * distances.clamp(min=0)


class RelativeBias(nn.Module):
    """Add a learned number for each head and bucket of distances (T5, Raffel et al., arXiv 1910.10683, section 2.1).

    Half of the buckets are single distances, the other half grow to `relative_max_distance`. Each layer has its own numbers.
    """

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.buckets = model.relative_buckets
        self.max_distance = model.relative_max_distance
        heads = own_heads(model, parallel)
        first = parallel.tp_rank * (model.n_head // parallel.tp_size)
        self.local_heads = slice(heads.start - first, heads.stop - first)  # the context ranks divide those of a tensor rank
        # Flat, [heads x buckets]: neither weight decay nor muP treats it as a matrix.
        self.weight = sharded_parameter(
            f"{name}.relative_bias.weight", (model.n_head * self.buckets,), 0, parallel, model.init_std
        )

    def forward(self, distances: Tensor) -> Tensor:
        """Return the bias of this rank's heads, [heads, queries, keys]; `distances`: query minus key, [queries, keys]."""
        table = self.weight.view(-1, self.buckets)[self.local_heads]
        buckets = relative_buckets(distances.clamp(min=0), self.buckets, self.max_distance)
        return F.embedding(buckets, table.t()).movedim(-1, 0)  # its gradient has the same bits on every run


class NoBias(nn.Module):
    """Leave the scores as they are."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()


BIASES: dict[str, type[nn.Module]] = {"alibi": ALiBi, "relative": RelativeBias}
"""`model.position_embedding` -> class; others have no bias of the scores."""


class Sinks(nn.Module):
    """A learned score of each head for a key without a value, so that a head can attend to nothing (arXiv 2309.17453)."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        heads = own_heads(model, parallel)
        first = parallel.tp_rank * (model.n_head // parallel.tp_size)
        self.local_heads = slice(heads.start - first, heads.stop - first)
        self.weight = sharded_parameter(f"{name}.sinks.weight", (model.n_head,), 0, parallel, model.init_std)

    def forward(self, scores: Tensor) -> Tensor:
        """Return the attention weights of scores [batch, heads, queries, keys]; they sum to less than 1."""
        sink = self.weight[self.local_heads].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return F.softmax(torch.cat((scores, sink), -1), -1)[..., :-1]


class Softmax(nn.Module):
    """Attention weights without a sink."""

    def forward(self, scores: Tensor) -> Tensor:
        return F.softmax(scores, -1)


def build_bias(name: str, model: ModelConfig, parallel: ParallelContext) -> nn.Module:
    """Return the bias of the scores that the config names."""
    return BIASES.get(model.position_embedding, NoBias)(name, model, parallel)


def build_weighting(name: str, model: ModelConfig, parallel: ParallelContext) -> nn.Module:
    """Return what turns scores into attention weights."""
    return Sinks(name, model, parallel) if model.attention_sinks else Softmax()


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
