"""Chunks of any model: with an encoder or without one. A pipeline stage runs one chunk."""

from collections.abc import Sequence

import torch

from megagpt.config.schema import Config
from megagpt.model.encoder_decoder import EncoderDecoderChunk
from megagpt.model.ends import TOKEN_EMBEDDING
from megagpt.model.gpt import GPTChunk, activation_dtype
from megagpt.model.stacks import BIASES
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of
from megagpt.parallel.seeding import initialize

Chunk = GPTChunk | EncoderDecoderChunk


def new_chunk(config: Config, parallel: ParallelContext, layers: range) -> Chunk:
    """Return the chunk with these layers, without initial weights. Layers of an encoder are counted first."""
    kind = EncoderDecoderChunk if config.model.encoder_layers else GPTChunk
    return kind(config, parallel, layers)


def build_chunk(config: Config, parallel: ParallelContext, layers: range, device: torch.device | str = "cpu") -> Chunk:
    """Build a chunk with its initial weights on `device`, in the precision of the config."""
    with torch.device(device):
        chunk = new_chunk(config, parallel, layers)
    for parameter in chunk.parameters():
        initialize(parameter, config.training.seed)
    return chunk.to(dtype=activation_dtype(config))


def shared_parameters(config: Config, layers: Sequence[range]) -> dict[str, list[int]]:
    """Return the parameters that several places of the model use: their names, and the stages with a copy.

    `layers`: those of each stage. The first of the stages has the copy that checkpoints contain.
    """
    model, last = config.model, len(layers) - 1
    ends = [last] if model.tie_embeddings else []
    if not model.encoder_layers:
        return {TOKEN_EMBEDDING: [0, *ends]} if ends else {}
    in_encoder = [stage for stage, own in enumerate(layers) if own.start < model.encoder_layers]
    in_decoder = [stage for stage, own in enumerate(layers) if own.stop > model.encoder_layers]
    shared = {TOKEN_EMBEDDING: [0, in_decoder[0], *ends]}
    if model.position_embedding == "relative":
        shared |= {BIASES["encoder"]: in_encoder, BIASES["decoder"]: in_decoder}
    return {name: sorted(set(stages)) for name, stages in shared.items()}


def join_copies(chunks: Sequence[Chunk], shared: dict[str, list[int]]) -> None:
    """Make the copies of shared parameters that this rank's chunks have one parameter: that of the first chunk."""
    kept: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        for module in chunk.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if shard_of(parameter).name in shared:
                    setattr(module, name, kept.setdefault(shard_of(parameter).name, parameter))


def message_tensors(
    config: Config, layers: Sequence[range], shape: torch.Size, n_source: int, device: torch.device | str = "cpu"
) -> list[tuple[torch.Tensor, ...]]:
    """Return tensors like those that each stage but the last hands to the next one, [batch, seq, hidden].

    `layers`: those of each stage; `shape`: of a micro-batch's tokens, [batch, seq]; `n_source`: positions of its source, 0
    without an encoder. Both are those of one context rank.
    """
    (n_rows, n_tokens), parallel = shape, config.parallel

    def like(n_positions: int) -> torch.Tensor:
        seq = n_positions // parallel.tensor if parallel.sequence_parallel else n_positions
        return torch.empty(n_rows, seq, config.model.n_embd, dtype=activation_dtype(config), device=device)

    source, tokens = (like(n_source),), (like(n_tokens),)
    n_encoder = config.model.encoder_layers
    if not n_encoder:
        return [tokens] * (len(layers) - 1)
    return [source if own.stop <= n_encoder else source + tokens for own in layers[:-1]]
