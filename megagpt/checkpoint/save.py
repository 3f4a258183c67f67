"""Writing a checkpoint: every rank its own boxes, then one rename."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.format import (
    LATEST,
    MANIFEST,
    Manifest,
    box_key,
    digest,
    flush_folder,
    step_folder,
    whole_checkpoints,
    write_durably,
)
from megagpt.checkpoint.together import together


@dataclass(frozen=True)
class Entry:
    """One box of one logical tensor, with its values."""

    kind: str
    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    box: Box
    values: Tensor


def save_checkpoint(
    directory: Path, step: int, entries: Iterable[Entry], state: dict[str, Any], config: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of `step` (collective); returns its folder. `keep`: newest to keep, 0 for all.

    Raises CheckpointError on every rank if any rank could not write; the checkpoints that were there stay as they are.
    """
    final = step_folder(directory, step)
    aside = final.with_name(final.name + ".writing")
    together(lambda: _make_folder(aside), only_rank=0)
    mine = together(lambda: _write_file(aside, entries))
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    together(lambda: _finish(aside, final, Manifest(step, config, state), told, keep), only_rank=0)
    return final


def _write_file(folder: Path, entries: Iterable[Entry]) -> dict[str, Any] | None:
    """This rank's file, and what the manifest is to say of it; None where the rank has nothing of its own."""
    found = list(entries)
    if not found:
        return None
    path = folder / f"rank_{dist.get_rank():05d}.safetensors"
    save_file({box_key(e.kind, e.name, e.box): e.values.detach().cpu().contiguous() for e in found}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": digest(path),
        "boxes": [(f"{e.kind}/{e.name}", e.box.offset, e.box.size) for e in found],
        "shapes": {e.name: e.shape for e in found},
    }


def _finish(aside: Path, final: Path, manifest: Manifest, told: list[dict[str, Any] | None], keep: int) -> None:
    for record in told:
        if record is None:
            continue
        manifest.files[record["file"]] = {"bytes": record["bytes"], "sha256": record["sha256"]}
        manifest.shapes |= {name: list(shape) for name, shape in record["shapes"].items()}
        for tensor, offset, size in record["boxes"]:
            manifest.boxes.setdefault(tensor, []).append((record["file"], list(offset), list(size)))
    write_durably(aside / MANIFEST, manifest.to_json())
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    flush_folder(final.parent)
    write_durably(final.parent / LATEST, final.name + "\n")
    older = [path for path in whole_checkpoints(final.parent) if path != final]
    for path in older[: max(0, len(older) - keep + 1)] if keep else []:
        shutil.rmtree(path)


def _make_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)  # what an interrupted save left
    folder.mkdir(parents=True)
