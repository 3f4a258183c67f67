"""Refuse to train if ranks differ in what must be equal: their code or their data."""

import hashlib
from pathlib import Path

from megagpt.distributed.object_collectives import all_gather_object
from megagpt.distributed.phase import host_name
from megagpt.errors import ConfigError, MegagptError, listed


def code_fingerprint(package: Path) -> str:
    """Return a hash of the names and contents of all Python files of a package."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()


def require_same_code(package: Path, versions: dict[str, str]) -> None:
    """Raise ConfigError, on every rank, if a rank runs another code or other libraries than rank 0. Collective.

    `package`: folder of the code; `versions`: library -> version.
    """
    require_same({"megagpt's code": code_fingerprint(package), **versions}, ConfigError, "install the same on all nodes")


def require_same(values: dict[str, str], error: type[MegagptError], advice: str) -> None:
    """Raise `error`, on every rank, if a value differs from rank 0's. Collective. `values`: name for messages -> value."""
    views = all_gather_object((host_name(), values))
    first_host, first = views[0]
    for name, value in first.items():
        others = [f"rank {rank} on {host}" for rank, (host, other) in enumerate(views) if other.get(name) != value]
        if others:
            raise error(f"{name} differs: rank 0 on {first_host} has another than {listed(others)}; {advice}")
