"""How the next token is chosen from the model's scores."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one text is continued. The order is that of transformers: penalty, temperature, top-k, top-p, min-p."""

    max_tokens: int = 100
    """Largest number of new tokens."""
    temperature: float = 1.0
    """Divides the scores; 0 selects the most likely token."""
    top_k: int | None = None
    """Draw from this many most likely tokens; from all if None."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together have at least this probability (Holtzman et al., arXiv 1904.09751)."""
    min_p: float = 0.0
    """Draw from the tokens with at least this share of the largest probability (Nguyen et al., arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Scores of tokens that the text has already: positive ones are divided by it, negative ones multiplied (Keskar et al.,
    arXiv 1909.05858)."""
    seed: int = 0
    """Seed of the draws: the same scores give the same tokens on every device, whatever else the batch has."""
    logprobs: int | None = None
    """Report the log-probability of each token, and of this many most likely ones; None for no report."""


@dataclass(frozen=True)
class Draw:
    """A token that was chosen."""

    token: int
    logprob: float | None = None
    """Natural logarithm of its probability by the model, before temperature, penalty and filters, if asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log-probabilities, most likely first, if asked for."""


class Sampler:
    """Chooses the tokens of one text."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def draw(self, scores: Tensor, seen: Collection[int]) -> Draw:
        """Choose a token id from finite logits [vocabulary], on the CPU in fp64. `seen`: the tokens of the text so far."""
        scores = scores.cpu().double()
        token = self._choose(scores, seen)
        if self._sampling.logprobs is None:
            return Draw(token)
        logprobs = scores.log_softmax(-1)
        best = logprobs.topk(min(self._sampling.logprobs, len(logprobs)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Draw(token, float(logprobs[token]), top)

    def _choose(self, scores: Tensor, seen: Collection[int]) -> int:
        sampling = self._sampling
        if sampling.repetition_penalty != 1:
            scores = penalised(scores, seen, sampling.repetition_penalty)
        if sampling.temperature == 0:
            return int(scores.argmax())
        ids = None
        if sampling.top_k is not None and sampling.top_k < len(scores):
            scores, ids = scores.topk(sampling.top_k)
        # The largest score becomes 0, so no temperature leads to an overflow.
        probabilities = ((scores - scores.max()) / sampling.temperature).softmax(-1)
        if sampling.top_p < 1:
            probabilities = most_likely_share(probabilities, sampling.top_p)
        if sampling.min_p > 0:
            probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0)
        index = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return index if ids is None else int(ids[index])


def penalised(scores: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """Return the scores with those of the tokens in `seen` lowered; see `Sampling.repetition_penalty`."""
    ids = torch.tensor(sorted({token for token in seen if token < len(scores)}), dtype=torch.int64)
    before = scores[ids]
    return scores.index_copy(0, ids, torch.where(before > 0, before / penalty, before * penalty))


def most_likely_share(probabilities: Tensor, share: float) -> Tensor:
    """Return the probabilities, 0 beyond the fewest most likely tokens that together have at least `share`."""
    ordered, ids = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0)[:-1]  # of the tokens from the second on; the most likely one stays in any case
    return probabilities.index_fill(0, ids[1:][before >= share], 0)
