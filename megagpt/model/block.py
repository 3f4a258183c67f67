"""One transformer block: attention and MLP as residual branches. Where the norms stand decides its class."""

from torch import Tensor, nn

from megagpt.config.schema import Config
from megagpt.model import fused
from megagpt.model.attention import CausalSelfAttention
from megagpt.model.dropout import ResidualDropout
from megagpt.model.forward_context import ForwardContext
from megagpt.model.init_scheme import init_stds
from megagpt.model.mlp import MLP
from megagpt.model.norm import build_add_norm, build_norm
from megagpt.parallel.parallel_context import ParallelContext


class _Block(nn.Module):
    """The two branches and their dropout. [batch, seq, hidden] -> [batch, seq, hidden], or this rank's positions of it."""

    def __init__(self, index: int, config: Config, parallel: ParallelContext, add_bias: bool) -> None:
        """`add_bias`: False leaves the output biases of the branches to the residual additions."""
        super().__init__()
        model, name = config.model, f"layers.{index}"
        residual_std = init_stds(model).residual
        recompute_core = config.training.recompute == "selective"
        self.attention = CausalSelfAttention(index, model, parallel, residual_std, recompute_core, add_bias)
        self.attention_dropout = ResidualDropout(model.resid_pdrop, parallel, index, "attention residual")
        self.mlp = MLP(f"{name}.mlp", model, parallel, residual_std, add_bias)
        self.mlp_dropout = ResidualDropout(model.resid_pdrop, parallel, index, "mlp residual")

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of the unsharded matrix products for one token, averaged over the sequence."""
        return self.attention.flops_per_token(sequence_length) + self.mlp.flops_per_token()


class PreNormBlock(_Block):
    """Norms at the inputs of both branches, the MLP after attention (GPT-2, LLaMA)."""

    def __init__(self, index: int, config: Config, parallel: ParallelContext) -> None:
        self_adds = not parallel.kernels.compiled
        super().__init__(index, config, parallel, add_bias=self_adds)
        self.kernels = parallel.kernels
        self.attention_norm = build_norm(f"layers.{index}.attention_norm", config.model, parallel)
        self.mlp_norm = build_add_norm(f"layers.{index}.mlp_norm", config.model, parallel)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        branch = self.attention(self.attention_norm(x), ctx)
        x, normed = self.mlp_norm(x, self.attention_dropout.branch(branch, self.attention.proj.pending_bias, ctx))
        branch = self.mlp(normed)
        return fused.add(self.kernels, x, self.mlp_dropout.branch(branch, self.mlp.down.pending_bias, ctx))


class Block(_Block):
    """Any placement of norms: at the inputs of the branches, at their outputs or both; branches in sequence or parallel."""

    def __init__(self, index: int, config: Config, parallel: ParallelContext) -> None:
        super().__init__(index, config, parallel, add_bias=True)
        model = config.model
        before, after = model.norm_placement != "after", model.norm_placement != "before"
        one_norm = model.parallel_branches == "one_norm"

        def norm(kind: str, present: bool) -> nn.Module:
            return build_norm(f"layers.{index}.{kind}", model, parallel) if present else nn.Identity()

        self.parallel_branches = model.parallel_branches != "no"
        self.attention_norm = norm("attention_norm", before)
        self.attention_output_norm = norm("attention_output_norm", after)
        self.mlp_norm = self.attention_norm if one_norm else norm("mlp_norm", before)
        self.mlp_output_norm = norm("mlp_output_norm", after)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        after_attention = x + self._attention_branch(x, ctx)
        return after_attention + self._mlp_branch(x if self.parallel_branches else after_attention, ctx)

    def _attention_branch(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return self.attention_dropout(self.attention_output_norm(self.attention(self.attention_norm(x), ctx)), ctx)

    def _mlp_branch(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return self.mlp_dropout(self.mlp_output_norm(self.mlp(self.mlp_norm(x))), ctx)


def build_block(index: int, config: Config, parallel: ParallelContext) -> PreNormBlock | Block:
    """Return the block that the config describes; `index`: layer number."""
    model = config.model
    is_pre_norm = model.norm_placement == "before" and model.parallel_branches == "no"
    return (PreNormBlock if is_pre_norm else Block)(index, config, parallel)
