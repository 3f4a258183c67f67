"""The device and the memory of a command that runs in one process."""

import re
from pathlib import Path

import torch

from megagpt.errors import ConfigError

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Memory limit of a container, in bytes or "max"."""


def select_device(name: str) -> torch.device:
    """Return the device of --device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises ConfigError for another name, and for a GPU that this machine does not have.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", name):
        raise ConfigError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and n_gpus == 0):
        return torch.device("cpu")
    number = int(name.partition(":")[2] or 0)
    if number >= n_gpus:
        available = f"cuda:0 to cuda:{n_gpus - 1}" if n_gpus else "no GPU that torch can use; take cpu"
        raise ConfigError(f"--device {name}: this machine has {available}")
    return torch.device("cuda", number)


def require_memory(purpose: str, needed: int, device: torch.device, advice: str) -> None:
    """Raise ConfigError, with both numbers, if the device has less free memory than `needed` bytes.

    `purpose` starts the message; `advice` ends it and says what the user can do.
    """
    available = available_memory(device)
    if available is not None and needed > available:
        place = "this machine" if device.type == "cpu" else str(device)
        raise ConfigError(
            f"{purpose}: needs {needed / 1e9:,.1f} GB of memory, and {place} has {available / 1e9:,.1f} GB free; {advice}"
        )


def available_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes, or None if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        reported = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    if reported is None:
        return None
    free = int(reported[1]) * 1024
    try:
        return min(free, int(_CGROUP_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no limit
        return free
