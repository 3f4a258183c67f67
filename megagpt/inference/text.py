"""New tokens become text piece by piece: no half character and no part of a stop string is ever shown."""

from collections.abc import Sequence

from megagpt.data.tokenizer import Tokenizer

CONTEXT_TOKENS = 4
"""Tokens before a new one that are decoded with it: some tokenizers drop a space at the start of a text."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for the first bytes of a character whose other bytes are in the next tokens."""
LONGEST_CHARACTER = 4
"""Bytes, so at most tokens, of a character in UTF-8."""


class TextStream:
    """The text of new tokens after a prompt, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._context = list(prompt[-CONTEXT_TOKENS:])
        self._pending: list[int] = []
        self._shown = 0
        self.text = ""
        """All complete characters so far, without the stop string."""
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, token: int) -> str:
        """Add a token; return what can be shown now."""
        self._pending.append(token)
        return self._decode(len(self._pending) > LONGEST_CHARACTER)

    def finish(self) -> str:
        """Return the rest: no more tokens follow."""
        shown = "" if self.stopped else self._decode(complete=True)
        return shown + self._show(len(self.text))

    def _decode(self, complete: bool) -> str:
        """Decode the pending tokens, unless they end in the middle of a character and are not `complete`."""
        before = self._tokenizer.decode(self._context)
        both = self._tokenizer.decode([*self._context, *self._pending])
        if self.stopped or (both.endswith(UNFINISHED) and not complete):
            return ""
        new = both[len(before) :] if both.startswith(before) else self._tokenizer.decode(self._pending)
        self._context = [*self._context, *self._pending][-CONTEXT_TOKENS:]
        self._pending = []
        start = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += new
        found = [position for stop in self._stop if (position := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self._show(len(self.text))
        return self._show(len(self.text) - self._possible_stop())

    def _possible_stop(self) -> int:
        """Return the length of the longest end of the text that is the start of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        ends = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(self.text[-n:]) for stop in self._stop)), 0)

    def _show(self, end: int) -> str:
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new
