"""The exchange of positions for heads, compared with slices of the full tensor, and training over it with one process."""

import pytest
import torch
from support.pool import Pool
from support.runs import Tree, corpus, run_trainer, tiny_config

from megagpt.parallel.context_parallel import ContextParallel
from megagpt.parallel.topology import Topology


def exchange_and_return(size: int, heads: int) -> None:
    """On this rank: its positions of all heads become all positions of its heads, and the reverse; gradients too."""
    topology = Topology.create(1, 1, context=size)
    context = ContextParallel(topology.context_group, topology.cp_rank, size)
    full = torch.arange(2 * 8 * heads * 3, dtype=torch.float32).view(2, 8, heads, 3)
    upstream = full.flip(1)
    local = context.local_positions(full).clone().requires_grad_()
    own_heads = slice(topology.cp_rank * heads // size, (topology.cp_rank + 1) * heads // size)

    by_heads = context.heads_for_sequence(local)
    assert torch.equal(by_heads, full[:, :, own_heads])
    by_heads.backward(upstream[:, :, own_heads])
    assert torch.equal(local.grad, context.local_positions(upstream))

    leaf = by_heads.detach().requires_grad_()
    by_positions = context.sequence_for_heads(leaf)
    assert torch.equal(by_positions, context.local_positions(full))
    by_positions.backward(context.local_positions(upstream))
    assert torch.equal(leaf.grad, upstream[:, :, own_heads])


@pytest.mark.parametrize("size, heads", [(2, 4), (4, 4), (4, 8)])
def test_positions_become_heads_and_heads_positions_in_forward_and_backward(size: int, heads: int, ranks: Pool) -> None:
    ranks.run(size, exchange_and_return, size, heads)


def test_a_single_rank_exchanges_and_copies_nothing() -> None:
    x, single = torch.randn(2, 8, 4, 3), ContextParallel()
    assert single.heads_for_sequence(x) is x and single.sequence_for_heads(x) is x
    assert torch.equal(single.local_positions(x), x)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_ranges_of_the_ranks_are_consecutive_and_complete(size: int) -> None:
    tokens = torch.arange(3 * 16).view(3, 16)
    ranges = [ContextParallel(rank=rank, size=size).local_positions(tokens) for rank in range(size)]
    assert torch.equal(torch.cat(ranges, 1), tokens)
    assert {part.shape for part in ranges} == {(3, 16 // size)}


@pytest.mark.parametrize("data", [{}, {"reset_positions": True, "reset_attention": True, "mask_document_ends": True}])
def test_training_and_evaluation_see_the_same_samples_and_masks_as_one_process(data: Tree, ranks: Pool, tmp_path) -> None:
    prefix = corpus(tmp_path)

    def losses(world: int, **parallel: object) -> list[float]:
        config = tiny_config(
            data={"train": prefix, "valid": prefix, **data},
            training={"steps": 3, "micro_batch_size": 2, "global_batch_size": 8},
            evaluation={"interval": 3, "samples": 16},
            parallel=parallel,
            logging={"interval": 1, "metrics_file": str(tmp_path / f"{world}.jsonl")},
        )
        records = ranks.run(world, run_trainer, config)[0]["records"]
        return [value for record in records for key, value in record.items() if key.endswith("loss")]

    single = losses(1)
    assert len(single) == 4
    assert losses(4, context=2) == pytest.approx(single, rel=1e-5)
    assert losses(8, context=2, tensor=2, pipeline=2) == pytest.approx(single, rel=1e-5)
