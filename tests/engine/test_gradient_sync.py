"""Sums of gradients outside of ZeRO: each gradient is summed over exactly the ranks that have a part of it.

The gradient of rank r is 2^r, so the binary digits of a sum show which ranks it contains.
"""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from support.exhaustive import more
from support.pool import Pool
from torch import nn

from megagpt.engine.gradient_sync import GradientSync, sum_gradients, sum_partial_gradients
from megagpt.parallel.parameter import Shard, set_shard, shard_of
from megagpt.parallel.topology import Layout, Topology
from megagpt.planner.collective_counter import CollectiveCounter

TIED = "embedding"


def parameter(name: str, partial: bool = False, trained: bool = True, shape: tuple[int, ...] = (3,)) -> nn.Parameter:
    """Return a parameter whose gradient is 2^rank."""
    value = nn.Parameter(torch.zeros(shape), requires_grad=trained)
    set_shard(value, Shard(name, shape, None, 0, 0.0, 0.0, partial_gradient=partial))
    if trained:
        value.grad = torch.full(shape, 2.0 ** dist.get_rank())
    return value


def chunk_of(*parameters: nn.Parameter) -> nn.Module:
    chunk = nn.Module()
    for index, value in enumerate(parameters):
        chunk.register_parameter(str(index), value)
    return chunk


def ranks_in(value: nn.Parameter | None) -> list[int]:
    """Return the ranks whose gradients are in the parameter's gradient."""
    assert value is not None and value.grad is not None and len(value.grad.unique()) == 1
    digits = int(value.grad.flatten()[0])
    return [rank for rank in range(dist.get_world_size()) if digits >> rank & 1]


Sums = dict[str, list[int]]


def sums_of_all(tensor: int, pipeline: int, zero_stage: int, rank_of_stage: Sequence[int]) -> tuple[Sums, Sums]:
    """Return the ranks in each gradient of this rank: after its stages are summed, and after the tied embedding is, too."""
    topology = Topology.create(tensor, pipeline)
    last = len(rank_of_stage) - 1
    chunks, named = {}, {}
    tied = parameter(TIED)  # one parameter if this rank has both ends
    for stage, owner in enumerate(rank_of_stage):
        if owner != topology.pp_rank:
            continue
        local = [parameter(f"{stage}.sharded"), parameter(f"{stage}.norm", partial=True), parameter("frozen", trained=False)]
        if stage in (0, last):
            local.append(tied)
        named |= {shard_of(value).name: value for value in local if value.requires_grad}
        chunks[stage] = chunk_of(*local)
    sync = GradientSync(chunks, rank_of_stage, topology, zero_stage, {TIED: [0, last]})
    for stage, chunk in chunks.items():
        summed, trained = sync.by_stage[stage], [p for p in chunk.parameters() if p.requires_grad and p is not tied]
        assert len(summed) == len(trained) == 2 and all(a is b for a, b in zip(summed, trained, strict=True))
        sync.sum(summed)
    stages = {name: ranks_in(value) for name, value in named.items()}
    sync.sum_shared()
    return stages, {name: ranks_in(value) for name, value in named.items()}


@pytest.mark.parametrize("zero_stage", [0, 1, *more(2)])
@pytest.mark.parametrize(
    "tensor, pipeline, rank_of_stage",
    [(2, 2, (0, 1)), (2, 2, (0, 1, 0, 1)), (2, 2, (0, 1, 1, 0)), (1, 4, (0, 1, 2, 3)), (4, 1, (0,)), (1, 1, (0,))],
)
def test_every_gradient_contains_the_ranks_that_have_a_part_of_it_once(
    tensor: int, pipeline: int, rank_of_stage: tuple[int, ...], zero_stage: int, ranks: Pool
) -> None:
    layout = Layout(tensor=tensor, pipeline=pipeline, data=8 // (tensor * pipeline))
    for rank, (stages, everything) in enumerate(ranks.run(8, sums_of_all, tensor, pipeline, zero_stage, rank_of_stage)):
        replicas = ("data", "context") if zero_stage == 0 else ()  # ZeRO sums over them itself
        expected = {
            "sharded": layout.ranks_along(rank, *replicas),
            "norm": layout.ranks_along(rank, "tensor", *replicas),
        }
        for name, summed in everything.items():
            if name != TIED:
                assert summed == stages[name] == expected[name.split(".")[1]], name
        if TIED in everything:
            assert stages[TIED] == [rank]  # it waits for the backwards of both ends
            ends = layout.ranks_along(rank, "pipeline")
            owners = sorted({rank_of_stage[0], rank_of_stage[-1]})
            with_ends = [ends[owner] for owner in owners]
            assert everything[TIED] == sorted({r for end in with_ends for r in layout.ranks_along(end, *replicas)})
        owns_end = layout.coordinates(rank).pipeline in (rank_of_stage[0], rank_of_stage[-1])
        assert (TIED in everything) == owns_end


def sums_partial_gradients() -> None:
    topology = Topology.create(2, 1)
    partial, full = parameter("norm", partial=True), parameter("sharded")
    sum_partial_gradients([partial, full], topology.tensor_group)
    assert ranks_in(partial) == topology.layout.ranks_along(topology.rank, "tensor")
    assert ranks_in(full) == [topology.rank]
    sum_partial_gradients([partial], None)
    assert ranks_in(partial) == topology.layout.ranks_along(topology.rank, "tensor")


def test_partial_gradients_are_summed_over_the_tensor_ranks_and_others_are_not(ranks: Pool) -> None:
    ranks.run(4, sums_partial_gradients)


def sums_without_a_gradient() -> None:
    topology = Topology.create(1, 1)
    trained, unused = parameter("a"), parameter("b")
    unused.grad = None
    storage = trained.grad.data_ptr()  # type: ignore[union-attr]
    sum_gradients([unused, trained], topology.dp_cp_group)
    assert unused.grad is None and ranks_in(trained) == [0, 1]
    assert trained.grad.data_ptr() == storage  # type: ignore[union-attr]
    sum_gradients([unused], topology.dp_cp_group)


def test_a_parameter_without_a_gradient_is_left_out_and_sums_are_in_place(ranks: Pool) -> None:
    ranks.run(2, sums_without_a_gradient)


def calls_of_sizes(sizes: Sequence[int]) -> tuple[int, list[list[int]]]:
    """Return the number of all-reduces for gradients of these sizes, and the ranks in each of them."""
    topology = Topology.create(1, 1)
    parameters = [parameter(str(index), shape=(size,)) for index, size in enumerate(sizes)]
    with CollectiveCounter(topology) as counter:
        sum_gradients(parameters, topology.dp_cp_group)
    return sum(counter.calls.values()), [ranks_in(value) for value in parameters]


@pytest.mark.parametrize("sizes, calls", [([5, 7, 9], 1), ([3, 2**24, 4], 2), ([], 0)])
def test_small_gradients_share_one_call_and_the_buffer_stays_small(sizes: list[int], calls: int, ranks: Pool) -> None:
    assert ranks.run(2, calls_of_sizes, sizes) == [(calls, [[0, 1]] * len(sizes))] * 2
