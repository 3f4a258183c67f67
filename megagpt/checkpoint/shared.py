"""Whether all nodes write to one folder, found before the first step is paid for."""

import secrets
import time
from pathlib import Path

from megagpt.checkpoint.together import of_all, of_rank_0, together
from megagpt.errors import CheckpointError, listed
from megagpt.parallel.whereabouts import node_name

PATIENCE = 20.0
"""Seconds that a network file system may take to show one node what another wrote."""


def require_shared(directory: Path) -> None:
    """Raise CheckpointError where rank 0 cannot write in `directory`, or names the nodes that do not see what it wrote.

    Makes the folder (collective).
    """
    name = of_rank_0(f".seen-{secrets.token_hex(4)}")
    together(lambda: _write(directory / name), only_rank=0)
    seen = of_all((node_name(), _appears(directory / name)))
    together((directory / name).unlink, only_rank=0)
    blind = [node for node, sees in seen if not sees]
    if blind:
        raise CheckpointError(
            f"checkpoint.dir: {directory} on node {seen[0][0]} is not the same folder on {listed(dict.fromkeys(blind))}; "
            "name one on a file system that all nodes share"
        )


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("rank 0 was here\n", encoding="utf-8")


def _appears(path: Path) -> bool:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
