"""Print once per run, from rank 0."""

import sys

import torch.distributed as dist


def rank_zero_print(text: str) -> None:
    """Print a line to standard output, on rank 0 only."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def rank_zero_note(text: str) -> None:
    """Print a line about the progress of something slow to standard error, on rank 0 only."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def rank_zero_warn(text: str) -> None:
    """Print a warning to standard error, on rank 0 only."""
    if dist.get_rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)
