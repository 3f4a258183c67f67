"""gloo for many ranks on few cores: all groups of a process share one network thread.

torch gives each gloo group a network thread that wakes 100 times a second, and two threads for its collectives. A rank has
about ten groups, so on a machine whose ranks share cores the threads take more time than the collectives.
The group of the checkpoint writer keeps threads of its own.
"""

from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import Backend, ProcessGroupGloo, Store

NAME = "shared_gloo"
_REQUIRED = ("_devices", "_threads", "_timeout")
"""Options of gloo that torch does not document."""


def register() -> str:
    """Register the backend with torch and return its name; "gloo" if the installed torch cannot share the thread."""
    if not all(hasattr(_options(), name) for name in _REQUIRED):
        return Backend.GLOO
    if NAME not in Backend.backend_list:
        Backend.register_backend(NAME, _create, devices="cpu")
    return NAME


def _create(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    options = _options()
    options._devices, options._threads, options._timeout = [_device()], 1, timeout
    return ProcessGroupGloo(store, rank, size, options)


def _options() -> Any:
    return getattr(ProcessGroupGloo, "_Options", lambda: None)()


@cache
def _device() -> Any:
    return ProcessGroupGloo.create_default_device()
