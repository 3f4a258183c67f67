"""What a block keeps for its backward, in bytes, against Korthikanti et al., arXiv 2205.05198, section 4.

Counted by hooks on saved tensors, each storage once, weights left out, in bf16. s b h is the size of the residual
stream in numbers: sbh (34 + 5 a s / h) without recompute, 34 sbh with selective recompute, divided by t under
sequence parallelism. On top come the two numbers a token that each norm keeps.
"""

from typing import Any

import pytest
import torch
from support.pool import Pool
from support.runs import tiny_config

from megagpt.model.block import Block
from megagpt.model.gpt import MicroBatch, build_chunk
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parameter import ParallelContext
from megagpt.parallel.topology import Topology

BATCH, SEQ, HIDDEN, HEADS = 2, 64, 64, 4
NORMS = 2 * 2 * 4 / HIDDEN
"""Mean and deviation of two norms, in bytes for each number of the residual stream (fp32 at most)."""


def bytes_kept(recompute: str, dropout: float, tensor: int = 1) -> float:
    """By one block's forward, for each number of the residual stream; under `tensor` ranks with sequence parallelism."""
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
    tp = ParallelContext(DeferredGradients())
    if tensor > 1:
        topology = Topology.create(tensor, 1)
        tp = ParallelContext(DeferredGradients(), topology.tensor_group, topology.tp_rank, tensor, True)
    block = Block(0, config, tp).to(torch.bfloat16).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(saved: Any) -> Any:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = saved  # held, so that no other takes its place
        return saved

    x = torch.randn(BATCH, SEQ // tensor, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        block(x, 1)
    return sum(saved.untyped_storage().nbytes() for saved in kept.values()) / (BATCH * SEQ * HIDDEN)


def test_selective_recompute_keeps_34_bytes_for_each_number() -> None:
    assert bytes_kept("selective", 0.1) <= 34 + NORMS


def test_memory_efficient_attention_keeps_no_square_even_without_recompute() -> None:
    assert bytes_kept("none", 0.0) <= 34 + NORMS + 4 * HEADS / HIDDEN  # the log-sum-exp of each head and token
    assert bytes_kept("none", 0.0) < 34 + 5 * HEADS * SEQ / HIDDEN


@pytest.mark.parametrize("together, inputs", [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_full_recompute_keeps_one_input_for_each_group_of_blocks(together: int, inputs: int) -> None:
    config = tiny_config(training={"recompute": "full", "recompute_layers": together})
    chunk = build_chunk(config, ParallelContext(DeferredGradients()), range(1, 5)).train()
    chunk.is_last = False
    kept: dict[int, torch.Tensor] = {}
    x = torch.randn(2, 16, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.setdefault(saved.data_ptr(), saved), lambda saved: saved):
        chunk(x, MicroBatch(x, x))
    assert [tuple(saved.shape) for saved in kept.values()] == [(2, 16, 32)] * inputs


@pytest.mark.parametrize("tensor", [2, 4])
def test_sequence_parallelism_divides_by_the_tensor_size(tensor: int, ranks: Pool) -> None:
    for kept in ranks.run(tensor, bytes_kept, "selective", 0.1, tensor):
        assert kept <= (34 + NORMS) / tensor
