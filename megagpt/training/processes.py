"""The process group: opened once, handed to DeepSpeed, shared cores on machines without GPUs."""

import os
import warnings
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed.rendezvous import rendezvous

from megagpt.training.place import Place


def start(place: Place) -> tuple[torch.device, dist.Store | None]:
    """Open the process group (nccl on CUDA, else gloo) and DeepSpeed's view of it.

    Returns this rank's device, and the store where the ranks met (None for one process).
    """
    cuda = get_accelerator().device_name() == "cuda"
    timeout = timedelta(minutes=30)  # to meet; the groups of the topology have the config's
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        share_cores(place.local_size if place.local_size > 1 else place.world_size)
    backend = "nccl" if cuda else "gloo"
    # DeepSpeed reads these itself, whoever started the rank.
    os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size), "LOCAL_RANK": str(place.local_rank)}
    if place.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        store = None
    else:
        store, rank, world_size = next(rendezvous("env://", place.rank, place.world_size, timeout=timeout))
        store.set_timeout(timeout)
        groups = dist.PrefixStore("groups", store)
        dist.init_process_group(backend, store=groups, rank=rank, world_size=world_size, timeout=timeout)
    join_deepspeed(backend, timeout)
    return device, store


def stop() -> None:
    """Close the process group, at the end of a run that went well."""
    deepspeed.comm.destroy_process_group()


def join_deepspeed(backend: str, timeout: timedelta) -> None:
    """Let DeepSpeed use the process group that is open."""
    # Its shared-memory operator serves inference alone; refusing it saves a compile, and the need for a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 replaced, at every step.
    warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)", FutureWarning)
    deepspeed.init_distributed(backend, timeout=timeout, dist_init_required=False, auto_mpi_discovery=False)


def share_cores(processes: int) -> None:
    """Give each of the processes on a machine without GPUs its share of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
