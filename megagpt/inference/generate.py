"""Generate tokens with a model, in one process."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megagpt.errors import ConfigError, TrainingError
from megagpt.model.gpt import GPTChunk
from megagpt.model.kv_cache import KVCache


@torch.inference_mode()
def generate(
    model: GPTChunk,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    end: int | None,
    n_tokens: int | None = None,
) -> Iterator[int]:
    """Yield new tokens after `prompt` until `end` or `max_tokens`.

    Each token is predicted from the last model.n_positions tokens. Keys and values of earlier tokens are kept until the
    text is longer than that; from then on every token needs a forward of all positions, because each of them has moved.
    `temperature` 0 selects the most likely token; `top_k` samples from the k most likely tokens; `seed` gives the same
    draws on every device; `n_tokens`: only ids below it are generated, the size of the tokenizer.
    Raises ConfigError for a prompt that is empty or has ids that the model does not know, and TrainingError if the model's
    scores are not finite.
    """
    positions, vocab_size = model.config.model.n_positions, model.config.model.tokens_in_vocab
    if not prompt:
        raise ConfigError("--prompt: 0 tokens; expected at least 1")
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise ConfigError(
            f"--prompt: token id {wrong} is not in the model's vocabulary of {vocab_size}; give the tokenizer of its training"
        )
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    caches: dict[int, KVCache] = {}
    for _ in range(max_tokens):
        if len(text) > positions:
            caches, inputs = {}, text[-positions:]
        elif caches:
            inputs = text[-1:]
        else:
            caches, inputs = {int(index): KVCache() for index in model.layers}, text
        scores = model.next_token_logits(torch.tensor([inputs], device=device), caches)[0, :n_tokens]
        token = _sample(scores, temperature, top_k, generator)
        if token == end:
            return
        yield token
        text.append(token)


def _sample(scores: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """Draw one token id from the logits [vocab_size], on the CPU in fp64."""
    scores = scores.cpu().double()
    if not scores.isfinite().all():
        raise TrainingError(
            "the model's scores are not finite: a weight is NaN or infinite (inspect_checkpoint counts them), or a number is "
            "too large for --dtype fp16; try --dtype fp32"
        )
    if temperature == 0:
        return int(scores.argmax())
    ids = torch.arange(len(scores))
    if top_k is not None and top_k < len(scores):
        scores, ids = scores.topk(top_k)
    # The largest score becomes 0, so no temperature leads to an overflow.
    probabilities = ((scores - scores.max()) / temperature).softmax(-1)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
