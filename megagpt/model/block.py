"""One transformer block: attention and MLP, each with a norm before it and a residual addition after it."""

from torch import Tensor, nn

from megagpt.config.schema import Config
from megagpt.model.attention import CausalSelfAttention
from megagpt.model.dropout import ResidualDropout
from megagpt.model.forward_context import ForwardContext
from megagpt.model.mlp import MLP
from megagpt.model.norm import LayerNorm
from megagpt.parallel.parallel_context import ParallelContext


class Block(nn.Module):
    """[batch, seq, hidden] -> [batch, seq, hidden] (this rank's positions under sequence or context parallelism)."""

    def __init__(self, index: int, config: Config, parallel: ParallelContext) -> None:
        super().__init__()
        model, name = config.model, f"layers.{index}"
        # GPT-2: scaled by depth, so that the variance of the residual stream does not grow with the number of layers.
        residual_std = model.init_std / (2 * model.n_layer) ** 0.5
        recompute_core = config.training.recompute == "selective"
        self.attention_norm = LayerNorm(f"{name}.attention_norm", model.n_embd, model.layer_norm_epsilon, parallel)
        self.attention = CausalSelfAttention(index, model, parallel, residual_std, recompute_core)
        self.attention_dropout = ResidualDropout(model.resid_pdrop, parallel, index, "attention residual")
        self.mlp_norm = LayerNorm(f"{name}.mlp_norm", model.n_embd, model.layer_norm_epsilon, parallel)
        self.mlp = MLP(f"{name}.mlp", model, parallel, residual_std)
        self.mlp_dropout = ResidualDropout(model.resid_pdrop, parallel, index, "mlp residual")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), ctx), ctx)
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)), ctx)

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of the unsharded matrix products for one token, averaged over the sequence."""
        return self.attention.flops_per_token(sequence_length) + self.mlp.flops_per_token()
