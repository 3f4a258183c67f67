"""A dialogue that stays within the model's context: the oldest turns are left out when it becomes too long."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megagpt.data.chat_template import ChatTemplate
from megagpt.errors import ConfigError

Message = dict[str, str]
"""One message: "role" and "content"."""


class ShortenedPrompt(NamedTuple):
    """The tokens that the model continues."""

    ids: list[int]
    n_dropped: int
    """Messages that were left out."""


@dataclass
class Dialogue:
    """Messages of a dialogue, and what the model sees of them."""

    template: ChatTemplate
    positions: int
    """The model's context in tokens."""
    max_tokens: int
    """Tokens of the context that are kept free for the answer."""
    system: str | None = None
    """Instructions that are never left out."""

    def __post_init__(self) -> None:
        self._messages: list[Message] = []

    def add(self, role: str, content: str) -> None:
        """Add a message of the "user" or the "assistant"."""
        self._messages.append({"role": role, "content": content})

    def remove_last(self) -> None:
        """Remove the last message."""
        self._messages.pop()

    def clear(self) -> None:
        """Forget all messages but the system's."""
        self._messages = []

    def prompt(self) -> ShortenedPrompt:
        """Return the prompt for the next answer; forget the oldest turns if it would be too long.

        Raises ConfigError if the last message alone is too long.
        """
        n_dropped = 0
        while True:
            ids = self.template.prompt(self._visible())
            if len(ids) + self.max_tokens <= self.positions:
                return ShortenedPrompt(ids, n_dropped)
            later = self._start_of_next_turn()
            if later is None:
                raise ConfigError(
                    f"the message has {len(ids)} tokens with the template; with {self.max_tokens} for the answer "
                    f"(--max-tokens) the model's context has room for {max(0, self.positions - self.max_tokens)}"
                )
            n_dropped += later
            self._messages = self._messages[later:]

    def _visible(self) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self._messages]

    def _start_of_next_turn(self) -> int | None:
        """Return the index of the second message of the user, or None if there is none."""
        later = [index for index, message in enumerate(self._messages) if index > 0 and message["role"] == "user"]
        return later[0] if later else None


def split_end(template: ChatTemplate) -> tuple[frozenset[int], Sequence[str]]:
    """Return the token ids and the strings of which each ends an answer."""
    ids = template.end_of_turn()
    if len(ids) == 1:
        return frozenset(ids), ()
    text = template.tokenizer.decode(ids)
    return frozenset(), [text] if text else []
