"""A process group of any size in one process, whose collectives do nothing: for dry runs of one rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed._tools import fake_collectives  # noqa: F401  # lets collectives run on the meta device
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Make this process rank `rank` of `world_size` inside the block. No process group may exist yet."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
