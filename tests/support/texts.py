"""Texts continued by the engine, as tokens."""

from collections.abc import Collection, Sequence

import torch

from megagpt.inference.engine import GenerationEngine
from megagpt.inference.sampling import Sampling
from megagpt.model.gpt import GPTChunk


def engine_for(model: GPTChunk, rows: int = 8, end: Collection[int] = (), n_tokens: int | None = None) -> GenerationEngine:
    """Return an engine whose cache holds `rows` texts of the model's context."""
    return GenerationEngine(model, end, n_tokens, (rows + 1) * model.config.model.n_positions + 16 * rows, rows)


def continued(
    model: GPTChunk,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    end: Collection[int] = (),
    n_tokens: int | None = None,
    rows: int = 8,
) -> list[list[int]]:
    """Return the new tokens after each prompt."""
    engine = engine_for(model, rows, end, n_tokens)
    sequences = [engine.add(prompt, sampling) for prompt in prompts]
    while engine.n_running or engine.n_waiting:
        engine.step()
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
    return [sequence.tokens[sequence.n_prompt :] for sequence in sequences]


def greedy(model: GPTChunk, prompt: Sequence[int], max_tokens: int, n_tokens: int | None = None) -> list[int]:
    """Return the most likely new tokens after one prompt."""
    return continued(model, [prompt], Sampling(max_tokens, temperature=0), n_tokens=n_tokens)[0]


@torch.no_grad()
def expected_greedy(model: GPTChunk, prompt: Sequence[int], max_tokens: int, n_tokens: int | None = None) -> list[int]:
    """The definition: the most likely token after the last n_positions tokens, one full forward per token."""
    text, positions = list(prompt), model.config.model.n_positions
    for _ in range(max_tokens):
        text.append(int(model.logits(torch.tensor([text[-positions:]]))[0, -1, :n_tokens].argmax()))
    return text[len(prompt) :]
