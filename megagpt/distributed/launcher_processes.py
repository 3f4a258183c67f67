"""The launcher processes above this one, to notice when a launcher has ended and has left its ranks behind.

The kernel gives such a rank to another parent, and it would train on: `kill -9` of deepspeed does this. Shells, `nohup`,
`setsid` and terminals are no launchers: their end changes nothing. Without /proc, as on macOS, no launcher is found.
This module does not import torch.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PROGRAMS = frozenset(
    {
        *("deepspeed", "deepspeed.pt", "torchrun"),
        *("srun", "slurmstepd"),
        *("mpirun", "mpiexec", "orterun", "orted", "prterun", "prte", "prted"),  # Open MPI
        *(
            "mpiexec.hydra",
            "mpiexec.mpd",
            "hydra_pmi_proxy",
            "hydra_bstrap_proxy",
            "mpirun_rsh",
            "mpispawn",
        ),  # MPICH and others
        *("jsrun", "jsmd"),
    }
)
MODULES = frozenset(
    {"torch.distributed.run", "torch.distributed.launch", "deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}
)
"""Launchers that are started with `python -m`."""


class LauncherProcess(NamedTuple):
    """A process, identified for as long as the machine runs: the kernel gives a number again, but not with the same time."""

    pid: int
    start_time: int
    """Clock ticks since the machine started."""


ENDED = LauncherProcess(pid=0, start_time=0)
"""Stands for a launcher that had ended before it was looked for."""


class _Status(NamedTuple):
    state: str
    parent: int
    start_time: int


def launchers_above(pid: int, proc: Path = Path("/proc")) -> list[LauncherProcess]:
    """Return the launchers among the ancestors of a process, the nearest first."""
    found = []
    status = _status(pid, proc)
    while status is not None and status.parent > 1:
        pid = status.parent
        status, command = _status(pid, proc), _command(pid, proc)
        if status is not None and is_launcher(command):
            found.append(LauncherProcess(pid, status.start_time))
            # The first process adopts what another one has left behind.
            if status.parent == 1 and _is_started_by_deepspeed(command) and not _is_python(_command(1, proc)):
                found.append(ENDED)
    return found


def has_ended(process: LauncherProcess, proc: Path = Path("/proc")) -> bool:
    """Return whether the process has ended; also if its parent has not noticed yet."""
    status = _status(process.pid, proc)
    return status is None or status.start_time != process.start_time or status.state in "ZX"


def is_launcher(command: Sequence[str]) -> bool:
    """Return whether a command line is that of a launcher, either a program or a script or module of python."""
    if not command:
        return False
    if not _is_python(command):
        return _program(command) in PROGRAMS
    words = iter(command[1:])
    for word in words:
        if word == "-c":
            return False
        if word == "-m":
            return next(words, "") in MODULES
        if word in ("-X", "-W"):
            next(words, None)
        elif not word.startswith("-"):
            return Path(word).name in PROGRAMS
    return False


def _is_started_by_deepspeed(command: Sequence[str]) -> bool:
    """Return whether this is the second process of `deepspeed` on one node; other nodes get a --node_rank."""
    return "deepspeed.launcher.launch" in command and not any(word.startswith("--node_rank") for word in command)


def _is_python(command: Sequence[str]) -> bool:
    return bool(command) and _program(command).startswith("python")


def _program(command: Sequence[str]) -> str:
    return Path(command[0].split(":")[0]).name  # the title of slurmstepd is "slurmstepd: [JOB.STEP]"


def _status(pid: int, proc: Path) -> _Status | None:
    try:
        text = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in brackets before may have spaces
    return _Status(state=fields[0], parent=int(fields[1]), start_time=int(fields[19]))


def _command(pid: int, proc: Path) -> list[str]:
    try:
        text = (proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in text.rstrip(b"\0").split(b"\0")]
