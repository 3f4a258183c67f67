"""Create and destroy the default process group."""

import os

import torch
import torch.distributed as dist

from megagpt.distributed import shared_gloo
from megagpt.distributed.launcher import Launcher
from megagpt.distributed.rendezvous import TIMEOUT, meet

__all__ = ["TIMEOUT", "destroy_process_group", "init_process_group", "share_cores", "use_batch_scheduling"]


def init_process_group(launcher: Launcher, device: torch.device) -> dist.Store | None:
    """Connect the ranks: nccl on CUDA, gloo on CPU.

    Returns the store that the ranks connected through, or None for one process.
    Raises ConfigError if they cannot connect, and ReportedError if rank 0 refuses to start.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        share_cores(launcher.local_size if launcher.local_size > 1 else launcher.world_size)
        use_batch_scheduling()
        backend = shared_gloo.register()
    if launcher.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
        return None
    store = meet(launcher)
    groups = dist.PrefixStore("groups", store)
    dist.init_process_group(backend, store=groups, rank=launcher.rank, world_size=launcher.world_size, timeout=TIMEOUT)
    return store


def destroy_process_group() -> None:
    """Close the process group at the end of a successful run."""
    dist.destroy_process_group()


def share_cores(processes: int) -> None:
    """Give each of `processes` on a machine without GPUs an equal number of CPU threads."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def use_batch_scheduling() -> None:
    """Ask Linux not to interrupt a rank that computes when another rank on its core receives a message.

    Collectives of ranks that share cores take a third of the time (8 ranks on 2 cores).
    """
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
