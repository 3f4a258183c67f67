"""All gloo groups of a process share one network thread, and collectives have the results of torch's own backend."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool

from megagpt.distributed import shared_gloo


def n_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def threads_of_groups(backend: str | None) -> float:
    """Return how many threads a group of all ranks adds to this process."""
    before = n_threads()
    groups = [dist.new_group(backend=backend) for _ in range(6)]
    for group in groups:
        dist.all_reduce(torch.ones(4), group=group)
    return (n_threads() - before) / len(groups)


def test_a_group_adds_one_thread_where_torch_adds_three(ranks: Pool) -> None:
    assert max(ranks.run(2, threads_of_groups, None)) <= 1
    assert min(ranks.run(2, threads_of_groups, "gloo")) >= 2.5  # the naive way


def collectives() -> list[torch.Tensor]:
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    values = torch.arange(4.0) + 10 * rank
    total, copied = values.clone(), values.clone()
    dist.all_reduce(total)
    dist.broadcast(copied, 1)
    gathered = torch.empty(4 * n_ranks)
    dist.all_gather_into_tensor(gathered, values)
    share = torch.empty(2)
    dist.reduce_scatter_tensor(share, torch.arange(2.0 * n_ranks) + rank)
    exchanged = torch.empty(n_ranks)
    dist.all_to_all_single(exchanged, torch.arange(float(n_ranks)) + 10 * rank)
    received = torch.empty(4)
    works = [dist.isend(values, (rank + 1) % n_ranks), dist.irecv(received, (rank - 1) % n_ranks)]
    for work in works:
        assert work is not None
        work.wait()
    return [total, copied, gathered, share, exchanged, received]


def test_collectives_have_the_right_results(ranks: Pool) -> None:
    for rank, (total, copied, gathered, share, exchanged, received) in enumerate(ranks.run(4, collectives)):
        assert total.tolist() == [60, 64, 68, 72] and copied.tolist() == [10, 11, 12, 13]
        assert gathered.view(4, 4)[:, 0].tolist() == [0, 10, 20, 30]
        assert share.tolist() == [8 * rank + 6, 8 * rank + 10]
        assert exchanged.tolist() == [10 * sender + rank for sender in range(4)]
        assert received[0] == 10 * ((rank - 1) % 4)


def test_a_torch_that_cannot_share_the_thread_gets_its_own_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_gloo, "_REQUIRED", ("_devices", "_renamed"))
    assert shared_gloo.register() == "gloo"


def test_ranks_on_a_cpu_use_batch_scheduling(ranks: Pool) -> None:
    assert ranks.run(2, os.sched_getscheduler, 0) == [os.SCHED_BATCH] * 2
