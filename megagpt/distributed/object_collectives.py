"""Collectives on Python objects, and a way to fail on all ranks when one rank fails."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megagpt.errors import MegagptError, StorageError

T = TypeVar("T")


def all_gather_object(value: T, group: ProcessGroup | None = None) -> list[T]:
    """Return every rank's value, ordered by rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: T | None) -> T:
    """Return rank 0's value on every rank; other ranks may pass None. Collective."""
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    result: T = values[0]
    return result


def run_on_ranks(action: Callable[[], T], only_rank: int | None = None) -> T | None:
    """Run `action` on all ranks, or on `only_rank`; if it fails on any rank, raise on every rank. Collective.

    Without this the ranks that did not fail would deadlock in the next collective.
    Returns None on ranks that did not run `action`. Raises the MegagptError of the first failed rank.
    """
    result, error = None, None
    if only_rank is None or dist.get_rank() == only_rank:
        result, error = attempt(action)
    first = next((other for other in all_gather_object(error) if other is not None), None)
    if first is not None:
        raise first
    return result


def attempt(action: Callable[[], T]) -> tuple[T | None, MegagptError | None]:
    """Run `action` and return (result, None), or (None, error) if it fails with a MegagptError or an OSError."""
    try:
        return action(), None
    except MegagptError as error:
        return None, error
    except OSError as error:
        return None, StorageError(f"rank {dist.get_rank()}: {error}")
