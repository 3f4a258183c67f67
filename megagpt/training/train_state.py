"""Convert the engine's and the run's state to checkpoint entries, and back."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from torch import nn

from megagpt.checkpoint.boxes import boxes_of_range
from megagpt.checkpoint.format import IMPORTED_FROM, MASTER
from megagpt.checkpoint.load import CheckpointReader
from megagpt.checkpoint.merged import open_merged
from megagpt.checkpoint.save import Entry
from megagpt.config import upgrade_keys
from megagpt.config.compare import changed_keys, model_differences
from megagpt.config.schema import Config, LoRAConfig, ModelConfig
from megagpt.data.identity import DataIdentity
from megagpt.distributed.object_collectives import all_gather_object, run_on_ranks
from megagpt.engine.deepspeed_internals import ParameterPartition, ZeroState
from megagpt.engine.engine import Engine
from megagpt.errors import CheckpointError, listed
from megagpt.model.ends import CLASSIFIER
from megagpt.parallel.adapter import is_adapter
from megagpt.parallel.parameter import Shard, shard_of

LAYOUT = (
    *("parallel", "zero", "checkpoint", "logging", "deepspeed"),
    *("training.micro_batch_size", "training.recompute", "training.precision", "data.cache_dir", "optimizer.type"),
    *("training.compile", "training.loss_chunk_mib", "training.deterministic"),
)
"""Sections and keys that do not change what is computed, or whose change has a note of its own."""
MAX_COUNT = 2**62
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Loss = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
"""Bounded so that sums over a window stay finite."""


class RunProgress(BaseModel):
    """Progress of a run. Checkpoints of megagpt 0.1 use the older names."""

    model_config = ConfigDict(populate_by_name=True)

    consumed_samples: Count = Field(validation_alias=AliasChoices("consumed_samples", "samples"))
    """Samples trained on or skipped: the next batch starts here."""
    skipped_sample_ranges: list[tuple[Count, Count]] = Field(
        default=[], validation_alias=AliasChoices("skipped_sample_ranges", "passed_over")
    )
    """Ranges [first, end) that a rollback skips."""
    recent_losses: list[Loss] = []
    """Window of losses for spike detection."""
    consecutive_skips: Count = Field(default=0, validation_alias=AliasChoices("consecutive_skips", "skipped_in_a_row"))
    """Last steps without an update."""

    data: DataIdentity | None = None
    """The data that `consumed_samples` counts in; None in older checkpoints."""


class ImportedFrom(BaseModel):
    """Where the weights of a checkpoint come from that no run has written: a Hugging Face model."""

    model_config = ConfigDict(extra="forbid")

    folder: str
    model_type: str
    generation_config: dict[str, Any]


class RunState(RunProgress):
    """The `state` section of a checkpoint's manifest: everything but weights and optimizer states."""

    model_config = ConfigDict(populate_by_name=True, extra="forbid")

    optimizer_step: Count
    """Number of updates, which Adam's bias correction uses."""
    optimizer: str
    loss_scaler: dict[str, FiniteFloat]
    """State of the fp16 loss scale; empty for other precisions."""


class ImportedState(RunState):
    """The `state` section of a checkpoint that was converted, not trained: it has weights alone."""

    imported_from: ImportedFrom


@dataclass(frozen=True)
class LoadedWeights:
    """Result of loading the weights of a checkpoint."""

    step: int
    config: dict[str, Any]
    """Config of the saved run, with the present names of its keys."""
    total_bytes: int
    bytes_read: list[int]
    """Bytes of tensors read by each rank."""


@dataclass(frozen=True)
class Restored(LoadedWeights):
    """Result of loading a checkpoint."""

    state: RunState
    notes: list[str]
    """What differs from the saved run, one sentence each."""


def run_state(engine: Engine, progress: RunProgress) -> dict[str, Any]:
    """Return the `state` section of the manifest."""
    zero = engine.zero_state()
    state = RunState(
        **progress.model_dump(),
        optimizer_step=zero.step,
        optimizer=engine.config.optimizer.type,
        loss_scaler=zero.loss_scaler if engine.config.training.precision == "fp16" else {},
    )
    return state.model_dump()


def entries(engine: Engine) -> Iterator[Entry]:
    """Yield the boxes that this rank writes, as views. Of replicas only the first rank writes."""
    topology = engine.topology
    if engine.config.zero.stage == 0 and topology.dp_cp_rank > 0:
        return
    for partition in engine.zero_state().partitions():
        shard = shard_of(partition.parameter)
        if shard.second_copy or (shard.dim is None and topology.tp_rank > 0):
            continue
        values = {MASTER: partition.master, **partition.states}
        end = partition.start + len(partition.master)
        for piece in boxes_of_range(shard, partition.shape, partition.start, end):
            flat_range = slice(piece.start, piece.start + piece.box.numel)
            boxes = {name: flat[flat_range].view(piece.box.size) for name, flat in values.items()}
            yield Entry(shard.name, shard.shape, piece.box, boxes)


def restore(engine: Engine, folder: Path) -> Restored:
    """Load a verified checkpoint, written under any layout, into the engine. Collective.

    Raises CheckpointError if the checkpoint is of another model, with every difference.
    """
    reader = run_on_ranks(lambda: CheckpointReader(folder))
    assert reader is not None
    checked = run_on_ranks(lambda: _check(engine, reader))
    assert checked is not None
    saved_config, state = checked
    zero = engine.zero_state()
    run_on_ranks(lambda: _fill(engine, zero, reader))
    zero.step = state.optimizer_step
    if saved_config["training"]["precision"] == engine.config.training.precision == "fp16":
        zero.loss_scaler = state.loss_scaler
    return Restored(
        step=reader.manifest.step,
        state=state,
        config=saved_config,
        total_bytes=reader.manifest.total_bytes,
        bytes_read=all_gather_object(reader.bytes_read),
        notes=state_changes(saved_config, engine.config),
    )


def restore_weights(engine: Engine, folder: Path) -> LoadedWeights:
    """Load only the weights of a verified checkpoint, written under any layout, into a new engine. Collective.

    Adapters of the checkpoint are merged into its weights; those of the engine keep their initial values.
    Raises CheckpointError if the checkpoint is of another model, with every difference.
    """
    reader = run_on_ranks(lambda: open_merged(folder))
    assert reader is not None
    saved_config = run_on_ranks(lambda: _check_model(engine, reader))
    assert saved_config is not None
    run_on_ranks(lambda: _fill_weights(engine, engine.zero_state(), reader))
    return LoadedWeights(
        step=reader.manifest.step,
        config=saved_config,
        total_bytes=reader.manifest.total_bytes,
        bytes_read=all_gather_object(reader.bytes_read),
    )


def state_changes(saved: dict[str, Any], config: Config) -> list[str]:
    """Return what is lost or reset when a run resumes with another precision or optimizer, one sentence each.

    `saved`: the checkpoint's config.
    """
    notes = []
    before, after = saved["training"]["precision"], config.training.precision
    if before != after:
        effect = {
            "fp32": f"nothing of the trained weights is lost: fp32 weights were saved beside the {before} ones",
            "bf16": "forwards use the weights rounded to bf16 (8 bits of precision)",
            "fp8": "forwards use the weights rounded to bf16, and in the blocks' products to fp8 (4 bits of precision)",
            "fp16": "forwards use the weights rounded to fp16 (11 bits of precision), and the loss scale starts again",
        }[after]
        notes.append(
            f"training.precision {before} -> {after}: the optimizer's fp32 weights and moments continue unchanged; {effect}"
        )
        if before == "fp16":
            notes.append("the loss scale of fp16 is dropped")
        if config.training.freeze and after != "fp32":
            notes.append(f"frozen weights have no fp32 copy: they are rounded to {after} permanently")
        if saved["training"]["freeze"] and before != "fp32":
            notes.append(f"frozen weights had no fp32 copy: they stay rounded to {before}")
    changed = changed_keys(saved, config.model_dump(mode="json"), skip=LAYOUT)
    if changed:
        notes.append(f"the config differs from the checkpoint's: {listed(changed)}")
    if saved["optimizer"]["type"] != config.optimizer.type:
        notes.append(
            f"optimizer.type {saved['optimizer']['type']} -> {config.optimizer.type}: moments that were not saved start at 0"
        )
    return notes


def _check(engine: Engine, reader: CheckpointReader) -> tuple[dict[str, Any], RunState]:
    """Return the checkpoint's config and state. Raises CheckpointError if they do not fit this engine's model."""
    if IMPORTED_FROM in reader.manifest.state:
        raise CheckpointError(
            f"{reader.folder}: was imported and has weights alone, no optimizer states and no data position, so a run cannot "
            "resume from it; set checkpoint.initialize_from to it, and another checkpoint.dir"
        )
    saved_config = _check_model(engine, reader)
    _check_adapters(engine, reader)
    reader.check_shapes({shard_of(p).name: shard_of(p).shape for p in engine.parameters})
    with _other_version_if_invalid(reader.folder):
        state = RunState.model_validate(reader.manifest.state)
        state_changes(saved_config, engine.config)
    return saved_config, state


def _check_model(engine: Engine, reader: CheckpointReader) -> dict[str, Any]:
    """Return the checkpoint's config. Raises CheckpointError if its tensors do not fit this engine's model."""
    with _other_version_if_invalid(reader.folder):
        saved_config = upgrade_keys(reader.manifest.config)
        model = ModelConfig.model_validate_json(json.dumps(saved_config["model"]))
    differences = model_differences(model, engine.config.model)
    if differences:
        raise CheckpointError(f"{reader.folder}: the checkpoint is of another model: {'; '.join(differences)}")
    reader.check_shapes({shard_of(p).name: shard_of(p).shape for p in engine.parameters if _is_saved(p, reader)})
    return saved_config


def _check_adapters(engine: Engine, reader: CheckpointReader) -> None:
    """Raise CheckpointError unless the run has the adapters of the checkpoint."""
    saved = LoRAConfig.model_validate(reader.manifest.config.get("lora", {}))
    current = engine.config.lora
    if saved != current and (saved.rank, current.rank) != (None, None):
        raise CheckpointError(
            f"{reader.folder}: was saved with lora {saved.model_dump()}, and the run has {current.model_dump()}; use the same "
            "to resume, or start from its merged weights with checkpoint.initialize_from and another checkpoint.dir"
        )


@contextmanager
def _other_version_if_invalid(folder: Path) -> Iterator[None]:
    """Raise CheckpointError if the block finds missing keys or invalid values in the manifest."""
    try:
        yield
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        reason = _first_problem(error) if isinstance(error, ValidationError) else repr(error)
        raise CheckpointError(f"{folder}: its config or state is of another version of megagpt: {reason}") from None


@torch.no_grad()
def _fill(engine: Engine, zero: ZeroState, reader: CheckpointReader) -> None:
    """Fill this rank's weights and optimizer states; states that were not saved become zeros."""
    for partition in zero.partitions():
        shard = shard_of(partition.parameter)
        for name, values in partition.states.items():
            if reader.has(name, shard.name):
                values.copy_(_read(reader, name, shard, partition))
            else:
                values.zero_()
    _fill_weights(engine, zero, reader)


@torch.no_grad()
def _fill_weights(engine: Engine, zero: ZeroState, reader: CheckpointReader) -> None:
    """Fill this rank's weights: the fp32 values of the optimizer and the values of the forwards."""
    for partition in zero.partitions():
        if _is_saved(partition.parameter, reader):
            zero.set_weights(partition, _read(reader, MASTER, shard_of(partition.parameter), partition))
    if engine.config.zero.stage != 3:  # below stage 3 every rank holds its full shard for the forwards
        for parameter in engine.parameters:
            if _is_saved(parameter, reader):
                reader.fill(parameter)


def _is_saved(parameter: nn.Parameter, reader: CheckpointReader) -> bool:
    """Return whether a checkpoint has a parameter; it must have all but the adapters and the classifier of a new run."""
    name = shard_of(parameter).name
    return not (is_adapter(name) or name == CLASSIFIER) or reader.has(MASTER, name)


def _read(reader: CheckpointReader, state: str, shard: Shard, partition: ParameterPartition) -> torch.Tensor:
    """Return the values of a partition, flat; vocabulary padding is zero."""
    flat = torch.zeros(len(partition.master))
    for piece in boxes_of_range(shard, partition.shape, partition.start, partition.start + len(flat)):
        flat[piece.start : piece.start + piece.box.numel] = reader.read(state, shard.name, piece.box).flatten()
    return flat


def _first_problem(error: ValidationError) -> str:
    details = error.errors()[0]
    key = ".".join(map(str, details["loc"]))
    value = "" if details["type"] == "missing" else f", not {details['input']!r:.60}"
    return f"{key}: {details['msg'][:1].lower()}{details['msg'][1:]}{value}"
