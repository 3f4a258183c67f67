"""This process's rank and world size, read from the variables that the launcher set.

Supported launchers: deepspeed, torchrun, srun, and plain python (one process). No other module reads these variables.
This module does not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megagpt.errors import ConfigError


@dataclass(frozen=True)
class Launcher:
    """Rank and sizes that the launcher gave to this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank within the node."""
    local_size: int = 1
    """Number of ranks on the node."""


def read_launcher(environ: Mapping[str, str]) -> Launcher:
    """Read the variables of torchrun and deepspeed, or else those of SLURM; without any, the process runs alone.

    Raises ConfigError if some variables are set and others are missing.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in environ:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    else:
        return Launcher()
    rank, world, local_rank, local_size = (_number(environ, name) for name in names)
    if rank is None or world is None:
        missing = names[0] if rank is None else names[1]
        raise ConfigError(
            f"environment: {missing} is not set, but the launcher set others; start with deepspeed, torchrun or srun"
        )
    if world > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environ:
                raise ConfigError(f"environment: {name} is not set: {world} ranks need one address to connect to")
    return Launcher(rank, world, local_rank or 0, local_size or 1)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise ConfigError(f"environment: {name} is {text!r}, expected a number")
    return int(text)
