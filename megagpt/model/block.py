"""One transformer block: attention and MLP as residual branches; where the norms stand is the config's choice."""

from torch import Tensor, nn

from megagpt.config.schema import Config
from megagpt.model.attention import CausalSelfAttention
from megagpt.model.dropout import ResidualDropout
from megagpt.model.forward_context import ForwardContext
from megagpt.model.init_scheme import init_stds
from megagpt.model.mlp import build_mlp
from megagpt.model.norm import build_norm
from megagpt.parallel.parallel_context import ParallelContext


class Block(nn.Module):
    """[batch, seq, hidden] -> [batch, seq, hidden] (this rank's positions under sequence or context parallelism)."""

    def __init__(self, index: int, config: Config, parallel: ParallelContext) -> None:
        super().__init__()
        model, name = config.model, f"layers.{index}"
        residual_std = init_stds(model).residual
        recompute_core = config.training.recompute == "selective"
        before, after = model.norm_placement != "after", model.norm_placement != "before"
        one_norm = model.parallel_branches == "one_norm"

        def norm(kind: str, present: bool) -> nn.Module:
            return build_norm(f"{name}.{kind}", model, parallel) if present else nn.Identity()

        self.parallel_branches = model.parallel_branches != "no"
        self.attention_norm = norm("attention_norm", before)
        self.attention = CausalSelfAttention(index, model, parallel, residual_std, recompute_core)
        self.attention_output_norm = norm("attention_output_norm", after)
        self.attention_dropout = ResidualDropout(model.resid_pdrop, parallel, index, "attention residual")
        self.mlp_norm = self.attention_norm if one_norm else norm("mlp_norm", before)
        self.mlp = build_mlp(f"{name}.mlp", model, parallel, residual_std)
        self.mlp_output_norm = norm("mlp_output_norm", after)
        self.mlp_dropout = ResidualDropout(model.resid_pdrop, parallel, index, "mlp residual")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        after_attention = x + self._attention_branch(x, ctx)
        return after_attention + self._mlp_branch(x if self.parallel_branches else after_attention, ctx)

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of the unsharded matrix products for one token, averaged over the sequence."""
        return self.attention.flops_per_token(sequence_length) + self.mlp.flops_per_token()

    def _attention_branch(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return self.attention_dropout(self.attention_output_norm(self.attention(self.attention_norm(x), ctx)), ctx)

    def _mlp_branch(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return self.mlp_dropout(self.mlp_output_norm(self.mlp(self.mlp_norm(x))), ctx)
