"""One transformer block: attention and MLP as residual branches. Where the norms stand decides its class."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt.config.schema import Config, TrainingConfig
from megagpt.model import fused
from megagpt.model.attention import CausalSelfAttention, SelfAttention
from megagpt.model.dropout import ResidualDropout
from megagpt.model.forward_context import ForwardContext
from megagpt.model.init_scheme import init_stds
from megagpt.model.mlp import MLP
from megagpt.model.norm import build_add_norm, build_norm
from megagpt.model.place import Place
from megagpt.parallel.parallel_context import ParallelContext


class _Block(nn.Module):
    """The two branches and their dropout. [batch, seq, hidden] -> [batch, seq, hidden], or this rank's positions of it."""

    attention: SelfAttention

    def __init__(
        self,
        place: Place,
        config: Config,
        parallel: ParallelContext,
        add_bias: bool,
        attention: type[SelfAttention] = CausalSelfAttention,
    ) -> None:
        """`add_bias`: False leaves the output biases of the branches to the residual additions; `attention`: its class."""
        super().__init__()
        model = config.model
        residual_std = init_stds(model).residual
        recompute_core = config.training.recompute == "selective"
        self.attention = attention(place, model, parallel, residual_std, recompute_core, add_bias)
        self.attention_dropout = ResidualDropout(model.resid_pdrop, parallel, *place.site, "attention residual")
        self.mlp = MLP(f"{place.name}.mlp", model, parallel, residual_std, add_bias)
        self.mlp_dropout = ResidualDropout(model.resid_pdrop, parallel, *place.site, "mlp residual")

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward FLOPs of the unsharded matrix products for one token, averaged over the sequence."""
        return self.attention.flops_per_token(sequence_length) + self.mlp.flops_per_token()


class PreNormBlock(_Block):
    """Norms at the inputs of both branches, the MLP after attention (GPT-2, LLaMA)."""

    def __init__(
        self,
        place: Place,
        config: Config,
        parallel: ParallelContext,
        attention: type[SelfAttention] = CausalSelfAttention,
    ) -> None:
        """`attention`: the class of its self-attention."""
        self_adds = not parallel.kernels.compiled
        super().__init__(place, config, parallel, self_adds, attention)
        self.kernels = parallel.kernels
        self.attention_norm = build_norm(f"{place.name}.attention_norm", config.model, parallel)
        self.mlp_norm = build_add_norm(f"{place.name}.mlp_norm", config.model, parallel)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        branch = self.attention(self.attention_norm(x), ctx)
        x, normed = self.mlp_norm(x, self.attention_dropout.branch(branch, self.attention.proj.pending_bias, ctx))
        branch = self.mlp(normed, ctx)
        return fused.add(self.kernels, x, self.mlp_dropout.branch(branch, self.mlp.down.pending_bias, ctx))


class Block(_Block):
    """Any placement of norms: at the inputs of the branches, at their outputs or both; branches in sequence or parallel."""

    def __init__(self, place: Place, config: Config, parallel: ParallelContext) -> None:
        super().__init__(place, config, parallel, add_bias=True)
        model = config.model
        before, after = model.norm_placement != "after", model.norm_placement != "before"
        one_norm = model.parallel_branches == "one_norm"

        def norm(kind: str, present: bool) -> nn.Module:
            return build_norm(f"{place.name}.{kind}", model, parallel) if present else nn.Identity()

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
        return self.mlp_dropout(self.mlp_output_norm(self.mlp(self.mlp_norm(x), ctx)), ctx)


def build_block(index: int, config: Config, parallel: ParallelContext) -> PreNormBlock | Block:
    """Return the block that the config describes; `index`: layer number."""
    model = config.model
    is_pre_norm = model.norm_placement == "before" and model.parallel_branches == "no"
    return (PreNormBlock if is_pre_norm else Block)(Place(index), config, parallel)


def run_blocks(blocks: Sequence[nn.Module], x: Tensor, ctx: ForwardContext) -> Tensor:
    """Return the output of the blocks, one after the other."""
    for block in blocks:
        x = block(x, ctx)
    return x


def run_recomputed(blocks: Sequence[nn.Module], x: Tensor, ctx: ForwardContext, group_size: int) -> Tensor:
    """Save only the input of each group of blocks; the backward runs the group again. Dropout has no RNG state to save."""
    for first in range(0, len(blocks), group_size):
        group = blocks[first : first + group_size]
        x = checkpoint(run_blocks, group, x, ctx, use_reentrant=False, preserve_rng_state=False)
    return x


def run_stack(blocks: Sequence[nn.Module], x: Tensor, ctx: ForwardContext, training: TrainingConfig) -> Tensor:
    """Return the output of the blocks, which are recomputed in the backward if the config says so."""
    if training.recompute == "full" and torch.is_grad_enabled():
        return run_recomputed(blocks, x, ctx, training.recompute_layers)
    return run_blocks(blocks, x, ctx)
