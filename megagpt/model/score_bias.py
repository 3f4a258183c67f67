"""What attention adds for the distance of query and key. A new kind is one class and a line in `BIASES`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import replicated_parameter, sharded_parameter


class ScoreBias(nn.Module):
    """Change scores and outputs of attention by the distances of queries and keys. This one changes nothing."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()

    def scores(self, query: Tensor, distances: Tensor) -> Tensor:
        """Return what is added to the scores, [batch or 1, heads of this rank, queries, keys].

        query: [batch, heads, queries, head size], already multiplied by the scale of the scores; distances: query minus key
        position, [queries, keys], negative for later keys, whose scores are hidden afterwards.
        """
        table = self.by_distance(distances.shape[1], distances.device)
        if table is None:
            return query.new_zeros(())
        # F.embedding's gradient has the same bits on every run.
        return F.embedding(distances.clamp(min=0), table.t()).movedim(-1, 0)

    def by_distance(self, length: int, device: torch.device) -> Tensor | None:
        """Return the bias of each head and distance, [heads of this rank, length], if it depends on nothing else."""
        return None

    def outputs(self, weights: Tensor, distances: Tensor) -> Tensor | None:
        """Return what is added to the outputs, [batch, heads, queries, head size]; weights: [batch, heads, queries, keys]."""
        return None

    def flops_per_token(self) -> int:
        """Forward FLOPs of matrix products for one token, of all heads."""
        return 0


class ALiBi(ScoreBias):
    """Subtract slope x distance; each head has its own fixed slope (Press et al., arXiv 2108.12409)."""

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__(name, model, parallel)
        self.heads = own_heads(model, parallel)
        self.slopes = alibi_slopes(model.n_head)

    def by_distance(self, length: int, device: torch.device) -> Tensor:
        slopes = torch.tensor(self.slopes[self.heads], device=device)
        return -slopes.unsqueeze(1) * torch.arange(length, device=device)


class RelativeBias(ScoreBias):
    """Add a learned number for each head and bucket of distances (T5, Raffel et al., arXiv 1910.10683, section 2.1).

    Half of the buckets are single distances, the other half grow to `relative_max_distance`. Each layer has its own numbers.
    """

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__(name, model, parallel)
        self.buckets = model.relative_buckets
        self.max_distance = model.relative_max_distance
        heads = own_heads(model, parallel)
        first = parallel.tp_rank * (model.n_head // parallel.tp_size)
        self.local_heads = slice(heads.start - first, heads.stop - first)  # the context ranks divide those of a tensor rank
        # Flat, [heads x buckets]: neither weight decay nor muP treats it as a matrix.
        self.weight = sharded_parameter(
            f"{name}.relative_bias.weight", (model.n_head * self.buckets,), 0, parallel, model.init_std
        )

    def by_distance(self, length: int, device: torch.device) -> Tensor:
        table = self.weight.view(-1, self.buckets)[self.local_heads]
        buckets = relative_buckets(torch.arange(length, device=device), self.buckets, self.max_distance)
        return F.embedding(buckets, table.t()).t()


class RelativeVectors(ScoreBias):
    """Add a learned vector of each distance to the keys, and another one to the values (Shaw et al., arXiv 1803.02155).

    All heads of a layer share the vectors; distances from `relative_max_distance` on share the last one.
    """

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__(name, model, parallel)
        self.last = model.relative_max_distance
        self.head_size = model.head_size
        self.n_head = model.n_head
        # Flat, [distances x head size]: neither weight decay nor muP treats it as a matrix.
        size = ((self.last + 1) * model.head_size,)
        self.key_weight = replicated_parameter(f"{name}.relative_keys.weight", size, parallel, model.init_std, own_heads=True)
        self.value_weight = replicated_parameter(
            f"{name}.relative_values.weight", size, parallel, model.init_std, own_heads=True
        )

    def scores(self, query: Tensor, distances: Tensor) -> Tensor:
        # One product for each distance, not one for each pair of positions.
        by_distance = query @ self._matrix(self.key_weight).t()  # [batch, heads, queries, distances]
        return by_distance.gather(3, self._columns(distances).expand(*query.shape[:3], -1))

    def by_distance(self, length: int, device: torch.device) -> Tensor | None:
        """Return the bias of each head and distance, [heads of this rank, length], if it depends on nothing else."""
        return None

    def outputs(self, weights: Tensor, distances: Tensor) -> Tensor:
        by_distance = weights.new_zeros(*weights.shape[:3], self.last + 1)
        by_distance = by_distance.scatter_add(3, self._columns(distances).expand_as(weights), weights)
        return by_distance @ self._matrix(self.value_weight)

    def flops_per_token(self) -> int:
        """Forward FLOPs of matrix products for one token, of all heads: queries and weights by the vectors."""
        return 2 * 2 * (self.last + 1) * self.n_head * self.head_size

    def _columns(self, distances: Tensor) -> Tensor:
        return distances.clamp(min=0, max=self.last)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.view(self.last + 1, self.head_size)


BIASES = {"alibi": ALiBi, "relative": RelativeBias, "relative_vectors": RelativeVectors}
"""`model.position_embedding` -> class; others do not act on scores by their distances."""


class Softmax(nn.Module):
    """Attention weights that sum to 1."""

    has_sinks = False

    def forward(self, scores: Tensor) -> Tensor:
        """Return the attention weights of scores [batch, heads, queries, keys]."""
        return F.softmax(scores, -1)

    def with_sinks(self, out: Tensor, log_sum: Tensor | None) -> Tensor:
        """Return the output of attention, [batch, heads, queries, head size], from the one with weights that sum to 1.

        `log_sum`: logarithm of the sum of exp(score) of each query, [batch, heads, queries]; None without sinks.
        """
        return out


class Sinks(Softmax):
    """A learned score of each head for a key without a value, so that a head can attend to nothing (arXiv 2309.17453)."""

    has_sinks = True

    def __init__(self, name: str, model: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        heads = own_heads(model, parallel)
        first = parallel.tp_rank * (model.n_head // parallel.tp_size)
        self.local_heads = slice(heads.start - first, heads.stop - first)
        self.weight = sharded_parameter(f"{name}.sinks.weight", (model.n_head,), 0, parallel, model.init_std)

    def forward(self, scores: Tensor) -> Tensor:
        sink = self.weight[self.local_heads].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return F.softmax(torch.cat((scores, sink), -1), -1)[..., :-1]

    def with_sinks(self, out: Tensor, log_sum: Tensor | None) -> Tensor:
        assert log_sum is not None
        # The weights are divided by exp(log_sum) + exp(sink) instead of exp(log_sum).
        share = torch.sigmoid(log_sum - self.weight[self.local_heads].view(1, -1, 1))
        return out * share.unsqueeze(-1).to(out.dtype)


def build_bias(name: str, model: ModelConfig, parallel: ParallelContext) -> ScoreBias:
    """Return the bias of the scores that the config names."""
    return BIASES.get(model.position_embedding, ScoreBias)(name, model, parallel)


def build_weighting(name: str, model: ModelConfig, parallel: ParallelContext) -> Softmax:
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
