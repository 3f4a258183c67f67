"""A Hugging Face model becomes a checkpoint, one tensor in memory at a time."""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagpt.checkpoint.files import remove_tree, write_durably
from megagpt.checkpoint.format import MASTER, unfinished_folders
from megagpt.checkpoint.tokenizer_files import RunTokenizer, read_tokenizer
from megagpt.checkpoint.write import TensorSource, write_checkpoint
from megagpt.config import Config, build_config
from megagpt.data.tokenizer import load_tokenizer
from megagpt.errors import CheckpointError, ConfigError, DataError, StorageError, listed
from megagpt.hugging_face.families import FAMILIES, Family
from megagpt.hugging_face.folder import CONFIG, GENERATION, ModelFolder
from megagpt.hugging_face.keys import UnsupportedError
from megagpt.hugging_face.model_keys import MODEL_KEYS, TOKEN_IDS
from megagpt.hugging_face.peak_memory import PeakMemory
from megagpt.hugging_face.rules import Rule
from megagpt.model.meta_model import meta_model
from megagpt.parallel.parameter import shard_of
from megagpt.progress import Progress
from megagpt.training.train_state import ImportedFrom, ImportedState

STEP = 0
"""Step of the checkpoint: nothing was trained here."""
MODEL_FILE = "model.json"
"""File beside the checkpoint with the section `model`, for "extends" in the config of a run."""
VOCABULARY = ("embedding.token.weight", "head.weight")
"""Parameters with one row for each token."""
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Part(NamedTuple):
    """One parameter, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    """Shape in megagpt, with the new vocabulary."""
    rule: Rule
    tensors: tuple[str, ...]
    """Names in the Hugging Face folder."""


@dataclass(frozen=True)
class Imported:
    """Result of an import."""

    folder: Path
    """The checkpoint."""
    architecture: str
    n_parameters: int
    largest_bytes: int
    """Size of the largest parameter in fp32."""
    notes: list[str]


class Import:
    """A checked plan for one import; `write` carries it out."""

    def __init__(self, source: ModelFolder, vocab_size: int | None = None) -> None:
        """`vocab_size`: new size of the vocabulary. Raises ConfigError and CheckpointError if anything does not fit."""
        self.source = source
        self.family = family_of(source)
        self.model = model_section(source)
        self._vocab_size = vocab_size or self.model["vocab_size"]
        self._parts = self._plan()
        precisions = {_PRECISIONS[source.spec(name)[0]] for part in self._parts for name in part.tensors}
        self._precision = precisions.pop() if len(precisions) == 1 else "fp32"
        self.model["vocab_size"] = self._vocab_size
        self._config = _run_config(self.model, str(source.folder), self._precision)

    @property
    def config(self) -> Config:
        """The model's config; the keys of training have no meaning."""
        return self._config

    def read(self, progress: Progress) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the values, in fp32, of each parameter; one is in memory at a time."""
        memory = PeakMemory()
        for part in self._parts:
            yield part.name, self._reader(part, memory, progress)()

    @property
    def total_bytes(self) -> int:
        """Size of the weights in the checkpoint."""
        return sum(4 * math.prod(part.shape) for part in self._parts)

    @property
    def largest_bytes(self) -> int:
        """Size of the largest parameter in fp32."""
        return max(4 * math.prod(part.shape) for part in self._parts)

    def write(self, output: Path, memory: PeakMemory, progress: Progress) -> Imported:
        """Write the checkpoint to the new or empty folder `output`. Raises ConfigError and CheckpointError."""
        _require_empty(output)
        generation = self.source.generation_config or token_ids(self.source.config)
        tokenizer, notes = self._tokenizer(generation)
        imported_from = ImportedFrom(
            folder=str(self.source.folder), model_type=self.source.config["model_type"], generation_config=generation
        )
        state = ImportedState(
            consumed_samples=0, optimizer="none", optimizer_step=0, loss_scaler={}, imported_from=imported_from
        ).model_dump()
        config = self._config.model_dump(mode="json")
        folder = write_checkpoint(output, STEP, self._sources(memory, progress), config, state, tokenizer=tokenizer)
        try:
            write_durably(output / MODEL_FILE, json.dumps({"model": self.model}, indent=2) + "\n")
        except OSError as error:
            raise StorageError(f"{output / MODEL_FILE}: not written: {error.strerror}") from None
        n_parameters = sum(math.prod(part.shape) for part in self._parts)
        return Imported(folder, self.family.architecture, n_parameters, self.largest_bytes, notes)

    def _plan(self) -> list[Part]:
        """Return all parameters. Raises CheckpointError for tensors that are missing, left over or of another shape."""
        config = _run_config(self.model, str(self.source.folder), "fp32")
        shapes = {shard_of(parameter).name: shard_of(parameter).shape for parameter in meta_model(config).parameters()}
        stored = self.source.file_of
        parts, missing, wrong = [], [], []
        for name, rule, prefix in self.family.rules(config.model):
            wanted = [prefix + part for part in rule.names]
            tensors = tuple(stored_name(stored, tensor, self.family.base_prefix) for tensor in wanted)
            absent = [tensor for tensor in tensors if tensor not in stored]
            missing += absent
            if not absent:
                given = [self.source.spec(tensor)[1] for tensor in tensors]
                if _shape_of(rule, given) != shapes[name]:
                    wrong.append(f"{', '.join(tensors)} {[list(shape) for shape in given]} for {name} {list(shapes[name])}")
            shape = (self._vocab_size, *shapes[name][1:]) if name in VOCABULARY else shapes[name]
            parts.append(Part(name, shape, rule, tensors))
        folder = self.source.folder
        if missing:
            raise CheckpointError(f"{folder}: tensors are missing that {CONFIG} implies: {listed(missing)}")
        if wrong:
            raise CheckpointError(f"{folder}: tensors do not have the shapes that {CONFIG} implies: {listed(wrong, 3)}")
        used = {tensor for part in parts for tensor in part.tensors}
        # The embedding's values once more.
        tied = set(self.family.ends["head.weight"].names) if config.model.tie_embeddings else set()
        extra = [name for name in stored if name not in used | tied and not re.fullmatch(self.family.buffers, name)]
        if extra:
            raise CheckpointError(f"{folder}: has tensors that {self.family.architecture} does not have: {listed(extra)}")
        return parts

    def _sources(self, memory: PeakMemory, progress: Progress) -> Iterator[TensorSource]:
        for part in self._parts:
            yield TensorSource(part.name, part.shape, {MASTER: self._reader(part, memory, progress)})

    def _reader(self, part: Part, memory: PeakMemory, progress: Progress) -> Callable[[], Tensor]:
        def read() -> Tensor:
            values = part.rule.to_megagpt([self.source.read(tensor) for tensor in part.tensors])
            if part.name in VOCABULARY:
                values = resized(values, self._vocab_size)
            values = values.contiguous().float()
            if not values.isfinite().all():
                wrong = f"{int((~values.isfinite()).sum())} of {values.numel()} values are NaN or infinite"
                raise CheckpointError(f"{self.source.folder}: {', '.join(part.tensors)}: {wrong}; expected finite weights")
            memory.sample()
            progress.update(values.nbytes)
            return values

        return read

    def _tokenizer(self, generation: dict[str, Any]) -> tuple[RunTokenizer | None, list[str]]:
        """Return the tokenizer that the checkpoint carries, and notes for the user."""
        folder = str(self.source.folder)
        try:
            tokenizer = read_tokenizer(folder)
        except DataError as error:
            return None, [f"the checkpoint has no tokenizer: {error}"]
        files = {GENERATION: json.dumps(generation).encode(), **tokenizer.files} if generation else tokenizer.files
        tokenizer = RunTokenizer(tokenizer.name, files)
        try:
            n_tokens = load_tokenizer(folder).vocab_size
        except DataError as error:
            return tokenizer, [f"its tokenizer goes along, but megagpt cannot use it: {error}"]
        if n_tokens > self._vocab_size:
            return tokenizer, [f"the tokenizer has {n_tokens} tokens, and the model only the first {self._vocab_size}"]
        return tokenizer, []


def family_of(source: ModelFolder) -> Family:
    """Return the family of a model. Raises ConfigError for one that megagpt does not know."""
    kind = source.config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{source.folder / CONFIG}: model_type: {json.dumps(kind)}: expected {listed(FAMILIES)}{hint}")
    return FAMILIES[kind]


def model_section(source: ModelFolder) -> dict[str, Any]:
    """Return the section `model` of the config for a model. Raises ConfigError with the first key that does not fit."""
    path = source.folder / CONFIG
    try:
        return MODEL_KEYS[source.config["model_type"]].to_model(source.config)
    except UnsupportedError as error:
        value = source.config.get(error.key.partition(".")[0], "absent")
        raise ConfigError(f"{path}: {error.key}: {json.dumps(value)[:200]}: expected {error.expected}") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:  # a value of another type
        raise ConfigError(f"{path}: a key has a value of another type than in transformers: {error}") from None


def token_ids(config: dict[str, Any]) -> dict[str, Any]:
    """Return the ids of special tokens in a config.json."""
    return {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}


def stored_name(stored: dict[str, str], name: str, base_prefix: str) -> str:
    """Return the name of a tensor in the files: a base model is stored without the prefix of its head model."""
    short = name.removeprefix(base_prefix)
    return short if name not in stored and short in stored else name


def resized(values: Tensor, n_rows: int) -> Tensor:
    """Return the first `n_rows` rows; new ones are the mean of all."""
    n_new = n_rows - len(values)
    if n_new <= 0:
        return values[:n_rows]
    mean = values.double().mean(0).float()
    return torch.cat((values.float(), mean.expand(n_new, *mean.shape)))


def _shape_of(rule: Rule, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape of the parameter made of tensors with `shapes`; None if they do not fit together."""
    try:
        return tuple(rule.to_megagpt([torch.empty(shape, device="meta") for shape in shapes]).shape)
    except RuntimeError:
        return None


def _run_config(model: dict[str, Any], source: str, precision: str) -> Config:
    """Return a complete config of a model; the keys of training have no meaning. Raises ConfigError."""
    training = {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1, "precision": precision}
    return build_config({"model": model, "training": training}, f"{source}: as megagpt's config")


def _require_empty(output: Path) -> None:
    """Raise ConfigError if there is anything in `output`, except what an interrupted import left."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output}: is a file; expected the name of a new folder")
    left_over = unfinished_folders(output)
    others = [] if not output.exists() else sorted(path.name for path in output.iterdir() if path not in left_over)
    if others:
        raise ConfigError(f"--output {output}: has {listed(others, 3)} already; choose a new or empty folder")
    for folder in left_over:
        remove_tree(folder)
