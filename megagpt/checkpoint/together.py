"""Steps of a save or load that all ranks take or none."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megagpt.errors import CheckpointError

T = TypeVar("T")


def of_all(value: T, group: ProcessGroup | None = None) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def of_rank_0(value: T | None) -> T:
    """Rank 0's value on every rank; the others give None."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def together(action: Callable[[], T], only_rank: int | None = None) -> T | None:
    """Run `action` on all ranks, or on one (None on the others), and raise its error on all if it failed on any.

    A rank that went on alone would wait for ever in the next collective. Raises CheckpointError with the first rank's reason.
    """
    result, problem = None, None
    if only_rank is None or dist.get_rank() == only_rank:
        result, problem = attempt(action)
    first = next((text for text in of_all(problem) if text), None)
    if first:
        raise CheckpointError(first)
    return result


def attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of `action`, or None and why there is none."""
    try:
        return action(), None
    except CheckpointError as error:
        return None, str(error)
    except OSError as error:
        return None, f"rank {dist.get_rank()}: {error}"
