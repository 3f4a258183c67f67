"""Token counts and losses are reduced to numbers that are bitwise equal on all ranks, with one read from the device."""

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from support.reads import HostReads
from support.runs import Tree

from megagpt.parallel.topology import Topology
from megagpt.training.metrics import LossMean, LossSummary, reduce_loss, sum_tokens

LAYOUTS: dict[str, tuple[int, Tree]] = {
    "1 process": (1, {}),
    "data 3": (3, {}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2 x data 2": (4, {"pipeline": 2}),
    "context 2 x data 2": (4, {"context": 2}),
    "tensor 2 x pipeline 2 x context 2": (8, {"tensor": 2, "pipeline": 2, "context": 2}),
}
CPU = torch.device("cpu")


def create(parallel: Tree) -> Topology:
    sizes = {"tensor": 1, "pipeline": 1, "context": 1, **parallel}
    return Topology.create(sizes["tensor"], sizes["pipeline"], context=sizes["context"])


def share(topology: Topology) -> int:
    """Return the tokens of this rank: different for each rank that has other samples or positions."""
    return 10 + topology.dp_cp_rank


def reduce_all(parallel: Tree, stopping_rank: int | None = None) -> tuple[float, int, LossSummary, int, int]:
    """Reduce this rank's tokens and a loss of 2.5 per token; return the results and the host's reads of each reduction."""
    topology = create(parallel)
    with HostReads() as token_reads:
        n_tokens = sum_tokens(share(topology), topology, CPU)
    on_last_stage = topology.pp_rank == topology.layout.pipeline - 1
    loss_sum = torch.tensor(2.5 * share(topology)) if on_last_stage else None
    with HostReads() as loss_reads:
        summary = reduce_loss(loss_sum, n_tokens, topology, CPU, topology.rank == stopping_rank)
    return float(n_tokens), topology.layout.dp_cp, summary, token_reads.count, loss_reads.count


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_gets_the_tokens_and_the_mean_loss_of_the_global_batch(name: str, ranks: Pool) -> None:
    world, parallel = LAYOUTS[name]
    results = ranks.run(world, reduce_all, parallel)
    for n_tokens, dp_cp_size, summary, *_ in results:
        assert n_tokens == sum(10 + rank for rank in range(dp_cp_size))
        assert summary.n_tokens == n_tokens and type(summary.n_tokens) is int
        assert summary.loss == pytest.approx(2.5, rel=1e-6)
        assert summary.loss == results[0][2].loss  # the same bits
        assert summary.stop_requested is False


def test_counting_tokens_reads_nothing_from_the_device_and_the_loss_is_one_read(ranks: Pool) -> None:
    for world, parallel in LAYOUTS.values():
        assert [reads for *_, reads, _ in ranks.run(world, reduce_all, parallel)] == [0] * world
        assert [reads for *_, reads in ranks.run(world, reduce_all, parallel)] == [1] * world


@pytest.mark.parametrize("stopping_rank", [0, 3])
def test_a_request_to_stop_reaches_all_ranks(stopping_rank: int, ranks: Pool) -> None:
    results = ranks.run(4, reduce_all, {"tensor": 2, "pipeline": 2}, stopping_rank)
    assert [summary.stop_requested for _, _, summary, *_ in results] == [True] * 4


def test_a_batch_without_tokens_has_loss_zero() -> None:
    summary = reduce_loss(torch.tensor(0.0), sum_tokens(0, Topology(), CPU), Topology(), CPU)
    assert summary == LossSummary(0.0, 0, False)


def test_a_nan_loss_stays_nan_on_all_ranks(ranks: Pool) -> None:
    assert all(loss != loss for loss in ranks.run(2, reduce_nan))


def reduce_nan() -> float:
    topology = create({})
    loss_sum = torch.tensor(float("nan") if topology.rank == 1 else 1.0)
    return reduce_loss(loss_sum, sum_tokens(1, topology, CPU), topology, CPU).loss


def test_large_counts_are_exact(ranks: Pool) -> None:
    """Also above 2**24, where fp32 is not."""
    assert ranks.run(2, count_many) == [2**26 + 1] * 2


def count_many() -> int:
    topology = create({})
    n_tokens = sum_tokens(2**25 + dist.get_rank(), topology, CPU)
    return reduce_loss(None, n_tokens, topology, CPU).n_tokens


def test_the_mean_loss_is_weighted_by_tokens_without_the_steps_that_were_skipped() -> None:
    losses = LossMean()
    for loss, n_tokens, skipped in ((2.0, 30, False), (float("nan"), 50, True), (9.0, 50, True), (4.0, 10, False)):
        losses.add(loss, n_tokens, skipped)
    assert (losses.mean, losses.skipped) == (2.5, 2)


def test_if_all_steps_were_skipped_the_loss_is_that_of_the_last_one() -> None:
    losses = LossMean()
    losses.add(3.0, 10, True)
    losses.add(5.0, 10, True)
    assert (losses.mean, losses.skipped) == (5.0, 2)
