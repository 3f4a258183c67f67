"""What attention scores and weighted values cost on one rank, in closed form. Does not import torch."""

from dataclasses import dataclass

from megagpt.planner.layer_sizes import EXPLICIT_PASSES, Sizes, is_explicit
from megagpt.planner.work import Work


@dataclass(frozen=True)
class Core:
    """Scores and weighted values of one layer, for a micro-batch."""

    sizes: Sizes
    """Of the layer whose queries these are."""
    seen: float
    """Keys whose scores are computed for a query, in the mean."""
    key_tokens: int
    """Tokens of the micro-batch that have keys, on this context rank."""
    is_explicit: bool
    """Whether the scores exist in memory."""
    saved: int
    """Bytes that the forward saves, the output included, without queries, keys and values."""
    biased: int = 0
    """Bytes of a trained bias of the scores, for all samples, that a fused kernel reads and whose gradient it writes."""

    @property
    def forward(self) -> Work:
        """The forward."""
        if self.is_explicit:
            return Work(flops=self._flops, loaded=self._operands, moved=EXPLICIT_PASSES[0] * self._scores, kernels=8)
        return Work(core_flops=self._flops, loaded=self._operands, moved=self.biased, kernels=1)

    @property
    def backward(self) -> Work:
        """The backward. A fused one computes the scores again: five products instead of two (arXiv 2205.14135)."""
        if self.is_explicit:
            moved = EXPLICIT_PASSES[1] * self._scores
            return Work(flops=2 * self._flops, loaded=2 * self._operands, moved=moved, kernels=8)
        # The gradient of a bias is written, and added to that of the other layers.
        moved = 4 * self.biased
        return Work(core_flops=2.5 * self._flops, loaded=3 * self._operands, moved=moved, kernels=2 + (moved > 0))

    @property
    def _flops(self) -> float:
        return 4 * self.seen * self.sizes.query * self.sizes.tokens

    @property
    def _operands(self) -> int:
        return 2 * (self.sizes.tokens * self.sizes.query + self.key_tokens * self.sizes.kv) * self.sizes.itemsize

    @property
    def _scores(self) -> float:
        return self.sizes.itemsize * self.sizes.heads * self.sizes.tokens * self.seen


def causal_core(sizes: Sizes, attended: int) -> Core:
    """Return the core of a decoder-only model, which only counts up to the diagonal. `attended`: the window, or all tokens."""
    seen = attended - attended * attended / (2 * sizes.length) if attended < sizes.length else attended / 2
    return Core(sizes, seen, sizes.tokens, is_explicit(sizes.model, sizes.compiled), _saved_by_causal_core(sizes))


def _saved_by_causal_core(sizes: Sizes) -> int:
    model, e, tokens = sizes.model, sizes.itemsize, sizes.tokens
    out = tokens * sizes.query * e
    if sizes.strategy.recompute == "selective":
        return out
    if is_explicit(model, sizes.compiled):
        scores = sizes.heads * tokens * (sizes.length + 256) // 2
        return out + scores * (2 * e + (e + 1 if model.attn_pdrop > 0 else 0))
    statistics = 4 * sizes.heads * tokens
    moved_out = model.position_embedding == "rotary" or model.qk_norm != "none" or sizes.strategy.context > 1
    return out + statistics + (out if moved_out else 0)
