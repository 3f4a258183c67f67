"""What a run says beside its records: once, whatever the number of ranks."""

import sys

import torch.distributed as dist


def say(text: str) -> None:
    """On rank 0's standard output."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """On rank 0's standard error."""
    if dist.get_rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)
