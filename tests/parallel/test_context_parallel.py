"""The exchange of positions for heads against slices of the whole, and attention over it against one process."""

import pytest
import torch
from support.pool import Pool
from support.runs import Tree, corpus, run_trainer, tiny_config

from megagpt.parallel.context_parallel import ContextParallel
from megagpt.parallel.topology import Topology


def exchanged() -> None:
    """On every rank: this rank's positions of all heads become all positions of its heads, and back; gradients too."""
    topology = Topology.create(1, 1, context=4)
    context = ContextParallel(topology.context_group, topology.cp_rank, 4)
    whole = torch.arange(2 * 8 * 4 * 3, dtype=torch.float32).view(2, 8, 4, 3)
    mine = context.part(whole).clone().requires_grad_()
    heads = context.heads_for_sequence(mine)
    rank = topology.cp_rank
    assert torch.equal(heads, whole[:, :, rank : rank + 1])
    assert torch.equal(context.sequence_for_heads(heads), context.part(whole))
    (heads * whole[:, :, rank : rank + 1]).sum().backward()
    assert torch.equal(mine.grad, context.part(whole))
    context.sequence_for_heads(heads.detach().requires_grad_())


def test_positions_become_heads_and_heads_positions(ranks: Pool) -> None:
    ranks.run(4, exchanged)


def test_a_rank_alone_exchanges_nothing() -> None:
    x, alone = torch.randn(2, 8, 4, 3), ContextParallel()
    assert alone.heads_for_sequence(x) is x and alone.sequence_for_heads(x) is x and torch.equal(alone.part(x), x)


def test_context_groups_are_neighbours_among_the_data_ranks(ranks: Pool) -> None:
    found = ranks.run(8, places)
    assert [place[:2] for place in found] == [(0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (1, 1), (1, 1)]
    assert [place[2] for place in found] == [[0, 2], [1, 3]] * 2 + [[4, 6], [5, 7]] * 2


def places() -> tuple[int, int, list[int]]:
    """Which part of the batch, which part of the positions, and with whom."""
    topology = Topology.create(2, 1, context=2)
    return topology.dp_rank, topology.cp_rank, topology.layout.context_ranks(topology.rank)


@pytest.mark.parametrize("data", [{}, {"reset_positions": True, "reset_attention": True, "mask_document_ends": True}])
def test_the_real_loop_reads_and_masks_the_same_samples(data: Tree, ranks: Pool, tmp_path) -> None:
    prefix = corpus(tmp_path)

    def losses(world: int, **parallel: object) -> list[float]:
        config = tiny_config(
            data={"train": prefix, "valid": prefix, **data},
            training={"steps": 3, "micro_batch_size": 2, "global_batch_size": 8},
            evaluation={"interval": 3, "steps": 2},
            parallel=parallel,
            logging={"interval": 1, "metrics_file": str(tmp_path / f"{world}.jsonl")},
        )
        records = ranks.run(world, run_trainer, config)[0]["records"]
        return [value for record in records for key, value in record.items() if key.endswith("loss")]

    alone = losses(1)
    assert len(alone) == 4
    assert losses(4, context=2) == pytest.approx(alone, rel=1e-5)
    assert losses(8, context=2, tensor=2, pipeline=2) == pytest.approx(alone, rel=1e-5)
