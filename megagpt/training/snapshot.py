"""Between a run and its checkpoints: what of this rank's state is written, and how it is put back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from megagpt.checkpoint.boxes import pieces
from megagpt.checkpoint.format import MASTER
from megagpt.checkpoint.load import Reader
from megagpt.checkpoint.save import Entry
from megagpt.checkpoint.together import of_all, together
from megagpt.config.compare import model_differences
from megagpt.config.schema import Config, ModelConfig
from megagpt.errors import CheckpointError
from megagpt.parallel.shard import Shard, is_second_copy, shard_of
from megagpt.training.engine import Engine
from megagpt.training.fragments import Fragment, ZeroState


class RunState(BaseModel):
    """Where a run stands, beside its weights and moments."""

    model_config = ConfigDict(extra="forbid")

    samples: int
    """Read or passed over: the next batch begins here."""
    optimizer_step: int
    """Updates made, from which Adam's bias correction counts."""
    optimizer: str
    loss_scaler: dict[str, float]
    """Of fp16; empty under other precisions."""
    passed_over: list[tuple[int, int]] = []
    """Ranges [first, end) of samples that a rollback passes over."""
    recent_losses: list[float] = []
    """What a spike is seen against."""
    skipped_in_a_row: int = 0


class Position(NamedTuple):
    """What a run knows of itself beside the engine's state."""

    samples: int
    passed_over: list[tuple[int, int]]
    recent_losses: list[float]
    skipped_in_a_row: int


class Restored(NamedTuple):
    """What a checkpoint told, and what it took to read it."""

    step: int
    state: RunState
    total_bytes: int
    bytes_read: list[int]
    """Of tensors, by rank."""
    notes: list[str]
    """What is not as it was when it was saved, and why."""


def run_state(engine: Engine, position: Position) -> dict[str, Any]:
    """The small facts of a run, for a manifest."""
    zero = _zero_state(engine)
    optimizer = engine.config.optimizer.type
    return RunState(
        optimizer_step=zero.step, optimizer=optimizer, loss_scaler=zero.loss_scaler, **position._asdict()
    ).model_dump()


def entries(engine: Engine) -> Iterator[Entry]:
    """The boxes that this rank writes, as views: of what several ranks hold alike, the first rank's alone."""
    at = engine.topology.at
    if engine.config.zero.stage == 0 and at.data > 0:
        return
    for fragment in _zero_state(engine).fragments():
        shard = shard_of(fragment.parameter)
        if is_second_copy(fragment.parameter) or (shard.dim is None and at.tensor > 0):
            continue
        values = {MASTER: fragment.master, **fragment.moments}
        for piece in pieces(shard, fragment.shape, fragment.start, fragment.start + len(fragment.master)):
            part = slice(piece.start, piece.start + piece.box.numel)
            yield Entry(
                shard.name, shard.shape, piece.box, {kind: flat[part].view(piece.box.size) for kind, flat in values.items()}
            )


def restore(engine: Engine, folder: Path) -> Restored:
    """Load a whole checkpoint of any layout into the engine (collective).

    Raises CheckpointError where it is of another model, naming every difference.
    """
    reader = together(lambda: Reader(folder))
    assert reader is not None
    saved, state = together(lambda: _check(engine, reader)) or (None, None)
    assert saved is not None and state is not None
    zero = _zero_state(engine)
    together(lambda: _fill(engine, zero, reader))
    zero.step = state.optimizer_step
    if zero.loss_scaler and state.loss_scaler:
        zero.loss_scaler = state.loss_scaler
    return Restored(
        reader.manifest.step, state, reader.manifest.total_bytes, of_all(reader.bytes_read), changes(saved, engine.config)
    )


def changes(saved: dict[str, Any], now: Config) -> list[str]:
    """What a run loses or begins anew that goes on with another precision or update rule; one sentence each.

    `saved`: the checkpoint's config.
    """
    notes = []
    before, after = saved["training"]["precision"], now.training.precision
    if before != after:
        kept = "the optimizer's fp32 weights and moments go on unchanged"
        lost = {
            "fp32": f"nothing of the trained weights is lost: they were kept in fp32 beside the {before} ones",
            "bf16": "forwards see them rounded to bf16 (8 bits of precision)",
            "fp16": "forwards see them rounded to fp16 (11 bits of precision), and the loss scale begins anew",
        }[after]
        notes.append(f"training.precision {before} -> {after}: {kept}; {lost}")
        if before == "fp16":
            notes.append("the loss scale of fp16 is dropped")
        if now.training.freeze and after != "fp32":
            notes.append(f"frozen weights have no fp32 copy: they are rounded to {after} for good")
        if saved["training"]["freeze"] and before != "fp32":
            notes.append(f"frozen weights had no fp32 copy: they stay as {before} had rounded them")
    if saved["optimizer"]["type"] != now.optimizer.type:
        notes.append(
            f"optimizer.type {saved['optimizer']['type']} -> {now.optimizer.type}: moments that were not kept begin at 0"
        )
    return notes


def _check(engine: Engine, reader: Reader) -> tuple[dict[str, Any], RunState]:
    """The checkpoint's config and state, if they are of this engine's model."""
    manifest = reader.manifest
    try:
        state = RunState.model_validate(manifest.state)
        model = ModelConfig.model_validate_json(json.dumps(manifest.config["model"]))
        changes(manifest.config, engine.config)
    except (ValidationError, KeyError, TypeError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
        raise CheckpointError(f"{reader.folder}: its config or state is of another version of megagpt: {first}") from None
    differences = model_differences(model, engine.config.model)
    if differences:
        raise CheckpointError(f"{reader.folder}: the checkpoint is of another model: {'; '.join(differences)}")
    reader.check_shapes({shard_of(p).name: shard_of(p).shape for p in engine.parameters})
    return manifest.config, state


@torch.no_grad()
def _fill(engine: Engine, zero: ZeroState, reader: Reader) -> None:
    """This rank's weights and moments; those that were not kept become zeros."""
    for fragment in zero.fragments():
        shard = shard_of(fragment.parameter)
        zero.set_weights(fragment, _read(reader, MASTER, shard, fragment))
        for kind, values in fragment.moments.items():
            values.copy_(_read(reader, kind, shard, fragment) if reader.has(kind, shard.name) else torch.zeros(len(values)))
    if engine.config.zero.stage != 3:  # below it every rank holds all of its shard for the forwards
        for parameter in engine.parameters:
            reader.fill(parameter)


def _zero_state(engine: Engine) -> ZeroState:
    optimizer = engine.config.optimizer
    return ZeroState(engine.deepspeed, engine.parameters, optimizer.type, optimizer.momentum > 0)


def _read(reader: Reader, kind: str, shard: Shard, fragment: Fragment) -> torch.Tensor:
    """The values of a fragment, flat; padding rows of the vocabulary are zeros."""
    flat = torch.zeros(len(fragment.master))
    for piece in pieces(shard, fragment.shape, fragment.start, fragment.start + len(flat)):
        flat[piece.start : piece.start + piece.box.numel] = reader.read(kind, shard.name, piece.box).flatten()
    return flat
