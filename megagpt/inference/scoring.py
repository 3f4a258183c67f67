"""Log-probabilities of given tokens, in batches of texts of similar length."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from megagpt.model.gpt import GPTChunk

BATCH_TOKENS = 4096
"""Largest number of tokens in one forward, padding included, if the context is not longer."""


class Window(NamedTuple):
    """Tokens that the model reads at once: the first ones are only read, the others are scored."""

    tokens: Sequence[int]
    """Up to n_positions + 1 tokens; the last one is only predicted."""
    n_scored: int
    """The last tokens, which are scored; fewer than all."""


class Score(NamedTuple):
    """Result for one window."""

    logprob: float
    """Sum of the natural logarithms of the probabilities of the scored tokens."""
    is_greedy: bool
    """Whether each of them is the most likely token."""


def windows_of(tokens: Sequence[int], positions: int, stride: int) -> Iterator[Window]:
    """Divide a text into windows that score each of its tokens once, but the first, which is only read.

    Each window after the first scores the next `stride` tokens, after as many earlier ones as the context has room for.
    """
    scored = 1
    while scored < len(tokens):
        n_scored = min(positions if scored == 1 else stride, len(tokens) - scored)
        end = scored + n_scored
        yield Window(tokens[max(0, end - positions - 1) : end], n_scored)
        scored = end


@torch.inference_mode()
def score(model: GPTChunk, windows: Sequence[Window]) -> list[Score]:
    """Return the score of each window, summed in float64. Collective under tensor parallelism."""
    results: dict[int, Score] = {}
    for batch in _batches(windows):
        results |= zip(batch, _score_batch(model, [windows[number] for number in batch]), strict=True)
    return [results[number] for number in range(len(windows))]


def _batches(windows: Sequence[Window]) -> Iterator[list[int]]:
    """Yield the indices of windows that are read together, the longest first."""
    batch: list[int] = []
    longest = 0
    for number in sorted(range(len(windows)), key=lambda number: -len(windows[number].tokens)):
        longest = max(longest, len(windows[number].tokens))
        if batch and (len(batch) + 1) * longest > BATCH_TOKENS:
            yield batch
            batch, longest = [], len(windows[number].tokens)
        batch.append(number)
    if batch:
        yield batch


def _score_batch(model: GPTChunk, windows: Sequence[Window]) -> list[Score]:
    """Return the scores of windows that are padded to the longest one; padding comes after a text, so no token sees it."""
    device = next(model.parameters()).device
    longest = max(len(window.tokens) for window in windows)
    tokens = torch.zeros(len(windows), longest, dtype=torch.int64)
    where = torch.zeros(len(windows), longest - 1, dtype=torch.bool)
    for row, window in enumerate(windows):
        length = len(window.tokens)
        tokens[row, :length] = torch.tensor(window.tokens)
        where[row, length - 1 - window.n_scored : length - 1] = True
    logits = model.logits_at(tokens[:, :-1].to(device), where.to(device))  # [scored, vocabulary]
    targets = tokens[:, 1:][where].to(device)
    logprobs = logits.float().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1).double().cpu()
    greedy = (logits.argmax(-1) == targets).cpu()
    counts = [window.n_scored for window in windows]
    parts = zip(logprobs.split(counts), greedy.split(counts), strict=True)
    return [Score(float(values.sum()), bool(hits.all())) for values, hits in parts]
