"""Answers in the shapes of OpenAI's interface."""

import json
from collections.abc import Sequence
from typing import Any

from megagpt.data.tokenizer import Tokenizer
from megagpt.inference.sampling import Draw

JsonObject = dict[str, Any]


class Shape:
    """The shape of the answers of one request."""

    kind = ""
    """Value of "object" in a complete answer."""
    chunk_kind = ""
    """Value of "object" in a part of a stream."""

    def __init__(self, number: str, created: int, model: str, tokenizer: Tokenizer) -> None:
        """`number`: of the answer; `created`: Unix time; `model`: name of the model."""
        self._head = {"id": number, "created": created, "model": model}
        self._tokenizer = tokenizer

    def answer(self, choices: Sequence[JsonObject], n_prompt: int, n_new: int) -> JsonObject:
        """Return a complete answer. `n_prompt`, `n_new`: tokens."""
        return {**self._head, "object": self.kind, "choices": list(choices), "usage": usage(n_prompt, n_new)}

    def chunk(self, choices: Sequence[JsonObject]) -> JsonObject:
        """Return a part of a stream."""
        return {**self._head, "object": self.chunk_kind, "choices": list(choices)}

    def usage_chunk(self, n_prompt: int, n_new: int) -> JsonObject:
        """Return the last part of a stream that reports its tokens."""
        return {**self.chunk([]), "usage": usage(n_prompt, n_new)}

    def choice(self, index: int, text: str, draws: Sequence[Draw], reason: str | None, logprobs: bool) -> JsonObject:
        """Return one of the texts of a complete answer."""
        raise NotImplementedError

    def first_delta(self, index: int) -> JsonObject | None:
        """Return what a stream sends before the first text of a choice, if anything."""
        return None

    def delta(self, index: int, text: str, draws: Sequence[Draw], reason: str | None, logprobs: bool) -> JsonObject:
        """Return new text of a stream."""
        raise NotImplementedError

    def _token(self, token: int) -> str:
        return self._tokenizer.decode([token])


class CompletionShape(Shape):
    """/v1/completions."""

    kind = chunk_kind = "text_completion"

    def choice(self, index: int, text: str, draws: Sequence[Draw], reason: str | None, logprobs: bool) -> JsonObject:
        report = self._logprobs(draws) if logprobs else None
        return {"index": index, "text": text, "logprobs": report, "finish_reason": reason}

    def delta(self, index: int, text: str, draws: Sequence[Draw], reason: str | None, logprobs: bool) -> JsonObject:
        return self.choice(index, text, draws, reason, logprobs)

    def _logprobs(self, draws: Sequence[Draw]) -> JsonObject:
        tokens = [self._token(draw.token) for draw in draws]
        return {
            "tokens": tokens,
            "token_logprobs": [draw.logprob for draw in draws],
            # Several tokens may have the same text, such as parts of a character: the most likely one counts.
            "top_logprobs": [{self._token(token): value for token, value in reversed(draw.top)} for draw in draws],
            "text_offset": [sum(map(len, tokens[:number])) for number in range(len(tokens))],
        }


class ChatShape(Shape):
    """/v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, draws: Sequence[Draw], reason: str | None, logprobs: bool) -> JsonObject:
        message = {"role": "assistant", "content": text, "refusal": None}
        report = self._logprobs(draws) if logprobs else None
        return {"index": index, "message": message, "logprobs": report, "finish_reason": reason}

    def first_delta(self, index: int) -> JsonObject | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, text: str, draws: Sequence[Draw], reason: str | None, logprobs: bool) -> JsonObject:
        delta = {"content": text} if text or reason is None else {}
        report = self._logprobs(draws) if logprobs and draws else None
        return {"index": index, "delta": delta, "logprobs": report, "finish_reason": reason}

    def _logprobs(self, draws: Sequence[Draw]) -> JsonObject:
        return {"content": [self._described(draw.token, draw.logprob, draw.top) for draw in draws], "refusal": None}

    def _described(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> JsonObject:
        return {**self._named(token, logprob), "top_logprobs": [self._named(*other) for other in top]}

    def _named(self, token: int, logprob: float | None) -> JsonObject:
        text = self._token(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(n_prompt: int, n_new: int) -> JsonObject:
    """Return the numbers of tokens."""
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


def server_sent(tree: JsonObject) -> bytes:
    """Return one event of a stream."""
    return b"data: " + json.dumps(tree).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
"""The end of a stream."""
