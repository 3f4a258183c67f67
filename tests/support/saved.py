"""A small real checkpoint for tests, and ways to alter one so that its checksums fit again."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from support.pool import Pool
from support.runs import Tree, corpus, run_trainer, tiny_config


def save_small(ranks: Pool, folder: Path) -> list[Tree]:
    """Two steps over tensor 2 x data 2 under ZeRO-1, saved in `folder`/checkpoints; what the ranks returned."""
    config = tiny_config(
        parallel={"tensor": 2},
        zero={"stage": 1},
        data={"train": corpus(folder)},
        training={"steps": 2, "micro_batch_size": 2, "global_batch_size": 8},
        checkpoint={"dir": str(folder / "checkpoints")},
    )
    return ranks.run(4, run_trainer, config)


def rewrite_manifest(folder: Path, change: Callable[[Tree], None]) -> None:
    """Change the manifest, its checksum with it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  manifest.json\n")


def rewrite_file(folder: Path, number: int, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of the manifest's file `number`, all checksums with them."""

    def record(manifest: Tree) -> None:
        path = folder / manifest["files"][number]["name"]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        content = path.read_bytes()
        manifest["files"][number] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    rewrite_manifest(folder, record)


def flip_bit(path: Path) -> None:
    """One bit of the last value, which stays finite."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
