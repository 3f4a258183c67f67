"""A small real checkpoint for tests, and functions that alter a checkpoint and its checksums."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from support.pool import Pool
from support.runs import Tree, corpus, run_trainer, tiny_config


def save_small(ranks: Pool, folder: Path) -> list[Tree]:
    """Train two steps with tensor 2 x data 2 and ZeRO-1, saved in `folder`/checkpoints; return the ranks' results."""
    config = tiny_config(
        parallel={"tensor": 2},
        zero={"stage": 1},
        data={"train": corpus(folder)},
        training={"steps": 2, "micro_batch_size": 2, "global_batch_size": 8},
        checkpoint={"dir": str(folder / "checkpoints")},
    )
    return ranks.run(4, run_trainer, config)


def rewrite_manifest(folder: Path, change: Callable[[Tree], None]) -> None:
    """Change the manifest, and its checksum with it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    update_manifest_checksum(folder)


def rewrite_file(folder: Path, number: int, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of the manifest's file `number`, and all checksums with them."""
    path = folder / json.loads((folder / "manifest.json").read_text())["files"][number]["name"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    update_checksum(folder, path.name)


def update_checksum(folder: Path, file: str) -> None:
    """Make the manifest accept the present content of a file, as someone who plants a file would."""
    content = (folder / file).read_bytes()

    def update(manifest: Tree) -> None:
        record = next(record for record in manifest["files"] if record["name"] == file)
        record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    rewrite_manifest(folder, update)


def update_manifest_checksum(folder: Path) -> None:
    """Make the checksum accept the present content of the manifest."""
    checksum = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    (folder / "manifest.sha256").write_text(f"{checksum}  manifest.json\n")


def flip_bit(path: Path) -> None:
    """Flip one bit of the last value, which stays finite."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
