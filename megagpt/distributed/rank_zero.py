"""Print once per run, from rank 0. A job prints in `lossy_output`, so that output that cannot be written raises nothing."""

import torch.distributed as dist

from megagpt.output import note, warn


def rank_zero_print(text: str) -> None:
    """Print a line to standard output, on rank 0 only."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def rank_zero_note(text: str) -> None:
    """Print a line about the progress of something slow to standard error, on rank 0 only."""
    if dist.get_rank() == 0:
        note(text)


def rank_zero_warn(text: str) -> None:
    """Print a warning to standard error, on rank 0 only."""
    if dist.get_rank() == 0:
        warn(text)
