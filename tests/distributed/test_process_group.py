"""The default process group: its backend, its store, and the CPU threads of each rank."""

import multiprocessing as mp
import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.job import free_port
from support.pool import PRELOAD

from megagpt.distributed.launcher import Launcher
from megagpt.distributed.process_group import destroy_process_group, init_process_group, share_cores


def connect(path: list[str], rank: int, world_size: int, port: int, results: Any) -> None:
    """Run in the process of a rank: sum the ranks, and read what rank 0 wrote to the store."""
    sys.path[:] = path
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    store = init_process_group(Launcher(rank, world_size, rank, world_size), torch.device("cpu"))
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    greeting = None
    if store is not None:
        if rank == 0:
            store.set("greeting", "hello")
        greeting = store.get("greeting").decode()
    dist.barrier()  # rank 0 hosts the store: it must not leave first
    results.put((rank, dist.get_backend(), int(total), greeting, torch.get_num_threads()))
    destroy_process_group()
    assert not dist.is_initialized()


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_connect_and_share_a_store(world_size: int) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=connect, args=(list(sys.path), rank, world_size, port, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    outcomes = sorted(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    total, threads = sum(range(1, world_size + 1)), max(1, (os.cpu_count() or 1) // world_size)
    greeting = "hello" if world_size > 1 else None
    assert outcomes == [(rank, "shared_gloo", total, greeting, threads) for rank in range(world_size)]


def test_the_cores_are_divided_among_the_processes_and_each_has_at_least_one() -> None:
    cores, before = os.cpu_count() or 1, torch.get_num_threads()
    try:
        for processes, threads in ((1, cores), (cores, 1), (10 * cores, 1)):
            share_cores(processes)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
