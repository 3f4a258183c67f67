"""Chat templates: messages to token ids, with a mask of the tokens that the assistant writes."""

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megagpt.data.chat_tokens import ChatEncoder, Marks, chat_encoder
from megagpt.data.jinja_templates import JinjaTemplate
from megagpt.data.tokenizer import (
    DECLARATIONS,
    MAX_TOKENIZER_BYTES,
    HuggingFaceTokenizer,
    SpannedToken,
    Tokenizer,
    load_tokenizer,
    require_characters,
    tokenizer_files,
)
from megagpt.errors import DataError
from megagpt.regular_file import read_regular_file

Message = Mapping[str, Any]
"""One message of a chat: "role" and "content", and further keys that a template may read."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
ASSISTANT = "assistant"
TEMPLATE_FILE = "chat_template.jinja"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BUILT_IN = {"chatml": CHATML}
"""Templates that can be named instead of a file, for tokenizers without one."""
_VARIABLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SENTINEL = "\U000ffff0"
_PROBE = ({"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "b"})


class EncodedChat(NamedTuple):
    """A chat as tokens."""

    ids: list[int]
    mask: list[bool]
    """True for the tokens that the assistant writes, including the one that ends its turn."""


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, template: JinjaTemplate, variables: Mapping[str, str]) -> None:
        """`variables`: texts of special tokens, such as bos_token."""
        self.tokenizer = tokenizer
        self._template = template
        self._eos = variables["eos_token"]
        self._variables: dict[str, Any] = {"tools": None, "documents": None, **variables}
        self._encoder: ChatEncoder = chat_encoder(tokenizer)
        # An added token that is not special, such as <think>, is one for the assistant only if the template writes it.
        self._forbidden = set(tokenizer.control_tokens)
        written = {text for text in tokenizer.special_tokens if text.strip() and text in template.source}
        self._forbidden_to_others = self._forbidden | written

    @classmethod
    def load(cls, tokenizer: str, template: str | None = None) -> "ChatTemplate":
        """Load the template of a tokenizer, as `load_tokenizer` finds it.

        `template`: a template to use instead: "chatml", a file, or the name of one of several in the tokenizer_config.json.
        Raises DataError if there is none, or if it is not valid.
        """
        files = tokenizer_files(tokenizer)
        declared = _declarations(files)
        loaded = load_tokenizer(tokenizer)
        source = _find(tokenizer, files, declared.get("chat_template"), template)
        variables = {name: text for name in _VARIABLES if (text := _token_text(declared.get(name))) is not None}
        if isinstance(loaded, HuggingFaceTokenizer):
            variables.setdefault("eos_token", loaded.eod_token)
        else:
            variables.setdefault("eos_token", _text_of(loaded, loaded.eod_id))
        return cls(loaded, source, variables)

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of the messages, as transformers' `apply_chat_template(tokenize=False)` does. Raises DataError."""
        check_messages(messages)
        return self._render(messages, add_generation_prompt)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the messages and of the start of the assistant's next turn. Raises DataError."""
        check_messages(messages)
        marks, hidden = self._hide(messages)
        return [token.id for token in self._encoder.encode(self._render(hidden, True), marks)]

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """Return the ids of a complete chat, and which of them the assistant writes.

        Raises DataError for messages that are not valid, and if the assistant's text cannot be found in the chat.
        """
        check_messages(messages)
        marks, hidden = self._hide(messages)
        rendered = self._template.render(hidden, add_generation_prompt=False, **self._variables)
        tokens = self._encoder.encode(rendered.text, marks)
        if rendered.generated:
            ranges = rendered.generated
        else:
            turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
            ranges = [self._response(hidden, turn, rendered.text, tokens) for turn in turns]
        ids, starts, ends = np.array(tokens, np.int64).reshape(-1, 3).T
        mask = np.zeros(len(ids), np.bool_)
        for part in ranges:
            mask |= (part.start <= starts) & (ends <= part.stop)
        return EncodedChat(ids.tolist(), mask.tolist())

    def end_of_turn(self) -> list[int]:
        """Return the ids that end the assistant's turn: generation stops when the model has written them.

        Empty if the template writes nothing behind the assistant's text.
        """
        chat = self.encode(_PROBE)
        written = [token for token, mine in zip(chat.ids, chat.mask, strict=True) if mine]
        special = [token for token in written if token in self._encoder.special_ids]
        if special:
            return special[-1:]
        return written[len(self.tokenizer.encode(_PROBE[1]["content"])) :]

    def text_tokens(self) -> list[str]:
        """Return texts in the template that look like special tokens (<|...|>), but that the tokenizer has not as tokens."""
        rendered = self._render(_PROBE, True)
        known = {*self.tokenizer.control_tokens, *self.tokenizer.special_tokens}
        found = [f"<|{part.split('|>')[0]}|>" for part in rendered.split("<|")[1:] if "|>" in part]
        return [text for text in dict.fromkeys(found) if text not in known]

    def _hide(self, messages: Sequence[Message]) -> tuple[Marks, list[Message]]:
        """Return the messages with marks in place of special tokens."""
        marks = Marks(self._forbidden_to_others, messages)
        return marks, [
            marks.hide(message, self._forbidden if message["role"] == ASSISTANT else self._forbidden_to_others)
            for message in messages
        ]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, **self._variables).text

    def _response(self, messages: Sequence[Message], turn: int, text: str, tokens: Sequence[SpannedToken]) -> range:
        """Return the characters of the chat's text that the assistant writes in a turn."""
        prompt, answered = self._render(messages[:turn], True), self._render(messages[: turn + 1], False)
        if not text.startswith(answered):  # some templates end the last turn only, with eos_token
            answered = answered.rstrip().removesuffix(self._eos)
        if answered.startswith(prompt) and text.startswith(answered):
            span = range(len(prompt), len(answered))
            ends = [token.end for token in tokens if token.id in self._encoder.special_ids and _within(token, span)]
            return range(span.start, ends[-1]) if ends else span
        return self._content(messages, turn, text, tokens)

    def _content(self, messages: Sequence[Message], turn: int, text: str, tokens: Sequence[SpannedToken]) -> range:
        """Return the characters of a message's content, and of the special token right behind it.

        For templates that write a turn otherwise when others follow it.
        """
        marked = [*messages]
        marked[turn] = {**messages[turn], "content": _SENTINEL}
        before, found, after = self._render(marked, False).partition(_SENTINEL)
        if not found or not text.startswith(before) or not text.endswith(after) or len(before) + len(after) >= len(text):
            raise DataError(
                f"chat template of {self._template.where}: the text of message {turn + 1} cannot be found in the chat, because "
                "the template changes it; put {% generation %} and {% endgeneration %} around it in the template"
            )
        end = len(text) - len(after)
        behind = [
            t.end for t in tokens if t.id in self._encoder.special_ids and t.start >= end and not text[end : t.start].strip()
        ]
        return range(len(before), behind[0] if behind else end)


def check_messages(messages: object) -> None:
    """Raise DataError unless `messages` is a list of messages with a known role and text as content."""
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError('expected a list of messages, such as [{"role": "user", "content": "..."}]')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise DataError(f'message {number}: expected an object with "role" and "content"')
        role = message.get("role")
        if role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, n=1)
            hint = f"; nearest: {near[0]!r}" if near else f"; known: {', '.join(ROLES)}"
            raise DataError(f"message {number}: {'no role' if role is None else f'unknown role {role!r}'}{hint}")
        if not isinstance(message.get("content"), str):
            raise DataError(f'message {number} ({role}): expected text under "content"')
        require_characters(message["content"], f"message {number} ({role})")


def _within(token: SpannedToken, span: range) -> bool:
    return span.start <= token.start and token.end <= span.stop


def _declarations(files: Mapping[str, Path]) -> dict[str, Any]:
    """Return what the files beside a tokenizer declare; the first file that has a key counts."""
    merged: dict[str, Any] = {}
    for name in DECLARATIONS:
        if name in files:
            try:
                merged = json.loads(read_regular_file(files[name], MAX_TOKENIZER_BYTES)) | merged
            except (OSError, ValueError, TypeError, RecursionError):
                raise DataError(f"{files[name]}: expected a JSON object, as Hugging Face writes it") from None
    return merged


def _find(tokenizer: str, files: Mapping[str, Path], declared: object, wanted: str | None) -> JinjaTemplate:
    """Return the template of a file, of tokenizer_config.json, or a built-in one."""
    named = _named(declared)
    config = str(files.get(DECLARATIONS[0], tokenizer))
    if wanted in BUILT_IN:
        return JinjaTemplate(BUILT_IN[wanted], wanted)
    if wanted is not None and wanted in named:
        return JinjaTemplate(named[wanted], f"{config} ({wanted})")
    if wanted is not None:
        return JinjaTemplate(_read(wanted, [*BUILT_IN, *named]), wanted)
    if TEMPLATE_FILE in files:
        return JinjaTemplate(_read(str(files[TEMPLATE_FILE]), []), str(files[TEMPLATE_FILE]))
    if "default" in named:
        return JinjaTemplate(named["default"], config)
    names = f"; it has {', '.join(named)}, of which none is the default" if named else ""
    raise DataError(
        f"{tokenizer}: has no chat template{names}; expected {TEMPLATE_FILE}, or chat_template in {DECLARATIONS[0]}; for one "
        "without, name chatml or a file with a Jinja template"
    )


def _named(declared: object) -> dict[str, str]:
    """Return the templates of tokenizer_config.json by name: one text, or a list of objects with a name and a template."""
    if isinstance(declared, str):
        return {"default": declared}
    if isinstance(declared, dict):
        return {str(name): text for name, text in declared.items() if isinstance(text, str)}
    entries = declared if isinstance(declared, list) else []
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _read(path: str, names: Sequence[str]) -> str:
    try:
        return read_regular_file(Path(path), MAX_TOKENIZER_BYTES).decode()
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(path, names, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "not UTF-8 text"
        known = f", or one of: {', '.join(names)}" if names else ""
        raise DataError(f"{path}: {reason}; expected a file with a Jinja template{known}{hint}") from None


def _token_text(declared: object) -> str | None:
    """Return the text of a special token, which may be declared as an object."""
    text = declared.get("content") if isinstance(declared, dict) else declared
    return text if isinstance(text, str) else None


def _text_of(tokenizer: Tokenizer, wanted: int) -> str:
    return next(text for text, token in tokenizer.control_tokens.items() if token == wanted)
