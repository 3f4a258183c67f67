"""Create and destroy the default process group."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megagpt.distributed.launcher import Launcher

TIMEOUT = timedelta(minutes=30)
"""Time limit for all ranks to connect. The topology's groups use `parallel.timeout_seconds`."""


def init_process_group(launcher: Launcher, device: torch.device) -> dist.Store | None:
    """Connect the ranks: nccl on CUDA, gloo on CPU.

    Returns the store that the ranks connected through, or None for one process.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        share_cores(launcher.local_size if launcher.local_size > 1 else launcher.world_size)
        backend = "gloo"
    if launcher.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
        return None
    store, rank, world_size = next(rendezvous("env://", launcher.rank, launcher.world_size, timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    groups = dist.PrefixStore("groups", store)
    dist.init_process_group(backend, store=groups, rank=rank, world_size=world_size, timeout=TIMEOUT)
    return store


def destroy_process_group() -> None:
    """Close the process group at the end of a successful run."""
    dist.destroy_process_group()


def share_cores(processes: int) -> None:
    """Give each of `processes` on a machine without GPUs an equal number of CPU threads."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
