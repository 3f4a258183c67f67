"""One thread runs the generation engine for all requests; they join and leave between two steps."""

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from megagpt.errors import MegagptError
from megagpt.inference.generate import Completion, TextGenerator
from megagpt.inference.sampling import Draw, Sampling
from megagpt.serving.errors import RequestError
from megagpt.serving.metrics import Metrics

IDLE_SECONDS = 20.0
"""Time after which an idle first rank sends an empty message, so that the wait of other ranks never times out."""
SECONDS_TO_STOP = 30.0


class Text(NamedTuple):
    """A text to be continued."""

    prompt: Sequence[int]
    sampling: Sampling
    stop: Sequence[str]


class Add(NamedTuple):
    """Continue a text."""

    number: int
    text: Text


class Cancel(NamedTuple):
    """End a text: its client has left."""

    number: int


class Stop(NamedTuple):
    """End the loop."""


Command = Add | Cancel | Stop


class Event(NamedTuple):
    """What a step added to a text, for its request."""

    text: str = ""
    draws: tuple[Draw, ...] = ()
    finish_reason: str | None = None
    error: str | None = None


class EngineLoop:
    """Runs the engine by commands. Every tensor-parallel rank runs one with the same commands."""

    def __init__(
        self,
        generator: TextGenerator,
        receive: Callable[[bool], Sequence[Command]],
        deliver: Callable[[int, Event], None] = lambda number, event: None,
    ) -> None:
        """`receive`: returns new commands; its argument says whether to wait for one. `deliver`: gets each text's events."""
        self._generator = generator
        self._receive = receive
        self._deliver = deliver
        self._texts: dict[int, Completion] = {}
        self._numbers: dict[Completion, int] = {}

    def run(self) -> None:
        """Work until a `Stop` comes."""
        while True:
            for command in self._receive(not self._generator.is_busy):
                if isinstance(command, Stop):
                    return
                self._apply(command)
            if self._generator.is_busy:
                self._step()

    def _apply(self, command: Add | Cancel) -> None:
        if isinstance(command, Cancel):
            completion = self._texts.get(command.number)
            if completion is not None:
                self._generator.cancel(completion)
                self._forget(completion)
            return
        try:
            completion = self._generator.add(*command.text)
        except MegagptError as error:
            self._deliver(command.number, Event(error=str(error)))
            return
        self._texts[command.number] = completion
        self._numbers[completion] = command.number

    def _step(self) -> None:
        for piece in self._generator.step():
            error = piece.completion.sequence.error
            event = Event(piece.text, piece.draws, piece.finish_reason, None if error is None else str(error))
            self._deliver(self._numbers[piece.completion], event)
            if piece.finish_reason is not None:
                self._forget(piece.completion)

    def _forget(self, completion: Completion) -> None:
        del self._texts[self._numbers.pop(completion)]


class Ticket:
    """A text of a request: its events arrive in the event loop of the server."""

    def __init__(self, number: int, worker: "EngineWorker") -> None:
        self.number = number
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._start = time.monotonic()
        self._has_text = False

    def deliver(self, event: Event) -> None:
        """Add an event, from any thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """Yield events until the text ends. Raises RequestError if it fails. A caller that leaves early cancels the text."""
        is_finished = False
        try:
            while not is_finished:
                event = await self._events.get()
                is_finished = event.finish_reason is not None or event.error is not None
                if event.error is not None:
                    raise RequestError(500, event.error)
                if event.draws and not self._has_text:
                    self._has_text = True
                    self._worker.metrics.first_token.observe(time.monotonic() - self._start)
                yield event
        finally:
            self._worker.close(self, cancel=not is_finished)


class EngineWorker:
    """The engine's thread, on the first rank."""

    def __init__(
        self,
        generator: TextGenerator,
        metrics: Metrics,
        max_waiting: int,
        share: Callable[[Sequence[Command]], object] = lambda commands: None,
    ) -> None:
        """`max_waiting`: requests beyond those that run; `share`: sends the commands to the other ranks."""
        self.metrics = metrics
        self._generator = generator
        self._share = share
        self._max_requests = max_waiting + generator.engine.max_rows
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="generation engine", daemon=True)
        metrics.watch(generator.engine)

    @property
    def failure(self) -> str | None:
        """Why the engine has stopped; None while it works."""
        return self._failure

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its present step. Texts that are not finished end without an answer."""
        self._commands.put(Stop())
        self._thread.join(SECONDS_TO_STOP)

    def submit(self, texts: Sequence[Text]) -> list[Ticket]:
        """Add the texts of a request: all of them or none.

        Raises RequestError if the queue is full, or if the engine has failed.
        """
        if self._failure is not None:
            raise RequestError(503, f"the engine has stopped: {self._failure}")
        with self._lock:
            if len(self._tickets) + len(texts) > self._max_requests:
                raise RequestError(429, f"{len(self._tickets)} texts are in the queue; try again later", code="queue_full")
            tickets = [Ticket(next(self._numbers), self) for _ in texts]
            self._tickets |= {ticket.number: ticket for ticket in tickets}
        for ticket, text in zip(tickets, texts, strict=True):
            self._commands.put(Add(ticket.number, text))
            self.metrics.prompt_tokens.inc(len(text.prompt))
        return tickets

    def close(self, ticket: Ticket, cancel: bool) -> None:
        """Forget a text; `cancel`: also end it."""
        with self._lock:
            known = self._tickets.pop(ticket.number, None) is not None
        if cancel and known:
            self.metrics.cancelled.inc()
            self._commands.put(Cancel(ticket.number))

    def _run(self) -> None:
        try:
            EngineLoop(self._generator, self._receive, self._deliver).run()
        except BaseException as error:  # every waiting request gets it as its answer
            self._failure = f"{type(error).__name__}: {error}"
            with self._lock:
                tickets = list(self._tickets.values())
            for ticket in tickets:
                ticket.deliver(Event(error=self._failure))
            raise

    def _receive(self, wait: bool) -> list[Command]:
        commands: list[Command] = []
        try:
            commands.append(self._commands.get(timeout=IDLE_SECONDS) if wait else self._commands.get_nowait())
            while True:
                commands.append(self._commands.get_nowait())
        except queue.Empty:
            pass
        self._share(commands)
        return commands

    def _deliver(self, number: int, event: Event) -> None:
        self.metrics.generated_tokens.inc(len(event.draws))
        with self._lock:
            ticket = self._tickets.get(number)
        if ticket is not None:
            ticket.deliver(event)
