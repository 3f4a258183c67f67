"""A checkpoint becomes a Hugging Face model, one parameter in memory at a time."""

import json
import math
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.files import TensorSpec, fsync_folder, remove_tree, write_durably, write_safetensors
from megagpt.checkpoint.format import IMPORTED_FROM, MASTER, REPLACED, WRITING
from megagpt.checkpoint.load import CheckpointReader
from megagpt.checkpoint.precision import to_dtype
from megagpt.checkpoint.tokenizer_files import RunTokenizer, carried_path, read_carried
from megagpt.config import Config, build_config, upgrade_keys
from megagpt.data.tokenizer import HUGGING_FACE, SENTENCEPIECE, HuggingFaceTokenizer, load_tokenizer
from megagpt.errors import CheckpointError, ConfigError, DataError, StorageError, listed
from megagpt.hugging_face.families import FAMILIES
from megagpt.hugging_face.folder import CONFIG, GENERATION, INDEX, WEIGHTS, read_object
from megagpt.hugging_face.model_keys import MODEL_KEYS, TOKEN_IDS
from megagpt.hugging_face.peak_memory import PeakMemory
from megagpt.hugging_face.rules import Rule
from megagpt.model.meta_model import meta_model
from megagpt.parallel.parameter import shard_of
from megagpt.progress import Progress
from megagpt.training.train_state import ImportedFrom

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_BYTES = 2**20


class Part(NamedTuple):
    """One parameter, and the tensors that it becomes."""

    name: str
    shape: tuple[int, ...]
    rule: Rule
    specs: list[TensorSpec]


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    folder: Path
    architecture: str
    n_parameters: int
    n_bytes: int
    """Size of the tensors in the folder."""
    n_files: int
    """Number of safetensors files."""
    largest_bytes: int
    """Size of the largest parameter in fp32."""
    notes: list[str]


class Export:
    """A checked plan for one export; `write` carries it out."""

    def __init__(self, reader: CheckpointReader, family: str | None = None, dtype: str | None = None) -> None:
        """`family`: a key of `FAMILIES`; else the first that covers the model. `dtype`: else that of the run's precision.

        Raises ConfigError if the family does not cover the model, and CheckpointError for another model's tensors.
        """
        self.reader = reader
        self.config = saved_config(reader)
        self._imported_from = _imported_from(reader)
        self.family_name = self._choose_family(family)
        self.family = FAMILIES[self.family_name]
        self.dtype = dtype or self.config.training.weight_precision
        shapes = {shard_of(parameter).name: shard_of(parameter).shape for parameter in meta_model(self.config).parameters()}
        reader.check_shapes(shapes)
        self._parts = [
            Part(name, shapes[name], rule, _specs(rule, prefix, shapes[name], DTYPES[self.dtype]))
            for name, rule, prefix in self.family.rules(self.config.model)
        ]

    @property
    def total_bytes(self) -> int:
        """Bytes of the weights that are read."""
        return sum(4 * math.prod(part.shape) for part in self._parts)

    @property
    def largest_bytes(self) -> int:
        """Size of the largest parameter in fp32."""
        return max(4 * math.prod(part.shape) for part in self._parts)

    def write(self, output: Path, max_file_bytes: int, force: bool, memory: PeakMemory, progress: Progress) -> Exported:
        """Write the folder `output`: complete under its name, or absent. `force`: replace an older model there.

        `max_file_bytes`: a new file is started if the next tensor would exceed it.
        """
        require_replaceable(output, self.reader.folder, force)
        temporary = output.with_name(f"{output.name}{WRITING}{secrets.token_hex(4)}")
        try:
            temporary.mkdir(parents=True)
            files = self._write_weights(temporary, max_file_bytes, memory, progress)
            notes = self._write_small_files(temporary)
            fsync_folder(temporary)
            _put_in_place(temporary, output)
        except OSError as error:
            raise StorageError(f"--output {output}: cannot be written: {error.strerror}") from None
        finally:
            remove_tree(temporary)  # after the rename it does not exist
        n_parameters = sum(math.prod(part.shape) for part in self._parts)
        n_bytes = sum(spec.n_bytes for part in self._parts for spec in part.specs)
        return Exported(output, self.family.architecture, n_parameters, n_bytes, len(files), self.largest_bytes, notes)

    def _choose_family(self, wanted: str | None) -> str:
        """Return the name of a family that covers the model. Raises ConfigError with what the nearest one lacks."""
        imported = [self._imported_from.model_type] if self._imported_from is not None else []
        candidates = [wanted] if wanted is not None else [*(kind for kind in imported if kind in FAMILIES), *FAMILIES]
        lacking = {kind: MODEL_KEYS[kind].missing(self.config.model) for kind in candidates}
        # One with an encoder if the model has one; the first of equals.
        nearest = min(candidates, key=lambda kind: ("encoder_layers" in lacking[kind], len(lacking[kind])))
        if lacking[nearest]:
            differences = [f"model.{key} {ours} (it has {theirs})" for key, (ours, theirs) in lacking[nearest].items()]
            subject = "the nearest family of Hugging Face, " if wanted is None else ""
            raise ConfigError(
                f"{self.reader.folder}: {subject}{FAMILIES[nearest].architecture} has no counterpart for {listed(differences)}"
            )
        return nearest

    def _write_weights(self, folder: Path, max_file_bytes: int, memory: PeakMemory, progress: Progress) -> list[str]:
        """Write the safetensors files, and their index if there are several; return their names."""
        groups = _groups([spec for part in self._parts for spec in part.specs], max_file_bytes)
        names = [WEIGHTS]
        if len(groups) > 1:
            names = [f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" for number in range(len(groups))]
            weight_map = {spec.key: name for name, group in zip(names, groups, strict=True) for spec in group}
            total = sum(spec.n_bytes for group in groups for spec in group)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_durably(folder / INDEX, json.dumps(index, indent=2) + "\n")
        tensors = self._tensors(memory, progress)  # one iterator over all files
        for name, group in zip(names, groups, strict=True):
            write_safetensors(folder / name, group, tensors, {"format": "pt"})
        return names

    def _tensors(self, memory: PeakMemory, progress: Progress) -> Iterator[Tensor]:
        for part in self._parts:
            values = self.reader.read(MASTER, part.name, Box.full(part.shape))
            n_bytes = values.nbytes
            values = to_dtype(values, DTYPES[self.dtype], f"{self.reader.folder}: {part.name}")
            for tensor in part.rule.from_megagpt(values):
                contiguous = tensor.contiguous()
                memory.sample()
                yield contiguous
            del values, tensor, contiguous  # free them before the next parameter is read
            progress.update(n_bytes)

    def _write_small_files(self, folder: Path) -> list[str]:
        """Write the config, the tokenizer and generation_config.json; return notes for the user."""
        files, notes = self._tokenizer_files()
        for name, content in files.items():
            with (folder / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        generation = self._generation_config(folder)
        ids = {key: generation.get(key) for key in TOKEN_IDS}  # null, too: transformers has other defaults
        keys = MODEL_KEYS[self.family_name].from_model(self.config.model)
        config = {
            "architectures": [self.family.architecture],
            "model_type": self.family_name,
            **keys,
            **ids,
            "use_cache": True,
            "torch_dtype": _DTYPE_NAMES[self.dtype],
        }
        write_durably(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        write_durably(folder / GENERATION, json.dumps(generation, indent=2) + "\n")
        return notes

    def _tokenizer_files(self) -> tuple[dict[str, bytes], list[str]]:
        """Return the files of the checkpoint's tokenizer as transformers reads them."""
        carried = read_carried(self.reader.folder, self.reader.manifest)
        path = carried_path(self.reader.folder, self.reader.manifest)
        if carried is None or path is None or not carried.files:
            name = "none" if carried is None else carried.name
            return {}, [f"the folder has no tokenizer, because the checkpoint carries {name}"]
        return as_transformers_reads(carried, path)

    def _generation_config(self, folder: Path) -> dict[str, Any]:
        """Return what the checkpoint carries, or else the token that ends documents."""
        if (folder / GENERATION).exists():
            return read_object(folder / GENERATION, GENERATION_BYTES)
        if self._imported_from is not None:
            return dict(self._imported_from.generation_config)
        path = carried_path(self.reader.folder, self.reader.manifest)
        try:
            return {} if path is None else {"eos_token_id": load_tokenizer(path).eod_id}
        except DataError:  # noted by the caller
            return {}


def as_transformers_reads(carried: RunTokenizer, path: str) -> tuple[dict[str, bytes], list[str]]:
    """Return the tokenizer's files, completed so that transformers finds its class and its end of documents; and notes."""
    files = dict(carried.files)
    if HUGGING_FACE not in files and SENTENCEPIECE in files:
        return files, [f"{SENTENCEPIECE} goes along; transformers may need a {TOKENIZER_CONFIG} that names its class"]
    try:
        tokenizer = load_tokenizer(path)
    except DataError as error:
        return files, [f"the tokenizer goes along as it is: {error}"]
    if HUGGING_FACE not in files and isinstance(tokenizer, HuggingFaceTokenizer):
        files[HUGGING_FACE] = tokenizer.to_json().encode()
    if TOKENIZER_CONFIG not in files and isinstance(tokenizer, HuggingFaceTokenizer):
        declared = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eod_token}
        files[TOKENIZER_CONFIG] = json.dumps(declared, indent=2).encode()
    return files, []


def saved_config(reader: CheckpointReader) -> Config:
    """Return the config in a checkpoint. Raises CheckpointError if it is of another version."""
    try:
        config = build_config(upgrade_keys(reader.manifest.config), f"{reader.folder}: config")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if config.model.vocab_size is None:
        raise CheckpointError(f"{reader.folder}: config: model.vocab_size: null; expected the size of the saved embedding")
    if config.data.classes:
        raise CheckpointError(f"{reader.folder}: is a classifier, which has no counterpart in the conversion")
    if config.model.n_blocks > len(reader.manifest.tensors):
        n_tensors = len(reader.manifest.tensors)
        raise CheckpointError(
            f"{reader.folder}: config: model.n_layer: {config.model.n_blocks}, but it has {n_tensors} tensors"
        )
    return config


def require_replaceable(output: Path, checkpoint: Path, force: bool) -> None:
    """Raise ConfigError if the output would be in the checkpoint, or replace something without `force`."""
    if checkpoint.resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"--output {output}: is in the checkpoint's folder, which may contain only its own files")
    if not os.path.lexists(output):
        return
    if not output.is_dir() or output.is_symlink():
        raise ConfigError(f"--output {output}: is no folder; expected the name of a new folder")
    if not any(output.iterdir()):
        return
    if not (output / CONFIG).is_file():
        raise ConfigError(f"--output {output}: has files that are no Hugging Face model; choose another folder")
    if not force:
        raise ConfigError(f"--output {output}: exists already; choose another folder, or replace the model with --force")


def _imported_from(reader: CheckpointReader) -> ImportedFrom | None:
    found = reader.manifest.state.get(IMPORTED_FROM)
    try:
        return None if found is None else ImportedFrom.model_validate(found)
    except ValidationError:
        raise CheckpointError(f"{reader.folder}: state.{IMPORTED_FROM} is of another version of megagpt") from None


def _specs(rule: Rule, prefix: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[TensorSpec]:
    """Return the tensors that a parameter of `shape` becomes."""
    tensors = rule.from_megagpt(torch.empty(shape, device="meta"))
    return [TensorSpec(prefix + name, dtype, tuple(part.shape)) for name, part in zip(rule.names, tensors, strict=True)]


def _groups(specs: list[TensorSpec], max_file_bytes: int) -> list[list[TensorSpec]]:
    """Divide the tensors, in their order, into files."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.n_bytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.n_bytes
    return groups


def _put_in_place(temporary: Path, output: Path) -> None:
    """Give the complete folder its name. An older model there is deleted only after that."""
    replaced = temporary.with_name(temporary.name + REPLACED)
    if output.exists():
        output.rename(replaced)
    try:
        temporary.rename(output)
    except OSError:
        if replaced.exists():
            replaced.rename(output)
        raise
    fsync_folder(output.parent)
    remove_tree(replaced)
