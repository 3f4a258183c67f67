"""The fields of requests: what is accepted, and what it means for the engine."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megagpt.inference.sampling import Sampling
from megagpt.serving.errors import RequestError

MAX_SEED = 2**63 - 1
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Request(BaseModel):
    """Fields of both kinds of request. Unknown fields, and values without effect here, are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    n: int = Field(default=1, ge=1, le=128)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    user: str | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def reports_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] = 1
    suffix: None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, each a text or its tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class _TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class _Message(BaseModel):
    """A message of a dialogue."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: str
    content: str | list[_TextPart]
    name: str | None = None


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages with text as content."""
        return [
            {
                "role": message.role,
                "content": message.content
                if isinstance(message.content, str)
                else "".join(part.text for part in message.content),
            }
            for message in self.messages
        ]


class Limits(NamedTuple):
    """What a server accepts."""

    positions: int
    """Tokens of prompt and answer together: the model's context."""
    max_output_tokens: int
    """Tokens of an answer."""
    max_texts: int
    """Texts of one request: prompts times n."""
    max_stops: int = 16
    max_stop_length: int = 200


def parse(kind: type[BaseModel], tree: Any) -> Any:
    """Return the request. Raises RequestError that names the first field that is wrong."""
    if not isinstance(tree, dict):
        raise RequestError(400, f"expected a JSON object, found {type(tree).__name__}")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in detail["loc"] if not _is_type_name(part))
        text = {"extra_forbidden": "no such field", "missing": "required, but missing"}.get(detail["type"], detail["msg"])
        raise RequestError(400, f"{field}: {text[0].lower()}{text[1:]}", param=field) from None


def _is_type_name(part: int | str) -> bool:
    """Whether pydantic added this to a field's place, for a member of a union type."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool", "none"))


def sampling_of(request: _Request, n_prompt: int, limits: Limits, logprobs: int | None, default_tokens: int | None) -> Sampling:
    """Return how the answer is chosen, without its seed. `default_tokens`: of an answer if the request does not say.

    Raises RequestError if prompt and answer are longer than the limits.
    """
    room = limits.positions - n_prompt
    asked = getattr(request, "max_completion_tokens", None) or request.max_tokens
    max_tokens = asked if asked is not None else min(default_tokens or room, room, limits.max_output_tokens)
    if max_tokens > limits.max_output_tokens:
        raise RequestError(
            400, f"max_tokens: {max_tokens} is above this server's limit of {limits.max_output_tokens}", param="max_tokens"
        )
    if n_prompt + max(1, max_tokens) > limits.positions:
        raise RequestError(
            400,
            f"the prompt has {n_prompt} tokens, and with {max(1, max_tokens)} for the answer that is more than the model's "
            f"context of {limits.positions}",
            param="messages" if isinstance(request, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    _check_stops(request.stops, limits)
    return Sampling(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        logprobs=logprobs,
    )


def _check_stops(stops: Sequence[str], limits: Limits) -> None:
    if len(stops) > limits.max_stops:
        raise RequestError(400, f"stop: {len(stops)} texts; expected at most {limits.max_stops}", param="stop")
    if any(not 0 < len(stop) <= limits.max_stop_length for stop in stops):
        raise RequestError(400, f"stop: expected texts of 1 to {limits.max_stop_length} characters", param="stop")
