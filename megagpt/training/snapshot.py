"""Between a run and its checkpoints: what of this rank's state is written, and how it is put back."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megagpt.checkpoint.boxes import pieces
from megagpt.checkpoint.format import MASTER
from megagpt.checkpoint.load import Reader
from megagpt.checkpoint.save import Entry, save_checkpoint
from megagpt.checkpoint.together import together
from megagpt.parallel.shard import Shard, is_second_copy, shard_of
from megagpt.training.engine import Engine
from megagpt.training.fragments import Fragment, ZeroState


def save(engine: Engine, directory: Path, step: int, samples: int) -> Path:
    """Write weights, moments and counters after `step` steps on `samples` samples (collective).

    Returns the checkpoint's folder.
    """
    config, zero = engine.config, _zero_state(engine)
    state = {
        "samples": samples,
        "optimizer_step": zero.step,
        "optimizer": config.optimizer.type,
        "loss_scaler": zero.loss_scaler,
    }
    return save_checkpoint(
        directory, step, _entries(engine, zero), state, config.model_dump(mode="json"), config.checkpoint.keep
    )


def restore(engine: Engine, folder: Path) -> tuple[int, int]:
    """Load a checkpoint of any layout into the engine (collective); returns the steps made and the samples read.

    Raises CheckpointError where it is damaged or of another model.
    """
    reader = together(lambda: _open(engine, folder))
    assert reader is not None
    zero = _zero_state(engine)
    with torch.no_grad():
        for fragment in zero.fragments():
            shard = shard_of(fragment.parameter)
            zero.set_weights(fragment, _read(reader, MASTER, shard, fragment))
            for kind, values in fragment.moments.items():
                if reader.has(kind, shard.name):
                    values.copy_(_read(reader, kind, shard, fragment))
    if engine.config.zero.stage != 3:  # below it every rank holds all of its shard for the forwards
        for parameter in engine.parameters:
            reader.fill(parameter)
    zero.step = reader.manifest.state["optimizer_step"]
    zero.loss_scaler = reader.manifest.state["loss_scaler"]
    return reader.manifest.step, reader.manifest.state["samples"]


def _open(engine: Engine, folder: Path) -> Reader:
    reader = Reader(folder, dist.get_rank(), dist.get_world_size())
    reader.check_shapes({shard_of(p).name: shard_of(p).shape for p in engine.parameters})
    return reader


def _zero_state(engine: Engine) -> ZeroState:
    optimizer = engine.config.optimizer
    return ZeroState(engine.deepspeed, engine.parameters, optimizer.type, optimizer.momentum > 0)


def _entries(engine: Engine, zero: ZeroState) -> Iterator[Entry]:
    """The boxes that this rank writes: of what several ranks hold alike, the first rank's alone."""
    at = engine.topology.at
    if engine.config.zero.stage == 0 and at.data > 0:
        return
    for fragment in zero.fragments():
        shard = shard_of(fragment.parameter)
        if is_second_copy(fragment.parameter) or (shard.dim is None and at.tensor > 0):
            continue
        for kind, values in {MASTER: fragment.master, **fragment.moments}.items():
            for piece in pieces(shard, fragment.shape, fragment.start, fragment.start + len(values)):
                part = values[piece.start : piece.start + piece.box.numel].view(piece.box.size)
                yield Entry(kind, shard.name, shard.shape, piece.box, part.float())  # frozen weights may be bf16


def _read(reader: Reader, kind: str, shard: Shard, fragment: Fragment) -> torch.Tensor:
    """The values of a fragment, flat; padding rows of the vocabulary are zeros."""
    flat = torch.zeros(len(fragment.master))
    for piece in pieces(shard, fragment.shape, fragment.start, fragment.start + len(flat)):
        flat[piece.start : piece.start + piece.box.numel] = reader.read(kind, shard.name, piece.box).flatten()
    return flat
