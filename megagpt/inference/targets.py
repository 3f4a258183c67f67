"""Texts that a model with an encoder writes for source texts."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megagpt.inference.beam_search import BeamSearch, search
from megagpt.inference.source import TrainedModel


class Written(NamedTuple):
    """A text that was written for a source."""

    text: str
    n_tokens: int
    """With the end token, if there is one."""
    score: float
    """Log probability / length ** length_penalty."""
    ended: bool
    """Whether the model ended the text."""


class TargetWriter:
    """Writes texts by greedy or beam search."""

    def __init__(self, trained: TrainedModel, how: BeamSearch) -> None:
        """Raises ConfigError for a model without an encoder."""
        self._trained = trained
        self._model = trained.encoder_decoder
        self._how = how

    def encode(self, text: str) -> list[int]:
        """Return the source's tokens, as in training: with the end-of-document token. A longer text loses its end."""
        tokenizer, limit = self._trained.tokenizer, self._trained.config.model.source_length
        return [*tokenizer.encode(text)[: limit - 1], tokenizer.eod_id]

    def write(self, texts: Sequence[str], batch: int = 16) -> Iterator[Written]:
        """Yield what is written for each text, in order. `batch`: texts at a time. Collective for tensor ranks.

        Raises ConfigError and TrainingError as `search` does.
        """
        trained = self._trained
        for first in range(0, len(texts), batch):
            sources = [self.encode(text) for text in texts[first : first + batch]]
            for target in search(self._model, sources, self._how, trained.end, trained.tokenizer.vocab_size):
                ended = target.tokens[-1] in trained.end
                ids = list(target.tokens[:-1] if ended else target.tokens)
                yield Written(trained.tokenizer.decode(ids), len(target.tokens), target.score, ended)
