"""Load the model and the tokenizer of a checkpoint of any layout, or of a Hugging Face folder, for inference.

One process has the full model as one chunk; several ranks each have a tensor-parallel part of it.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.format import Manifest
from megagpt.checkpoint.load import fill_parameter
from megagpt.checkpoint.merged import open_merged
from megagpt.checkpoint.report import require_valid
from megagpt.checkpoint.tokenizer_files import carried_path, tokenizer_problems
from megagpt.checkpoint.verify import raise_all
from megagpt.config import Config, build_config, upgrade_keys
from megagpt.config.rules import broken_rules
from megagpt.config.schema import ParallelConfig
from megagpt.data.tokenizer import Tokenizer, load_tokenizer
from megagpt.errors import CheckpointError, ConfigError, DataError
from megagpt.hugging_face.folder import ModelFolder
from megagpt.inference.device import require_memory
from megagpt.model.chunk import Chunk
from megagpt.model.gpt import DTYPES
from megagpt.model.meta_model import meta_chunk
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import set_shard, shard_of
from megagpt.progress import NoProgress, Progress


def load_model(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
    checksums: bool = True,
    progress: Progress | None = None,
    parallel: ParallelContext | None = None,
) -> tuple[Chunk, Config]:
    """Load all layers of a checkpoint as one chunk, straight to `device` in `dtype` ("fp32", "bf16" or "fp16").

    Memory is needed for the weights in `dtype`, and on the host for the largest one in fp32.
    `checksums`: compare the files with their SHA-256; `progress` gets the bytes that were compared.
    `parallel`: this rank's part of a tensor-parallel model; the full model if absent.
    Raises CheckpointError for any damage, and ConfigError if the memory does not suffice, before anything is allocated.
    """
    reader = open_merged(folder)
    require_valid(folder, reader.manifest, checksums, progress or NoProgress())
    parallel = parallel or ParallelContext()
    config = _config(folder, reader.manifest, dtype, parallel.tp_size)
    model = meta_chunk(config, parallel, range(config.model.n_blocks))
    reader.check_shapes({shard_of(p).name: shard_of(p).shape for p in model.parameters()})
    _require_memory(folder, model, torch.device(device), dtype)
    _allocate(model, torch.device(device), DTYPES[dtype])
    for parameter in model.parameters():
        reader.fill(parameter)
    return model.eval(), config


def load_hugging_face(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
    progress: Progress | None = None,
    parallel: ParallelContext | None = None,
) -> tuple[Chunk, Config]:
    """Load a folder of a Hugging Face model as `load_model` loads a checkpoint; no checkpoint is written.

    `progress` gets the bytes that were read, 4 for each parameter.
    Raises ConfigError and CheckpointError for what megagpt cannot represent, as the conversion does.
    """
    from megagpt.hugging_face.import_model import Import  # it imports DeepSpeed, which takes seconds

    source = Import(ModelFolder(folder))
    parallel = parallel or ParallelContext()
    config = _for_inference(source.config, str(folder), dtype, parallel.tp_size)
    model = meta_chunk(config, parallel, range(config.model.n_blocks))
    _require_memory(folder, model, torch.device(device), dtype)
    _allocate(model, torch.device(device), DTYPES[dtype])
    parameters = {shard_of(parameter).name: parameter for parameter in model.parameters()}
    for name, values in source.read(progress or NoProgress()):
        fill_parameter(parameters[name], partial(_box_of, values))
    return model.eval(), config


def load_run_tokenizer(folder: Path, manifest: Manifest, path: str | None) -> Tokenizer:
    """Load the tokenizer at `path`, or else the one that the checkpoint carries, or else the one that its config names.

    Raises DataError or CheckpointError if it cannot be loaded, and ConfigError if there is none.
    """
    if path is not None:
        return load_tokenizer(path)
    raise_all(folder, tokenizer_problems(folder, manifest))
    carried = carried_path(folder, manifest)
    if carried is not None:
        return load_tokenizer(carried)
    data = manifest.config.get("data")
    named = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(named, str):
        raise ConfigError(f"{folder}: has no tokenizer and names none; give --tokenizer, the one that its data was made with")
    try:
        return load_tokenizer(named)
    except DataError as error:
        raise ConfigError(f"{error} (named in the checkpoint {folder}, which has no copy of it; give --tokenizer)") from None


def _config(folder: Path, manifest: Manifest, dtype: str, tp_size: int) -> Config:
    """Return the checkpoint's config for inference."""
    saved = build_config(upgrade_keys(manifest.config), f"{folder}: config")
    if saved.model.vocab_size is None:
        raise CheckpointError(f"{folder}: config: model.vocab_size: null; expected the size of the saved embedding")
    if saved.data.classes:
        raise CheckpointError(f"{folder}: is a classifier, which has no output layer for tokens; expected a language model")
    if saved.model.n_blocks > len(manifest.tensors):  # building the layers would take time before the shapes are compared
        n_tensors = len(manifest.tensors)
        raise CheckpointError(f"{folder}: config: model.n_layer: {saved.model.n_blocks}, but it has only {n_tensors} tensors")
    return _for_inference(saved, str(folder), dtype, tp_size)


def _for_inference(config: Config, source: str, dtype: str, tp_size: int) -> Config:
    """Return a config with the layout and the precision of inference. Raises ConfigError if `tp_size` does not fit."""
    training = config.training.model_copy(update={"precision": dtype, "recompute": "none"})
    config = config.model_copy(update={"training": training, "parallel": ParallelConfig(tensor=tp_size)})
    problem = next((problem for problem in broken_rules(config) if "parallel.tensor" in problem.keys), None)
    if problem is not None:
        raise ConfigError(f"{source}: {tp_size} ranks: {problem.message}")
    return config


def _box_of(values: Tensor, box: Box) -> Tensor:
    return values[box.within(Box.full(tuple(values.shape)))]


def _require_memory(folder: Path, model: Chunk, device: torch.device, dtype: str) -> None:
    sizes = [parameter.numel() for parameter in model.parameters()]
    weights, largest = sum(sizes) * DTYPES[dtype].itemsize, 4 * max(sizes)
    purpose = f"{folder}: a model of {sum(sizes):,} parameters in {dtype}"
    host = torch.device("cpu")
    on_host = largest if device.type == "cuda" else weights + largest
    require_memory(purpose, on_host, host, "use --dtype bf16, or a machine with more memory")
    if device.type == "cuda":
        require_memory(purpose, weights, device, "use --dtype bf16, or --device cpu")


def _allocate(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the parameters of a model on the meta device by uninitialized ones; shared parameters stay shared."""
    allocated: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in allocated:
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                allocated[parameter] = nn.Parameter(values, requires_grad=False)
                set_shard(allocated[parameter], shard_of(parameter))
            setattr(module, name, allocated[parameter])
