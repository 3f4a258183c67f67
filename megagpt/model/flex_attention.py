"""Attention on a GPU with masks, biases, caps or sinks, without a tensor of all pairs of positions.

torch's FlexAttention (Dong et al., arXiv 2412.05496) is compiled for the rule of this model, and skips the blocks of keys that
the mask hides. `ExplicitAttention` computes the same with its scores in memory; it is the reference on the CPU, where
FlexAttention has no backward.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask

from megagpt.errors import TrainingError
from megagpt.model.explicit_attention import ExplicitAttention
from megagpt.parallel.kernels import SHAPES_PER_FUNCTION, compile_errors

BLOCK = 128
"""Queries and keys of a block of the mask."""
DEVICES = ("cuda",)
"""Devices on which FlexAttention trains."""
SMALLEST_HEAD = 16
"""FlexAttention's kernels need heads of this size or more."""


def runs_flex_attention(explicit: ExplicitAttention, device: torch.device) -> bool:
    """Whether attention that scaled_dot_product_attention cannot do without a mask runs as FlexAttention."""
    return device.type in DEVICES and explicit.head_size >= SMALLEST_HEAD and not explicit.needs_weights


def block_mask(documents: Tensor | None, window: int | None, length: int, device: torch.device) -> BlockMask:
    """Return the mask of `attention_mask` as blocks: hidden, visible, or with a rule for each pair of positions.

    documents: index of each token's document, [batch, seq], which never falls; window: number of last tokens; None: all.
    Memory grows with the square of seq / 128.
    """
    first = torch.arange(0, length, BLOCK, device=device)  # of each block
    last = (first + BLOCK - 1).clamp(max=length - 1)
    queries, keys = first.unsqueeze(1), first.unsqueeze(0)  # [query blocks, key blocks] when combined
    last_queries, last_keys = last.unsqueeze(1), last.unsqueeze(0)
    visible, full = keys <= queries, keys < queries
    if window is not None:
        visible = visible & (queries - last_keys < window)
        full = full & (last_queries - keys < window)
    visible, full = visible.unsqueeze(0), full.unsqueeze(0)
    if documents is not None:
        starts, ends = documents[:, first], documents[:, last]  # [batch, blocks]
        visible = visible & (ends.unsqueeze(1) >= starts.unsqueeze(2))
        full = full & (starts.unsqueeze(1) == ends.unsqueeze(2))
    return BlockMask.from_kv_blocks(
        *_listed(visible & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_rule(documents, window),
        seq_lengths=(length, length),
    )


def attend(explicit: ExplicitAttention, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """Return what `explicit` would: scores capped and biased, with sinks. Shapes as in its forward.

    Raises TrainingError if the kernel cannot be compiled.
    """
    biases = None if explicit.bias is None else explicit.bias(key.shape[2], query.device)
    # torch 2.13 gives a tensor that the rule reads no gradient if it is a transposed view.
    rule = _score_rule(explicit.softcap, None if biases is None else biases.contiguous())
    grouped = key.shape[1] != query.shape[1]
    request = torch_flex.AuxRequest(lse=explicit.sinks is not None)
    try:
        out, aux = _compiled_attention()(
            query, key, value, rule, mask, scale=explicit.scale, enable_gqa=grouped, return_aux=request
        )
    except compile_errors() as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise TrainingError(
            f"attention with masks or biases cannot be compiled for this GPU: {reason}; set training.flex_attention=false to "
            "compute it with all scores in memory"
        ) from error
    if explicit.sinks is None:
        return cast(Tensor, out)
    # The weights are divided by exp(lse) + exp(sink) instead of exp(lse), the sum of exp(score).
    share = torch.sigmoid(aux.lse - explicit.sinks().view(1, -1, 1))
    return cast(Tensor, out * share.unsqueeze(-1).to(out.dtype))


@functools.cache
def _compiled_attention() -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES_PER_FUNCTION)
    return torch.compile(torch_flex.flex_attention, dynamic=False, fullgraph=True)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen key blocks of each query block, and their indices first. [batch, query, key blocks]"""
    chosen = blocks.unsqueeze(1).to(torch.int32)
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def _mask_rule(documents: Tensor | None, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return whether a query sees a key, by their positions."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = query >= key
        if window is not None:
            visible = visible & (query - key < window)
        if documents is not None:
            visible = visible & (documents[batch, query] == documents[batch, key])
        return visible

    return sees


def _score_rule(softcap: float | None, by_distance: Tensor | None) -> Callable[..., Tensor] | None:
    """Return the change of one score, as in `ExplicitAttention`; `by_distance`: [heads, distances]."""
    if softcap is None and by_distance is None:
        return None

    def change(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        if by_distance is not None:
            score = score + by_distance[head, (query - key).clamp(min=0)]
        return score

    return change
