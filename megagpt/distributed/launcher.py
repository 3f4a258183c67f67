"""This process's rank, world size and address, read from the variables that the launcher set.

Supported launchers: deepspeed, torchrun, mpirun and mpiexec (Open MPI, MPICH, Intel MPI, MVAPICH), jsrun, srun, and plain
python (one process). No other module reads these variables. This module does not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megagpt.errors import ConfigError

DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORT = 29500
"""Used by the ranks of one node if the launcher sets no address or port; deepspeed and torchrun have the same default."""
LARGEST_PORT = 65535
MAX_DIGITS = 9
"""Longer numbers are refused: no rank or port has that many digits."""


@dataclass(frozen=True)
class Launcher:
    """Rank, sizes and address that the launcher gave to this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank within the node."""
    local_size: int = 1
    """Number of ranks on the node; 1 if the launcher does not say."""
    address: str = DEFAULT_ADDRESS
    """Host of rank 0, to which all ranks connect."""
    port: int = DEFAULT_PORT
    port_option: str = "MASTER_PORT"
    """How a user chooses the port, for an error message."""
    hosts_store: bool = False
    """Whether the launcher itself serves the address and port (torchrun); otherwise rank 0 does."""
    attempt: int = 0
    """Number of times that the launcher has restarted the ranks (torchrun --max-restarts)."""


class _Variables(NamedTuple):
    """Names of the variables of one launcher."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_sizes: tuple[str, ...]


_TORCHRUN = _Variables("deepspeed or torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
_HYDRA = _Variables("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",))
_SLURM = _Variables("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ("SLURM_NTASKS_PER_NODE",))
_MPI = (
    *(
        _Variables(launcher, f"{prefix}_RANK", f"{prefix}_SIZE", f"{prefix}_LOCAL_RANK", (f"{prefix}_LOCAL_SIZE",))
        for launcher, prefix in (
            ("mpirun", "OMPI_COMM_WORLD"),  # Open MPI
            ("jsrun", "JSM_NAMESPACE"),
            ("mpirun", "MV2_COMM_WORLD"),  # MVAPICH2
        )
    ),
    _HYDRA,  # MPICH, Intel MPI
)


def read_launcher(environ: Mapping[str, str]) -> Launcher:
    """Read the variables of the innermost launcher; without any, the process runs alone.

    Order: RANK and WORLD_SIZE (deepspeed, torchrun), then those of MPI, then SLURM's. torchrun may run inside an srun step or
    under mpirun, and mpirun starts its own processes with srun inside a SLURM job, so the first one is the innermost.
    Raises ConfigError if variables are missing, are no numbers or contradict each other.
    """
    names = _choose(environ)
    if names is None:
        if "PMIX_RANK" in environ and "SLURM_NTASKS" not in environ:
            raise ConfigError(
                f"environment: PMIX_RANK is {environ['PMIX_RANK']!r}, but no variable gives the number of ranks; set RANK, "
                "WORLD_SIZE and LOCAL_RANK, or start with deepspeed, torchrun, srun or mpirun"
            )
        return Launcher()
    rank, world_size = _number(environ, names.rank), _number(environ, names.world_size)
    if rank is None or world_size is None:
        missing, other = (names.rank, names.world_size) if rank is None else (names.world_size, names.rank)
        raise ConfigError(
            f"environment: {missing} is not set, but {other} is; set both or neither, or start with deepspeed, torchrun, "
            "srun or mpirun"
        )
    if world_size == 0:
        raise ConfigError(f"environment: {names.world_size} is 0, expected at least 1")
    if rank >= world_size:
        raise ConfigError(
            f"environment: {names.rank} is {rank}, but {names.world_size} is {world_size}: expected 0 to {world_size - 1}"
        )
    local_size = next((size for name in names.local_sizes if (size := _number(environ, name)) is not None), None)
    local_rank = _local_rank(environ, names, world_size)
    _refuse_lone_ranks(environ, names, world_size)
    address, port = _address(environ, world_size, local_size == world_size or _one_slurm_node(environ, names))
    return Launcher(
        rank,
        world_size,
        local_rank,
        local_size or 1,
        address,
        port,
        port_option="--master_port" if names is _TORCHRUN else "MASTER_PORT",
        hosts_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and names is _TORCHRUN,
        attempt=_number(environ, "TORCHELASTIC_RESTART_COUNT") or 0 if names is _TORCHRUN else 0,
    )


def _choose(environ: Mapping[str, str]) -> _Variables | None:
    """Return the variables of the innermost launcher, or None."""
    # srun --mpi=pmi2 sets the variables of MPICH, too, but not the rank on the node.
    slurm_pmi = "MPI_LOCALRANKID" not in environ and all(
        environ.get(name) == environ.get(other, "")
        for name, other in ((_SLURM.rank, _HYDRA.rank), (_SLURM.world_size, _HYDRA.world_size))
    )
    for names in (_TORCHRUN, *_MPI):
        if (names.rank in environ or names.world_size in environ) and not (names is _HYDRA and slurm_pmi):
            return names
    # A shell in a SLURM job is no task of it, or the only one.
    return _SLURM if environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in environ else None


def _local_rank(environ: Mapping[str, str], names: _Variables, world_size: int) -> int:
    """Return the rank on the node. Raises ConfigError if several ranks of MPI could use the same GPU."""
    local_rank = _number(environ, names.local_rank)
    if local_rank is None:
        local_rank = _number(environ, "LOCAL_RANK")
    if local_rank is None and names in _MPI and world_size > 1:
        raise ConfigError(
            f"environment: {names.local_rank} is not set, but {names.rank} is; set LOCAL_RANK to each rank's number on its node"
        )
    return local_rank or 0


def _refuse_lone_ranks(environ: Mapping[str, str], names: _Variables, world_size: int) -> None:
    """Raise ConfigError if each of several processes has a world of its own, because WORLD_SIZE was set outside of mpirun.

    Not if torchrun or deepspeed has set it: each process of mpirun or srun may be such a launcher of an independent run.
    """
    if names is not _TORCHRUN or world_size > 1 or "TORCHELASTIC_RUN_ID" in environ or "CROSS_RANK" in environ:
        return
    for launcher, name in (*((other.launcher, other.world_size) for other in _MPI), ("srun", "SLURM_STEP_NUM_TASKS")):
        if environ.get(name, "1") != "1":
            raise ConfigError(
                f"environment: WORLD_SIZE is 1, but {launcher} has started more than one process ({name} is "
                f"{environ[name]!r}); unset RANK and WORLD_SIZE"
            )


def _one_slurm_node(environ: Mapping[str, str], names: _Variables) -> bool:
    return names is _SLURM and environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES")) == "1"


def _address(environ: Mapping[str, str], world_size: int, one_node: bool) -> tuple[str, int]:
    """Return the host and port that the ranks connect to. Raises ConfigError if several nodes have none."""
    if world_size == 1:
        return DEFAULT_ADDRESS, DEFAULT_PORT
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environ and not one_node:
            raise ConfigError(f"environment: {name} is not set: {world_size} ranks need one address to connect to")
    address, port = environ.get("MASTER_ADDR", DEFAULT_ADDRESS), environ.get("MASTER_PORT", str(DEFAULT_PORT))
    if not address.strip():
        raise ConfigError(f"environment: MASTER_ADDR is {address!r}, expected the host name of rank 0")
    if not _is_number(port) or not 1 <= int(port) <= LARGEST_PORT:
        raise ConfigError(f"environment: MASTER_PORT is {port!r}, expected a port from 1 to {LARGEST_PORT}")
    return address, int(port)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not _is_number(text):
        raise ConfigError(f"environment: {name} is {text!r}, expected a number")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS
