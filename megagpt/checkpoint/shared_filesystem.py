"""Check before the first step that all nodes write to the same folder."""

import secrets
import time
from pathlib import Path

from megagpt.distributed.object_collectives import all_gather_object, broadcast_object, run_on_ranks
from megagpt.distributed.phase import host_name
from megagpt.errors import CheckpointError, StorageError, listed

MAX_DELAY = 20.0
"""Seconds that a network file system may need to show one node what another node wrote."""


def require_shared(directory: Path, max_delay: float = MAX_DELAY) -> None:
    """Create `directory`, and raise CheckpointError if rank 0 cannot write to it or other nodes do not see it. Collective.

    `max_delay`: seconds that each rank waits for a file that rank 0 wrote. The error names the nodes that do not see it.
    """
    probe = directory / broadcast_object(f".seen-{secrets.token_hex(4)}")
    run_on_ranks(lambda: _write(probe), only_rank=0)
    views = all_gather_object((host_name(), _appears(probe, max_delay)))
    run_on_ranks(probe.unlink, only_rank=0)
    other_nodes = [node for node, sees_probe in views if not sees_probe]
    if other_nodes:
        raise CheckpointError(
            f"checkpoint.dir: {directory} on node {views[0][0]} is not the same folder on "
            f"{listed(dict.fromkeys(other_nodes))}; set a folder on a file system that all nodes share"
        )


def _write(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("written by rank 0\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"checkpoint.dir: {path.parent} cannot be written: {error.strerror}; set another folder") from None


def _appears(path: Path, max_delay: float) -> bool:
    """Return whether the file exists within `max_delay` seconds."""
    end = time.monotonic() + max_delay
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
