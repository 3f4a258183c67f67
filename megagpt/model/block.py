"""One transformer block: attention and MLP, each normalised before and added to the residual stream."""

import torch
from torch import Tensor, nn

from megagpt.config.schema import Config
from megagpt.model.attention import CausalSelfAttention, KVCache
from megagpt.model.mlp import MLP
from megagpt.model.norm import LayerNorm
from megagpt.parallel.random import seed_dropout
from megagpt.parallel.shard import TensorParallel


class Block(nn.Module):
    """[batch, seq, hidden] -> [batch, seq, hidden] (a part of the sequence under sequence parallelism)."""

    def __init__(self, index: int, config: Config, tp: TensorParallel) -> None:
        super().__init__()
        model, name = config.model, f"layers.{index}"
        residual_std = model.init_std / (2 * model.n_layer) ** 0.5  # GPT-2: the residual's variance stays put with depth
        self.index, self.tp, self.model = index, tp, model
        self.attention_norm = LayerNorm(f"{name}.attention_norm", model.n_embd, model.layer_norm_epsilon, tp)
        self.attention = CausalSelfAttention(
            f"{name}.attention", model, tp, residual_std, config.training.recompute == "selective"
        )
        self.mlp_norm = LayerNorm(f"{name}.mlp_norm", model.n_embd, model.layer_norm_epsilon, tp)
        self.mlp = MLP(f"{name}.mlp", model, tp, residual_std)

    def forward(self, x: Tensor, seed: int = 0, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """`seed`: of the micro-batch's dropout; `mask`: of its documents.

        Dropout is seeded inside, so that a second forward finds its masks without a saved random state.
        """
        if self.training and self.model.attn_pdrop > 0:  # every rank has other heads, and so other masks
            seed_dropout(seed, self.index, "attention", self.tp.rank, self.tp.context.rank)
        x = x + self._drop(self.attention(self.attention_norm(x), mask, cache), seed, "attention residual")
        return x + self._drop(self.mlp(self.mlp_norm(x)), seed, "mlp residual")

    def _drop(self, x: Tensor, seed: int, place: str) -> Tensor:
        return residual_dropout(x, self.model.resid_pdrop, self.training, self.tp, seed, self.index, place)


def residual_dropout(x: Tensor, p: float, training: bool, tp: TensorParallel, *place: int | str) -> Tensor:
    """Dropout on the residual stream: the same mask on every tensor rank where each holds all of it, other masks
    where each holds a part of the sequence."""
    if not training or p == 0:
        return x
    seed_dropout(*place, tp.rank if tp.sequence_parallel else 0, tp.context.rank)
    # Not F.dropout, which keeps its mask in the type of x on a CPU; this one keeps a byte for each number.
    return torch.native_dropout(x, p, True)[0]
