"""Compare the logits of a checkpoint and of a Hugging Face model on a few tokens."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagpt.errors import CheckpointError, ConfigError
from megagpt.hugging_face.families import FAMILIES
from megagpt.hugging_face.folder import CONFIG, MAX_CONFIG_BYTES, read_object
from megagpt.model.chunk import Chunk
from megagpt.model.encoder_decoder import EncoderDecoderChunk

SEQUENCES, MAX_TOKENS = 2, 64
TOLERANCE = 1e-4
"""Largest accepted difference in fp32, as a share of the largest logit: sums in another order, over many layers."""


class Difference(NamedTuple):
    """Result of a comparison."""

    largest: float
    """Largest difference of two logits."""
    scale: float
    """Largest logit."""
    n_tokens: int

    @property
    def is_small(self) -> bool:
        """Whether the two models compute the same; False for logits that are not finite."""
        return self.largest <= TOLERANCE * self.scale


def require_transformers() -> Any:
    """Return the module transformers. Raises ConfigError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"--check: needs the package transformers ({error}); install it, or leave --check out") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def check_tokens(vocab_size: int, n_positions: int) -> Tensor:
    """Return random token ids, always the same, [sequences, tokens]."""
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(0, vocab_size, (SEQUENCES, min(MAX_TOKENS, n_positions)), generator=generator)


@torch.no_grad()
def our_logits(model: Chunk, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logits of a model in fp32, with its weights rounded to `dtype`, as the files of the other side have them."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    if isinstance(model, EncoderDecoderChunk):
        return model.logits(_source(tokens), tokens)
    return model.logits(tokens)


@torch.no_grad()
def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits of the model in a Hugging Face folder, computed by transformers in fp32.

    Raises CheckpointError if transformers cannot load it.
    """
    transformers = require_transformers()
    try:  # "eager": the only attention with every option, such as capped scores
        kind = FAMILIES[read_object(folder / CONFIG, MAX_CONFIG_BYTES)["model_type"]].architecture
        model = getattr(transformers, kind).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # any error of the library is the answer to the question
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: transformers cannot load it: {reason}") from None
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": _source(tokens), "decoder_input_ids": tokens}
    logits: Tensor = model.eval()(**inputs).logits
    return logits.float()


def _source(tokens: Tensor) -> Tensor:
    """Return the input of an encoder for the decoder's input `tokens`."""
    return tokens.flip(1)


def difference(ours: Tensor, theirs: Tensor) -> Difference:
    """Compare logits, [sequences, tokens, vocabulary]; the smaller vocabulary counts if it was resized."""
    shared = min(ours.shape[-1], theirs.shape[-1])
    ours, theirs = ours[..., :shared], theirs[..., :shared]
    return Difference(float((ours - theirs).abs().max()), float(theirs.abs().max()), ours.shape[0] * ours.shape[1])
