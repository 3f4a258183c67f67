"""Steps of a save or load that all ranks take or none."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megagpt.errors import CheckpointError

T = TypeVar("T")


def together(action: Callable[[], T], only_rank: int | None = None) -> T | None:
    """Run `action` on all ranks, or on one (None on the others), and raise its error on all if it failed on any.

    A rank that went on alone would wait for ever in the next collective. Raises CheckpointError with the first rank's reason.
    """
    result, problem = None, None
    if only_rank is None or dist.get_rank() == only_rank:
        try:
            result = action()
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = f"rank {dist.get_rank()}: {error}"
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    first = next((text for text in problems if text), None)
    if first:
        raise CheckpointError(first)
    return result
