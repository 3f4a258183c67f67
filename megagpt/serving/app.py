"""The routes of the server."""

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from megagpt.data.chat_template import ChatTemplate
from megagpt.errors import DataError
from megagpt.inference.dialogue import split_end
from megagpt.inference.sampling import Draw
from megagpt.inference.source import TrainedModel
from megagpt.serving.answers import DONE, ChatShape, CompletionShape, JsonObject, Shape, server_sent
from megagpt.serving.errors import RequestError
from megagpt.serving.requests import ChatRequest, CompletionRequest, Limits, parse, sampling_of
from megagpt.serving.worker import EngineWorker, Event, Text, Ticket

PAGE = Path(__file__).parent / "chat.html"
CONTENT_POLICY = "default-src 'self' 'unsafe-inline'; img-src data:"
"""The page loads nothing from elsewhere."""
LOCAL_HOSTS = ["localhost", "127.0.0.1", "[::1]"]
"""Values of the Host header that a server without a key accepts: a page elsewhere must not reach it under another name."""
LEFT = 499
"""Status in the metrics of a request whose client left before the answer (nginx's)."""
COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions if a request has none, as in OpenAI's."""
PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
"""Paths that the metrics name."""
OPEN_PATHS = ("/", "/health")
"""Paths that need no key."""


@dataclass(frozen=True)
class Service:
    """What the routes need."""

    trained: TrainedModel
    template: ChatTemplate | None
    worker: EngineWorker
    limits: Limits
    name: str
    """Name of the model for clients."""
    max_request_bytes: int
    api_key: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))


def create_app(service: Service) -> FastAPI:
    """Return the application. Its engine works while the application runs."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="megagpt", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if service.api_key is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS)
    app.add_middleware(Gate, service=service)
    _add_refusals(app)
    _add_routes(app, service)
    return app


class Gate:
    """Asks every request for the key, and counts and times all answers to their end."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        statuses: list[int] = []

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        try:
            _authorise(Request(scope), self._service)
            await self._app(scope, receive, counted)
        except RequestError as error:
            await _refusal(error)(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._service.worker.metrics.requests.labels(path, str(statuses[0] if statuses else LEFT)).inc()
            self._service.worker.metrics.seconds.labels(path).observe(time.monotonic() - start)


def _add_refusals(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        return _refusal(error)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
        return _refusal(RequestError(error.status_code, text))


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE, headers={"Content-Security-Policy": CONTENT_POLICY})

    @app.get("/health")
    async def health() -> Response:
        failure = service.worker.failure
        if failure is not None:
            return JSONResponse({"status": "failed", "reason": failure}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.worker.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> JsonObject:
        return {"object": "list", "data": [_described(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JsonObject:
        _require_model(name, service)
        return _described(service)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body: CompletionRequest = parse(CompletionRequest, await _read_json(request, service))
        _require_model(body.model, service)
        prompts = [_tokens_of(prompt, service) for prompt in body.prompts]
        texts = _texts(body, prompts, service, body.stops, body.logprobs, COMPLETION_TOKENS)
        shape = CompletionShape(f"cmpl-{secrets.token_hex(12)}", int(time.time()), service.name, service.trained.tokenizer)
        return await _respond(request, body, texts, shape, service, body.logprobs is not None)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body: ChatRequest = parse(ChatRequest, await _read_json(request, service))
        _require_model(body.model, service)
        if service.template is None:
            raise RequestError(400, "the model's tokenizer has no chat template; use /v1/completions")
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError(400, "top_logprobs: goes with logprobs true", param="top_logprobs")
        try:
            ids = service.template.prompt(body.plain_messages)
        except DataError as error:
            raise RequestError(400, f"messages: {error}", param="messages") from None
        _, stop = split_end(service.template)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        texts = _texts(body, [ids], service, [*body.stops, *stop], logprobs, None)
        shape = ChatShape(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), service.name, service.trained.tokenizer)
        return await _respond(request, body, texts, shape, service, body.logprobs)


def _refusal(error: RequestError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body, error.status, headers)


def _authorise(request: Request, service: Service) -> None:
    """Raise RequestError if the request does not have the server's key."""
    if service.api_key is None or request.url.path in OPEN_PATHS:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), service.api_key.encode()):
        raise RequestError(
            401, "wrong or missing API key; expected the header Authorization: Bearer KEY", code="invalid_api_key"
        )


async def _read_json(request: Request, service: Service) -> Any:
    """Return the JSON of a request. Raises RequestError if it is too large or no JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "expected the header Content-Type: application/json")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > service.max_request_bytes:
            raise RequestError(413, f"the request is larger than this server's limit of {service.max_request_bytes} bytes")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"not valid JSON: {error}") from None


def _require_model(name: str, service: Service) -> None:
    if name != service.name:
        raise RequestError(404, f"model: {name!r} is not here; this server has {service.name!r}", "model", "model_not_found")


def _described(service: Service) -> JsonObject:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "megagpt",
        "max_model_len": service.limits.positions,
    }


def _tokens_of(prompt: str | list[int], service: Service) -> list[int]:
    """Return the tokens of a prompt. Raises RequestError for an id that the model does not know, and for text that is none."""
    if isinstance(prompt, list):
        size = service.trained.config.model.tokens_in_vocab
        wrong = next((token for token in prompt if token >= size), None)
        if wrong is not None:
            raise RequestError(400, f"prompt: {wrong} is not one of the model's {size} tokens", param="prompt")
        return prompt
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise RequestError(400, "prompt: half of a surrogate pair, which is not a character", param="prompt") from None
    return service.trained.encode(prompt)


def _texts(
    body: CompletionRequest | ChatRequest,
    prompts: Sequence[Sequence[int]],
    service: Service,
    stop: Sequence[str],
    logprobs: int | None,
    default_tokens: int | None,
) -> list[Text]:
    """Return `n` texts for each prompt, each with a seed of its own. Raises RequestError beyond the limits."""
    if not 0 < len(prompts) * body.n <= service.limits.max_texts:
        raise RequestError(
            400,
            f"{len(prompts)} prompts with n {body.n}: expected 1 to {service.limits.max_texts} texts in a request",
            param="n",
        )
    seed = secrets.randbits(32) if body.seed is None else body.seed
    texts: list[Text] = []
    for ids in prompts:
        sampling = sampling_of(body, len(ids), service.limits, logprobs, default_tokens)
        for _ in range(body.n):
            own_seed = (seed + len(texts)) % 2**63
            texts.append(Text(ids, replace(sampling, seed=own_seed), stop))
    return texts


async def _respond(
    request: Request,
    body: CompletionRequest | ChatRequest,
    texts: Sequence[Text],
    shape: Shape,
    service: Service,
    logprobs: bool,
) -> Response:
    tickets = service.worker.submit(texts)
    n_prompt = sum(len(ids) for ids in {id(text.prompt): text.prompt for text in texts}.values())
    if body.stream:
        stream = _stream(tickets, shape, logprobs, n_prompt if body.reports_usage else None)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    answers = await _unless_left(request, asyncio.gather(*map(_collect, tickets)))
    choices = [shape.choice(index, text, draws, reason, logprobs) for index, (text, draws, reason) in enumerate(answers)]
    return JSONResponse(shape.answer(choices, n_prompt, sum(len(draws) for _, draws, _ in answers)))


async def _collect(ticket: Ticket) -> tuple[str, list[Draw], str | None]:
    """Return the entire text of a request, its tokens, and why it ended."""
    text, reason = "", None
    draws: list[Draw] = []
    async for event in ticket.events():
        text, reason = text + event.text, event.finish_reason
        draws += event.draws
    return text, draws, reason


async def _unless_left(request: Request, work: "asyncio.Future[Any]") -> Any:
    """Return the result of `work`; cancel it if the client leaves before."""
    leaving: asyncio.Future[Any] = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([work, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise RequestError(LEFT, "the client has left")
        return work.result()
    finally:
        leaving.cancel()
        if not work.done():
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work


async def _left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(tickets: Sequence[Ticket], shape: Shape, logprobs: bool, n_prompt: int | None) -> AsyncIterator[bytes]:
    """Yield the parts of an answer while they are generated. `n_prompt`: tokens of the prompts, to report the usage."""
    n_new = 0
    for index in range(len(tickets)):
        first = shape.first_delta(index)
        if first is not None:
            yield server_sent(shape.chunk([first]))
    try:
        async for index, event in _merged(tickets):
            n_new += len(event.draws)
            if event.text or event.finish_reason or (logprobs and event.draws):
                delta = shape.delta(index, event.text, event.draws, event.finish_reason, logprobs)
                yield server_sent(shape.chunk([delta]))
    except RequestError as error:
        yield server_sent(error.body)
        return
    if n_prompt is not None:
        yield server_sent(shape.usage_chunk(n_prompt, n_new))
    yield DONE


async def _merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Event]]:
    """Yield the events of several texts as they come, each with the index of its text. Raises RequestError."""
    events: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue()

    async def forward(index: int, ticket: Ticket) -> None:
        try:
            async for event in ticket.events():
                events.put_nowait((index, event))
            events.put_nowait((index, None))
        except RequestError as error:
            events.put_nowait((index, error))

    tasks = [asyncio.ensure_future(forward(index, ticket)) for index, ticket in enumerate(tickets)]
    try:
        left = len(tasks)
        while left:
            index, event = await events.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                left -= 1
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
