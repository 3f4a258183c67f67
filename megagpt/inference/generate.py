"""Generate text from a checkpoint of any layout, in one process."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megagpt.checkpoint.load import CheckpointReader
from megagpt.checkpoint.verify import local_problems, raise_all
from megagpt.config import Config, build_config, upgrade_keys
from megagpt.errors import ConfigError
from megagpt.model.gpt import GPTChunk, build_chunk
from megagpt.model.kv_cache import KVCache
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[GPTChunk, Config]:
    """Load the full model of a checkpoint in fp32, as one chunk. Raises CheckpointError for any damage."""
    raise_all(folder, local_problems(folder))
    reader = CheckpointReader(folder)
    saved = build_config(upgrade_keys(reader.manifest.config), f"{folder}: config")
    training = saved.training.model_copy(update={"precision": "fp32", "recompute": "none"})
    config = saved.model_copy(update={"training": training})
    model = build_chunk(config, ParallelContext(), range(config.model.n_layer), device)
    reader.check_shapes({shard_of(p).name: shard_of(p).shape for p in model.parameters()})
    for parameter in model.parameters():
        reader.fill(parameter)
    return model.eval(), config


@torch.inference_mode()
def generate(
    model: GPTChunk, prompt: Sequence[int], max_tokens: int, temperature: float, top_k: int | None, seed: int, end: int | None
) -> Iterator[int]:
    """Yield new tokens after `prompt` until `end`, `max_tokens` or the model's last position.

    `temperature` 0 selects the most likely token; `top_k` samples from the k most likely tokens. Raises ConfigError for a
    prompt that is empty or fills all positions.
    """
    positions = model.config.model.n_positions
    if not 0 < len(prompt) < positions:
        raise ConfigError(f"--prompt: {len(prompt)} tokens; expected 1 to {positions - 1}, for model.n_positions {positions}")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    caches = {int(index): KVCache() for index in model.layers}
    tokens = torch.tensor([list(prompt)], device=device)
    for _ in range(min(max_tokens, positions - len(prompt))):
        token = _sample(model.logits(tokens, caches)[0, -1].float(), temperature, top_k, generator)
        if token == end:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)


def _sample(scores: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(scores.argmax())
    scores = scores / temperature
    if top_k is not None and top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
