"""The generation engine: sequences join and leave a batch between two steps (continuous batching, Yu et al., OSDI 2022).

It knows tokens only; `text.py` turns them into text. Under tensor parallelism every rank makes the same calls.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.errors import ConfigError, MegagptError, TrainingError
from megagpt.inference.sampling import Draw, Sampler, Sampling
from megagpt.model.gpt import GPTChunk, activation_dtype
from megagpt.model.kv_cache import PAGE_TOKENS, LayerCache, PagePool, pages_for, place_rows

PREFILL_TOKENS = 2048
"""Largest number of prompt tokens in one forward, padding included; a longer prompt takes several steps."""
NOT_FINITE = -1
"""In place of a token id: the scores have NaN or infinity."""


@dataclass(eq=False)
class TokenSequence:
    """A text in the engine, as tokens."""

    tokens: list[int]
    """The prompt and the new tokens."""
    sampling: Sampling
    sampler: Sampler
    n_prompt: int
    finish_reason: str | None = None
    """"stop" after an end token, "length" after max_tokens, "cancelled", "error"; None while it is not finished."""
    error: MegagptError | None = None
    """Why it ended, if the reason is "error"."""
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    """Tokens whose keys and values are stored, counted from the first one that the model sees."""

    @property
    def n_new(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens) - self.n_prompt


class Generated(NamedTuple):
    """A new token of a sequence."""

    sequence: TokenSequence
    draw: Draw


class GenerationEngine:
    """Continues many sequences with one model. Each token is predicted from the last model.n_positions tokens.

    A sequence starts when there is a free row and enough free pages for its prompt and all of its new tokens; until then it
    waits, in the order of arrival. Beyond the context every token needs a forward of all positions, because each of them has
    moved.
    """

    def __init__(self, model: GPTChunk, end: Collection[int], n_tokens: int | None, cache_tokens: int, max_rows: int) -> None:
        """`end`: ids that end a text; `n_tokens`: only ids below it are generated, the size of the tokenizer.

        `cache_tokens`: tokens whose keys and values fit in the memory; `max_rows`: sequences that are continued at a time.
        """
        self.model = model
        self.positions = model.config.model.n_positions
        self._vocab_size = model.config.model.tokens_in_vocab
        self._n_tokens = min(n_tokens or self._vocab_size, self._vocab_size)
        self._end = frozenset(end)
        self.max_rows = max_rows
        self._pool = PagePool(pages_for(cache_tokens))
        self._caches = {int(index): LayerCache(self._pool.n_pages) for index in model.layers}
        self._device = next(model.parameters()).device
        self._waiting: deque[TokenSequence] = deque()
        self._running: list[TokenSequence] = []

    @property
    def n_waiting(self) -> int:
        """Sequences that have not started."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Sequences that have started."""
        return len(self._running)

    @property
    def cache_share(self) -> float:
        """Share of the pages that sequences have, 0 to 1."""
        return 1 - self._pool.n_free / self._pool.n_pages

    def add(self, prompt: Sequence[int], sampling: Sampling) -> TokenSequence:
        """Add a text to be continued.

        Raises ConfigError for a prompt that is empty or has ids that the model does not know, and for a text that would need
        more pages than there are.
        """
        self._check_prompt(prompt)
        sequence = TokenSequence(list(prompt), sampling, Sampler(sampling), len(prompt))
        needed = self._pages_needed(sequence)
        if needed > self._pool.n_pages:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and {sampling.max_tokens} new ones need a cache of "
                f"{needed * PAGE_TOKENS} tokens; there is one of {self._pool.n_pages * PAGE_TOKENS}"
            )
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: TokenSequence) -> None:
        """End a sequence; its row and its pages are free from the next step on."""
        self._finish(sequence, "cancelled")

    @torch.inference_mode()
    def step(self) -> list[Generated]:
        """Run the model at most twice: on prompts, then on texts with one new token. Returns the tokens that were drawn.

        An end token is not among them. Collective under tensor parallelism.
        """
        self._start_waiting()
        prompts = [sequence for sequence in self._running if self._n_pending(sequence) > 1]
        texts = [(sequence, 1) for sequence in self._running if self._n_pending(sequence) == 1]
        groups = [list(self._prefill_group(prompts)), texts]
        return [generated for group in groups if group for generated in self._forward(group)]

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise ConfigError("--prompt: 0 tokens; expected at least 1")
        wrong = next((token for token in prompt if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise ConfigError(
                f"--prompt: token id {wrong} is not in the model's vocabulary of {self._vocab_size}; "
                "give the tokenizer of its training"
            )

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self.max_rows:
            needed = self._pages_needed(self._waiting[0])
            if needed > self._pool.n_free:
                return
            sequence = self._waiting.popleft()
            sequence.pages = self._pool.take(needed)
            self._running.append(sequence)

    def _pages_needed(self, sequence: TokenSequence) -> int:
        return pages_for(min(sequence.n_prompt + sequence.sampling.max_tokens, self.positions))

    def _n_pending(self, sequence: TokenSequence) -> int:
        """Return how many tokens that the model sees are not stored."""
        return min(len(sequence.tokens), self.positions) - sequence.cached

    def _prefill_group(self, sequences: Sequence[TokenSequence]) -> Iterable[tuple[TokenSequence, int]]:
        """Yield the next sequences whose prompts are read together, each with its number of tokens."""
        longest = rows = 0
        for sequence in sequences:
            n_new = min(self._n_pending(sequence), PREFILL_TOKENS)
            longest, rows = max(longest, n_new), rows + 1
            if rows > 1 and rows * longest > PREFILL_TOKENS:
                return
            yield sequence, n_new

    def _forward(self, group: Sequence[tuple[TokenSequence, int]]) -> list[Generated]:
        """Run the model on some new tokens of each sequence, and draw a token for those that are read completely."""
        lengths = [sequence.cached + n_new for sequence, n_new in group]
        new = [n_new for _, n_new in group]
        rows = place_rows([sequence.pages for sequence, _ in group], lengths, new, self._device)
        tokens = torch.tensor([self._tokens_of(sequence, n_new, rows.n_new) for sequence, n_new in group])
        scores = self.model.next_token_logits(tokens.to(self._device), rows, self._caches)[:, : self._n_tokens]
        for (sequence, _), length in zip(group, lengths, strict=True):
            sequence.cached = length
        complete = [row for row, (sequence, _) in enumerate(group) if self._n_pending(sequence) == 0]
        if not complete:
            return []
        sequences = [group[row][0] for row in complete]
        draws = self._agreed(self._draw(scores[complete], sequences))
        return [
            Generated(sequence, draw)
            for sequence, draw in zip(sequences, draws, strict=True)
            if self._accept(sequence, draw.token)
        ]

    def _tokens_of(self, sequence: TokenSequence, n_new: int, length: int) -> list[int]:
        """Return the next `n_new` tokens that are not stored, with zeros in front up to `length`."""
        first = max(0, len(sequence.tokens) - self.positions) + sequence.cached
        return [0] * (length - n_new) + sequence.tokens[first : first + n_new]

    def _draw(self, scores: Tensor, sequences: Sequence[TokenSequence]) -> list[Draw]:
        """Choose a token for each row of logits [rows, vocabulary]."""
        finite = scores.isfinite().all(-1).tolist()
        if all(_is_plain_greedy(sequence.sampling) for sequence in sequences):
            best = scores.argmax(-1).tolist()
            return [Draw(token if ok else NOT_FINITE) for token, ok in zip(best, finite, strict=True)]
        scores = scores.cpu()
        return [
            sequence.sampler.draw(row, sequence.tokens) if ok else Draw(NOT_FINITE)
            for sequence, row, ok in zip(sequences, scores, finite, strict=True)
        ]

    def _agreed(self, draws: list[Draw]) -> list[Draw]:
        """Return the draws with the tokens of the first tensor rank: another kind of machine may round otherwise."""
        group = self.model.parallel.tp_group
        if group is None:
            return draws
        tokens = torch.tensor([draw.token for draw in draws], device=self._device)
        dist.broadcast(tokens, group=group, group_src=0)
        return [Draw(token, draw.logprob, draw.top) for token, draw in zip(tokens.tolist(), draws, strict=True)]

    def _accept(self, sequence: TokenSequence, token: int) -> bool:
        """Add a token to a sequence, or finish it. Returns whether it was added."""
        if token == NOT_FINITE:
            sequence.error = TrainingError(
                "the model's scores are not finite: a weight is NaN or infinite (inspect_checkpoint counts them), or a number "
                "is too large for --dtype fp16; try --dtype fp32"
            )
            self._finish(sequence, "error")
            return False
        if token in self._end:
            self._finish(sequence, "stop")
            return False
        sequence.tokens.append(token)
        if len(sequence.tokens) > self.positions:
            sequence.cached = 0  # every token moves by one position
        if sequence.n_new >= sequence.sampling.max_tokens:
            self._finish(sequence, "length")
        return True

    def _finish(self, sequence: TokenSequence, reason: str) -> None:
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence in self._running:
            self._running.remove(sequence)
            self._pool.give_back(sequence.pages)
            sequence.pages = []
        else:
            self._waiting.remove(sequence)


def _is_plain_greedy(sampling: Sampling) -> bool:
    return sampling.temperature == 0 and sampling.repetition_penalty == 1 and sampling.logprobs is None


def cache_bytes(model: GPTChunk, n_tokens: int) -> int:
    """Return the memory on this rank for the keys and values of `n_tokens` in all layers."""
    shape = model.config.model
    heads = max(1, shape.kv_heads // model.parallel.tp_size)
    return 2 * shape.n_layer * heads * shape.head_size * n_tokens * activation_dtype(model.config).itemsize
