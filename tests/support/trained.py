"""A tiny model with random weights on disk, with a tokenizer and a chat template, for tests of commands and of the server."""

import json
from pathlib import Path

from megagpt.checkpoint.tokenizer_files import read_tokenizer
from megagpt.checkpoint.write import TensorSource, write_checkpoint
from megagpt.config import to_json
from megagpt.inference.source import TrainedModel, open_source
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of
from megagpt.progress import NoProgress
from support.runs import full_model, tiny_config


def write_random(directory: Path, tokenizer: str | None, vocab_size: int, n_positions: int = 16, **model: object) -> Path:
    """Write a checkpoint with random weights, whose config names a tokenizer that does not exist. `model`: further keys."""
    shape = {"vocab_size": vocab_size, "n_positions": n_positions, **model}
    config = tiny_config(model=shape, data={"tokenizer": "gone/t.model"})
    sources = []
    for parameter in full_model(config).parameters():
        shard = shard_of(parameter)
        values = parameter.detach()[: shard.shape[0]]  # without vocabulary padding
        sources.append(TensorSource(shard.name, shard.shape, {"master": values}))
    state = {"consumed_samples": 0, "optimizer": "adamw", "optimizer_step": 0, "loss_scaler": {}}
    carried = None if tokenizer is None else read_tokenizer(tokenizer)
    return write_checkpoint(directory, 0, sources, json.loads(to_json(config)), state, tokenizer=carried)


def load_trained(folder: Path) -> TrainedModel:
    """Return the model of a checkpoint, on the CPU in fp32."""
    return open_source(str(folder)).load("cpu", "fp32", False, NoProgress(), ParallelContext())
