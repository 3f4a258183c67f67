"""Token ids of a rendered chat: the template's special tokens are special, and the same text in a message is text."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import tokenizers

from megagpt.data.tokenizer import HuggingFaceTokenizer, SpannedToken, Tokenizer, encode_spans
from megagpt.errors import DataError

_FIRST_MARK, _LAST_MARK = 0xF0000, 0xFFF00
"""Characters for private use, from which those are taken that no message has."""
_ANCHOR = "\U000fffd0"
_NEVER = "(?!)"
"""A regular expression that matches nothing."""


class Marks:
    """Replaces the texts of special tokens in messages by single characters, so that neither templates nor tokenizers
    take them for special tokens."""

    def __init__(self, special: Iterable[str], messages: object) -> None:
        """`special`: texts to replace; `messages`: in which no mark may occur already."""
        texts = list(special)
        used = set().union(*_strings(messages))
        free = (chr(code) for code in range(_FIRST_MARK, _LAST_MARK) if chr(code) not in used)
        self._mark_of = dict(zip(texts, free, strict=False))
        self._text_of = {mark: text for text, mark in self._mark_of.items()}

    def hide(self, value: Any, texts: Iterable[str]) -> Any:
        """Return the value with marks for `texts` in all of its strings."""
        longest_first = sorted(texts, key=len, reverse=True)  # a longer text may contain a shorter one
        pattern = re.compile("|".join(map(re.escape, longest_first)) or _NEVER)

        def hidden(part: Any) -> Any:
            if isinstance(part, str):
                return pattern.sub(lambda match: self._mark_of[match[0]], part)
            if isinstance(part, Mapping):
                return {key: hidden(item) for key, item in part.items()}
            if isinstance(part, list | tuple):
                return [hidden(item) for item in part]
            return part

        return hidden(value)

    def restore(self, text: str) -> tuple[str, list[int]]:
        """Return the text without marks, and for each of its characters, and its end, the position in the marked text."""
        characters: list[str] = []
        origins: list[int] = []
        for position, character in enumerate(text):
            original = self._text_of.get(character, character)
            characters.append(original)
            origins += [position] * len(original)
        return "".join(characters), [*origins, len(text)]

    def are_in(self, text: str) -> bool:
        """Return whether the text has a mark."""
        return not self._text_of.keys().isdisjoint(text)


class ChatEncoder(Protocol):
    """Encodes the text of a chat."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that end turns or documents."""

    def encode(self, text: str, marks: Marks) -> list[SpannedToken]:
        """Return the tokens of a text, in which special tokens are special, and marks stand for text.

        Raises DataError if the tokenizer cannot write such a text with ordinary tokens.
        """


def chat_encoder(tokenizer: Tokenizer) -> ChatEncoder:
    """Return the encoder that belongs to a tokenizer."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return HuggingFaceEncoder(tokenizer)
    return SplittingEncoder(tokenizer)


class ParsingTokenizer:
    """A tokenizer for texts that carry special tokens on purpose: their texts become the tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encoder = chat_encoder(tokenizer)
        self._no_marks = Marks([], "")
        self.vocab_size, self.eod_id = tokenizer.vocab_size, tokenizer.eod_id
        self.control_tokens = tokenizer.control_tokens
        self.special_tokens = list(dict.fromkeys([*tokenizer.special_tokens, *tokenizer.control_tokens]))

    def encode(self, text: str) -> list[int]:
        return [token.id for token in self.encode_spans(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_spans(self, text: str) -> list[SpannedToken]:
        return self._encoder.encode(text, self._no_marks)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


def parsing_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer that takes the texts of special tokens for the tokens; the same one if it does so already."""
    return tokenizer if tokenizer.control_tokens.keys() <= set(tokenizer.special_tokens) else ParsingTokenizer(tokenizer)


class HuggingFaceEncoder:
    """Encodes the entire chat at once, as transformers does. Only a stretch of text with a mark is encoded on its own."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._source = tokenizer.source
        content = tokenizer.to_json()
        self._tokenizer = tokenizers.Tokenizer.from_str(content)
        declared = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        # GPT-2's two files declare no special token.
        self._tokenizer.add_special_tokens([text for text in tokenizer.control_tokens if text not in declared])
        self._added_ids = frozenset(self._tokenizer.get_added_tokens_decoder())
        self.special_ids = frozenset(tokenizer.control_tokens.values())
        # A stretch behind the anchor is encoded as in the middle of a text: some tokenizers put a space before the first
        # word of a text only.
        self._plain = tokenizers.Tokenizer.from_str(_without_added_tokens(content))
        self._plain.add_special_tokens([tokenizers.AddedToken(_ANCHOR, normalized=False)])

    def encode(self, text: str, marks: Marks) -> list[SpannedToken]:
        tokens = encode_spans(self._tokenizer, text, self._source)
        if not marks.are_in(text):
            return tokens
        borders = [token for token in tokens if token.id in self._added_ids]
        result: list[SpannedToken] = []
        position = 0
        for border in [*borders, None]:
            end = len(text) if border is None else border.start
            if marks.are_in(text[position:end]):
                result += self._encode_marked(text[position:end], position, marks)
            else:
                result += [token for token in tokens if token.id not in self._added_ids and position <= token.start < end]
            if border is not None:
                result.append(border)
                position = border.end
        return result

    def _encode_marked(self, stretch: str, offset: int, marks: Marks) -> list[SpannedToken]:
        text, origins = marks.restore(stretch)
        anchor = _ANCHOR if offset else ""
        tokens = encode_spans(self._plain, anchor + text, self._source)[len(anchor) :]
        tokens = [SpannedToken(token.id, token.start - len(anchor), token.end - len(anchor)) for token in tokens]
        return _moved(_only_text(tokens, self.special_ids, text), origins, offset)


class SplittingEncoder:
    """For tokenizers that find no special tokens in a text: each stretch between special tokens is encoded on its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.control_tokens
        self.special_ids = frozenset(self._ids.values())
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) or _NEVER)

    def encode(self, text: str, marks: Marks) -> list[SpannedToken]:
        tokens: list[SpannedToken] = []
        position = 0
        for match in self._pattern.finditer(text):
            tokens += self._encode_text(text[position : match.start()], position, marks)
            tokens.append(SpannedToken(self._ids[match[0]], *match.span()))
            position = match.end()
        return tokens + self._encode_text(text[position:], position, marks)

    def _encode_text(self, stretch: str, offset: int, marks: Marks) -> list[SpannedToken]:
        text, origins = marks.restore(stretch)
        return _moved(_only_text(self._tokenizer.encode_spans(text), self.special_ids, text), origins, offset)


def _moved(tokens: list[SpannedToken], origins: list[int], offset: int) -> list[SpannedToken]:
    """Return the tokens of a restored text at their positions in the marked chat."""
    return [SpannedToken(token.id, offset + origins[token.start], offset + origins[token.end]) for token in tokens]


def _only_text(tokens: list[SpannedToken], special: frozenset[int], text: str) -> list[SpannedToken]:
    if any(token.id in special for token in tokens):
        raise DataError(
            f"the tokenizer writes a special token for the plain text {text[:80]!r}, so a message could end its own turn"
        )
    return tokens


def _without_added_tokens(tokenizer_json: str) -> str:
    content = json.loads(tokenizer_json)
    content["added_tokens"] = []
    return json.dumps(content)


def _strings(value: object) -> Iterator[str]:
    """Yield all strings in messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
