"""Greedy and beam search for a model with an encoder: the targets that the decoder writes for sources.

Beam search keeps the most likely unfinished targets of each source, and as many finished ones, whose scores are their log
probability / length ** length_penalty. The rules for finished targets and for the end of the search are those of transformers.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megagpt.errors import ConfigError, TrainingError
from megagpt.model.encoder_decoder import EncoderDecoderChunk
from megagpt.model.memory_cache import MemoryCache

UNREACHABLE = -1e9
"""Score of a beam that does not exist yet: at first all beams of a source are the same."""


@dataclass(frozen=True)
class BeamSearch:
    """How targets are searched."""

    beams: int = 1
    """Unfinished targets of a source at a time; 1 for greedy search."""
    max_tokens: int = 100
    """Largest number of tokens of a target."""
    length_penalty: float = 1.0
    """Exponent of the length that log probabilities are divided by; above 0 longer targets are preferred."""
    early_stopping: Literal[True, False, "never"] = False
    """When the search for a source ends. True: as soon as there are as many finished targets as beams. False: when the best
    unfinished one has a lower score at its present length. "never": when no length could give it a higher score."""


class Target(NamedTuple):
    """A finished target."""

    score: float
    """Log probability / length ** length_penalty."""
    tokens: tuple[int, ...]
    """With the end token, if the target has one."""


@dataclass
class _Search:
    """The search for one source."""

    number: int
    """Which of the sources."""
    scores: list[float]
    """Log probability of each beam."""
    beams: list[tuple[int, ...]]
    """Tokens of each beam."""
    finished: list[Target] = field(default_factory=list)
    """Best first."""
    is_done: bool = False


@torch.no_grad()
def search(
    model: EncoderDecoderChunk,
    sources: Sequence[Sequence[int]],
    how: BeamSearch,
    end: Collection[int],
    n_tokens: int | None = None,
) -> list[Target]:
    """Return the best target of each source; all sources are searched at a time. Collective for tensor ranks.

    `end`: tokens that end a target; `n_tokens`: only ids below it are written.
    Raises ConfigError if targets can be longer than the model allows, and TrainingError for scores that are not finite.
    """
    config = model.config.model
    if config.position_embedding == "learned" and how.max_tokens > config.n_positions:
        raise ConfigError(
            f"targets of up to {how.max_tokens} tokens: the model has positions for {config.n_positions} (model.n_positions)"
        )
    device = model.tokens.weight.device
    lengths = torch.tensor([len(source) for source in sources], device=device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(source, device=device) for source in sources], batch_first=True)
    memory = model.encode(padded, lengths)
    caches = {int(name): MemoryCache() for name in model.decoder.layers} if model.decoder is not None else {}
    searches = [_Search(number, [0.0] + [UNREACHABLE] * (how.beams - 1), [()] * how.beams) for number in range(len(sources))]
    results: dict[int, Target] = {}
    tokens = torch.full((len(sources), 1), config.decoder_start, device=device)
    for position in range(how.max_tokens):
        scores = model.next_token_logits(tokens, position, memory, lengths, caches).float()[:, :n_tokens].log_softmax(-1)
        if not bool(scores.isfinite().any(-1).all()):
            raise TrainingError("the model's scores are not finite, so no target can be written")
        if position == 0:  # so far one row for each source
            scores = scores.repeat_interleave(how.beams, 0)
        parents = [_advance(one, rows, how, end) for one, rows in zip(searches, scores.split(how.beams), strict=True)]
        results |= {one.number: one.finished[0] for one in searches if one.is_done}
        kept = [index for index, one in enumerate(searches) if not one.is_done]
        if not kept:
            break
        rows_of = 1 if position == 0 else how.beams
        rows = [index * rows_of + (0 if position == 0 else beam) for index in kept for beam in parents[index]]
        changes_sources = position == 0 or len(kept) < len(searches)
        selected = torch.tensor(rows, device=device)
        for cache in caches.values():
            cache.select(selected, sources_too=changes_sources)
        lengths = lengths[selected] if changes_sources else lengths
        searches = [searches[index] for index in kept]
        tokens = torch.tensor([[beam[-1]] for one in searches for beam in one.beams], device=device)
    return [results[number] for number in range(len(sources))]


def _advance(search: _Search, scores: Tensor, how: BeamSearch, end: Collection[int]) -> list[int]:
    """Add one token to the beams of a source; return the number of the beam that each new one continues.

    scores: log probability of each next token, [beams, vocabulary].
    """
    vocabulary = scores.shape[1]
    totals = scores + torch.tensor(search.scores, device=scores.device).unsqueeze(1)
    # With so many candidates, enough are left if the best ones all end.
    n_candidates = min(max(2, 1 + len(end)) * how.beams, totals.numel())
    best = totals.flatten().topk(n_candidates)
    length = len(search.beams[0]) + 1
    candidates = [
        (score, divmod(index, vocabulary)) for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    next_beams: list[tuple[float, int, tuple[int, ...]]] = []
    is_full = len(search.finished) == how.beams
    for rank, (score, (beam, token)) in enumerate(candidates):
        target = (*search.beams[beam], token)
        if token in end or length == how.max_tokens:
            if rank < how.beams and not (is_full and how.early_stopping is True):
                search.finished.append(Target(score / length**how.length_penalty, target))
        elif len(next_beams) < how.beams:
            next_beams.append((score, beam, target))
    search.finished = sorted(search.finished, key=lambda found: -found.score)[: how.beams]
    search.scores = [score for score, _, _ in next_beams]
    search.beams = [target for _, _, target in next_beams]
    search.is_done = _is_done(search, length, how)
    return [beam for _, beam, _ in next_beams]


def _is_done(search: _Search, length: int, how: BeamSearch) -> bool:
    """Whether the search has ended, by the rule of `BeamSearch.early_stopping`."""
    if not search.scores:
        return True
    if len(search.finished) < how.beams:
        return False
    if how.early_stopping is True or how.beams == 1:
        return True
    could_grow = how.early_stopping == "never" and how.length_penalty > 0
    best = search.scores[0] / (how.max_tokens if could_grow else length) ** how.length_penalty
    return best <= search.finished[-1].score
