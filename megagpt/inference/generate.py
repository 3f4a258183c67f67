"""Continue texts with the generation engine: from prompts as tokens to pieces of text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megagpt.data.tokenizer import Tokenizer
from megagpt.inference.engine import GenerationEngine, TokenSequence
from megagpt.inference.sampling import Draw, Sampling
from megagpt.inference.text import TextStream


@dataclass(eq=False)
class Completion:
    """A text that is being continued."""

    sequence: TokenSequence
    stream: TextStream
    draws: list[Draw] = field(default_factory=list)
    """The new tokens."""

    @property
    def text(self) -> str:
        """The new text, up to the stop string."""
        return self.stream.text

    @property
    def finish_reason(self) -> str | None:
        """ "stop" after an end token or a stop string, "length", "cancelled", "error"; None while it is not finished."""
        return "stop" if self.stream.stopped else self.sequence.finish_reason


class Piece(NamedTuple):
    """What one step added to a text."""

    completion: Completion
    text: str
    """New text, possibly none: a character or a stop string may not be complete yet."""
    draws: tuple[Draw, ...]
    finish_reason: str | None
    """Why the text ended with this piece; None if it is not finished."""


class TextGenerator:
    """Continues texts. Requests can be added and cancelled between steps."""

    def __init__(self, engine: GenerationEngine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._active: dict[TokenSequence, Completion] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a text is not finished."""
        return bool(self._active)

    def add(self, prompt: Sequence[int], sampling: Sampling, stop: Sequence[str] = ()) -> Completion:
        """Add a text to be continued, which ends before the first of the strings `stop`. Raises ConfigError."""
        sequence = self.engine.add(prompt, sampling)
        self._active[sequence] = Completion(sequence, TextStream(self.tokenizer, prompt, stop))
        return self._active[sequence]

    def cancel(self, completion: Completion) -> None:
        """End a text that is not wanted any more."""
        if self._active.pop(completion.sequence, None) is not None:
            self.engine.cancel(completion.sequence)

    def step(self) -> list[Piece]:
        """Run one step of the engine. Returns a piece for each text that grew or ended. Collective."""
        new: dict[TokenSequence, tuple[str, tuple[Draw, ...]]] = {}
        for sequence, draw in self.engine.step():
            completion = self._active[sequence]
            completion.draws.append(draw)
            new[sequence] = (completion.stream.add(draw.token), (draw,))
        pieces = []
        for sequence, completion in list(self._active.items()):
            text, draws = new.get(sequence, ("", ()))
            if completion.stream.stopped:
                self.engine.cancel(sequence)
            if completion.finish_reason is not None:
                text += completion.stream.finish()
                del self._active[sequence]
            if draws or completion.finish_reason is not None:
                pieces.append(Piece(completion, text, draws, completion.finish_reason))
        return pieces

    def run(self) -> Iterator[Piece]:
        """Yield pieces until all texts are finished. Raises TrainingError if the model's scores are not finite."""
        while self.is_busy:
            for piece in self.step():
                if piece.completion.sequence.error is not None:
                    raise piece.completion.sequence.error
                yield piece
