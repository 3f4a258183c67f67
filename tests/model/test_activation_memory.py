"""What a block saves for its backward, in bytes, compared with Korthikanti et al., arXiv 2205.05198, section 4.

Counted by hooks on saved tensors, each storage once, weights left out, in bf16. s b h is the number of elements of the
residual stream: sbh (34 + 5 a s / h) bytes without recomputation, 34 sbh with selective recomputation, divided by t under
sequence parallelism. In addition each norm saves two numbers per token.
"""

from typing import Any

import pytest
import torch
from support.pool import Pool
from support.runs import tiny_config

from megagpt.model.block import Block
from megagpt.model.chunk import build_chunk
from megagpt.model.dropout_masks import token_keys
from megagpt.model.forward_context import ForwardContext, MicroBatch
from megagpt.model.place import Place
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.topology import Topology

BATCH, SEQ, HIDDEN, HEADS = 2, 64, 64, 4
NORMS = 2 * 2 * 4 / HIDDEN
"""Mean and deviation of two norms, in bytes per element of the residual stream (fp32 at most)."""


def bytes_saved(recompute: str, dropout: float, tensor: int = 1) -> float:
    """Return the bytes that one block saves per element of the residual stream; sequence parallel on `tensor` ranks."""
    config = tiny_config(
        model={
            "n_embd": HIDDEN,
            "n_head": HEADS,
            "n_positions": SEQ,
            "embd_pdrop": dropout,
            "resid_pdrop": dropout,
            "attn_pdrop": dropout,
        },
        training={"recompute": recompute},
    )
    parallel = ParallelContext()
    if tensor > 1:
        parallel = ParallelContext.of(Topology.create(tensor, 1), True, DeferredGradients())
    block = Block(Place(0), config, parallel).to(torch.bfloat16).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    saved_tensors: dict[int, torch.Tensor] = {}

    def pack(saved: Any) -> Any:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            saved_tensors[storage.data_ptr()] = saved  # stays alive, so that no other tensor gets its address
        return saved

    x = torch.randn(BATCH, SEQ // tensor, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        block(x, ForwardContext(token_keys=token_keys(1, torch.arange(BATCH), SEQ)))
    return sum(saved.untyped_storage().nbytes() for saved in saved_tensors.values()) / (BATCH * SEQ * HIDDEN)


def test_selective_recompute_saves_34_bytes_per_element() -> None:
    assert bytes_saved("selective", 0.1) <= 34 + NORMS


def test_memory_efficient_attention_saves_no_square_even_without_recompute() -> None:
    assert bytes_saved("none", 0.0) <= 34 + NORMS + 4 * HEADS / HIDDEN  # the log-sum-exp of each head and token
    assert bytes_saved("none", 0.0) < 34 + 5 * HEADS * SEQ / HIDDEN


@pytest.mark.parametrize("group_size, inputs", [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_full_recompute_saves_one_input_per_group_of_blocks(group_size: int, inputs: int) -> None:
    config = tiny_config(model={"n_layer": 6}, training={"recompute": "full", "recompute_layers": group_size})
    chunk = build_chunk(config, ParallelContext(), range(1, 5)).train()
    saved_tensors: dict[int, torch.Tensor] = {}
    x = torch.randn(2, 16, 32, requires_grad=True)

    def pack(saved: torch.Tensor) -> torch.Tensor:
        return saved_tensors.setdefault(saved.data_ptr(), saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        chunk(x, MicroBatch(x, x))
    assert [tuple(saved.shape) for saved in saved_tensors.values()] == [(2, 16, 32)] * inputs


@pytest.mark.parametrize("tensor", [2, 4])
def test_sequence_parallelism_divides_the_bytes_by_the_tensor_size(tensor: int, ranks: Pool) -> None:
    for saved in ranks.run(tensor, bytes_saved, "selective", 0.1, tensor):
        assert saved <= (34 + NORMS) / tensor
