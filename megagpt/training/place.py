"""Which process this is: read from what the launcher (deepspeed, torchrun, srun, a plain python) set.

The launcher's rank variables are read here and nowhere else. Needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megagpt.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """This process among all: what the launcher said."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1


def find_place(environ: Mapping[str, str]) -> Place:
    """Read torchrun's and deepspeed's variables, else SLURM's, else be alone. Raises ConfigError for a half-set environment."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in environ:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    else:
        return Place()
    rank, world, local_rank, local_size = (_number(environ, name) for name in names)
    if rank is None or world is None:
        missing = names[0] if rank is None else names[1]
        raise ConfigError(
            f"environment: {missing} is not set, though the launcher set others; start with deepspeed, torchrun or srun"
        )
    if world > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environ:
                raise ConfigError(f"environment: {name} is not set: {world} ranks need one address to meet at")
    return Place(rank, world, local_rank or 0, local_size or 1)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise ConfigError(f"environment: {name} is {text!r}, expected a number")
    return int(text)
