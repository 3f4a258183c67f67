"""Convert examples for fine-tuning to token files: a pair, and a mask beside it of the tokens that are learned."""

import difflib
import multiprocessing as mp
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from megagpt.data.chat_template import ASSISTANT, ChatTemplate, EncodedChat, Message
from megagpt.data.examples import mask_prefix
from megagpt.data.indexed import IndexedWriter, token_dtype
from megagpt.data.offline.documents import InputFile, Reject, stop
from megagpt.data.tokenizer import Tokenizer, load_tokenizer, require_characters
from megagpt.errors import DataError
from megagpt.progress import NoProgress, Progress

BATCH_RECORDS = 256
"""Examples that are encoded together."""
MAX_WAITING_BATCHES = 4
"""Batches in flight per worker process; limits the memory."""
Conversations = Sequence[Sequence[Message]]
"""The chats of one example."""


@dataclass
class ExampleCounts:
    """What a run read and wrote."""

    examples: int = 0
    skipped: int = 0
    """Examples that could not be read and were skipped."""
    tokens: int = 0
    learned: int = 0
    """Tokens in the mask."""
    longest: int = 0
    """Tokens of the longest example."""


def output_prefix(prefix: str, task: str) -> str:
    """Return the prefix of the pair that a task writes."""
    return f"{prefix}_{task}"


@dataclass(frozen=True)
class ExamplesJob:
    """Settings of a run."""

    files: Sequence[Path]
    load: Callable[[], "ExampleEncoder"]
    """Loads the encoder of the task, also in a worker process; must be picklable."""
    task: str
    """Task of the examples, for the names of the files."""
    output_prefix: str
    """The run writes OUTPUT_PREFIX_TASK.bin, .idx and their mask."""
    workers: int = 1
    """Processes that encode."""


def preprocess_examples(job: ExamplesJob, progress: Progress | None = None, reject: Reject = stop) -> ExampleCounts:
    """Write the pair and the mask of all examples in the files; return the counts.

    `reject`: receives examples that cannot be used. Files get their names only when all are complete. Raises DataError.
    """
    counts = ExampleCounts()
    target = output_prefix(job.output_prefix, job.task)
    vocab_size = job.load().tokenizer.vocab_size
    records = _records(job.files, progress or NoProgress(), reject)
    with ExitStack() as stack:
        tokens = stack.enter_context(IndexedWriter(target, token_dtype(vocab_size)))
        mask = stack.enter_context(IndexedWriter(mask_prefix(target), np.uint8))  # gets its name first
        for place, result in stack.enter_context(closing(_encode_all(job, records))):
            if isinstance(result, str):
                counts.skipped += 1
                reject(DataError(f"{place}: {result}"))
                continue
            tokens.add_document(*(chat.ids for chat in result))
            mask.add_document(*(np.array(chat.mask, np.uint8) for chat in result))
            length = sum(len(chat.ids) for chat in result)
            counts.examples += 1
            counts.tokens += length
            counts.learned += sum(sum(chat.mask) for chat in result)
            counts.longest = max(counts.longest, length)
        if not counts.examples:
            raise DataError(f"{target}: not written, because the input has no example")
    return counts


def chat_conversation(record: Mapping[str, Any]) -> Conversations:
    """Return the chat of an example: its messages, or its prompt and response. Raises DataError."""
    if record.get("messages") is not None:
        return [_messages(record["messages"], "messages")]
    if "prompt" not in record and "response" not in record:
        _missing(record, ("messages", "prompt", "response"), 'expected "messages", or "prompt" and "response"')
    return [[*_prompt(record), *_answer(record, "response")]]


def preference_conversations(record: Mapping[str, Any]) -> Conversations:
    """Return the chats of an example: with the chosen answer and with the rejected one. Raises DataError."""
    prompt = _prompt(record)
    chosen, rejected = ([*prompt, *_answer(record, key)] for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError('"chosen" and "rejected" are equal, so there is nothing to learn')
    return [chosen, rejected]


CONVERSATIONS: dict[str, Callable[[Mapping[str, Any]], Conversations]] = {
    "chat": chat_conversation,
    "preference": preference_conversations,
}
"""Task -> the chats of one record."""


class ExampleEncoder(Protocol):
    """Encodes the examples of a task."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the ids."""

    def encode(self, record: Mapping[str, Any]) -> list[EncodedChat]:
        """Return the sequences of an example. Raises DataError if it cannot be used."""


class ChatEncoder(NamedTuple):
    """Encodes chats."""

    template: ChatTemplate
    conversations: Callable[[Mapping[str, Any]], Conversations]

    @classmethod
    def load(cls, task: str, tokenizer: str, template: str | None) -> "ChatEncoder":
        """`task`: a key of `CONVERSATIONS`; the others as in `ChatTemplate.load`."""
        return cls(ChatTemplate.load(tokenizer, template), CONVERSATIONS[task])

    @property
    def tokenizer(self) -> Tokenizer:
        return self.template.tokenizer

    def encode(self, record: Mapping[str, Any]) -> list[EncodedChat]:
        return [_encoded(self.template, chat) for chat in self.conversations(record)]


class PairEncoder(NamedTuple):
    """Encodes "source" and "target", each with the end-of-document token behind it; the target is learned."""

    tokenizer: Tokenizer

    @classmethod
    def load(cls, tokenizer: str) -> "PairEncoder":
        """`tokenizer`: as in `load_tokenizer`."""
        return cls(load_tokenizer(tokenizer))

    def encode(self, record: Mapping[str, Any]) -> list[EncodedChat]:
        sequences = []
        for key in ("source", "target"):
            text = record.get(key)
            if text is None:
                _missing(record, (key,), f'expected a text under "{key}"')
            if not isinstance(text, str):
                raise DataError(f'expected a text under "{key}"')
            require_characters(text, f'"{key}"')
            ids = [*self.tokenizer.encode(text), self.tokenizer.eod_id]
            sequences.append(EncodedChat(ids, [key == "target"] * len(ids)))
        return sequences


Record = tuple[str, dict[str, Any]]
"""Place and content of an example."""
Result = tuple[str, list[EncodedChat] | str]
"""Place of an example, and its chats, or why it cannot be used."""


def _encode_all(job: ExamplesJob, records: Iterable[Record]) -> Generator[Result, None, None]:
    """Encode the examples in order, with at most `MAX_WAITING_BATCHES` batches per worker in memory."""
    batches = _batches(records)
    if job.workers <= 1:
        encoder = job.load()
        for batch in batches:
            yield from _encode_batch(encoder, batch)
        return
    # An executor, not a Pool: a Pool waits forever for a worker that was killed (out of memory).
    pool = ProcessPoolExecutor(job.workers, mp.get_context("spawn"), _start_worker, (job.load,))
    waiting: deque[Future[list[Result]]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) >= MAX_WAITING_BATCHES * job.workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process was killed, probably because memory ran out; use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(records)
    while batch := list(islice(iterator, BATCH_RECORDS)):
        yield batch


def _encode_batch(encoder: ExampleEncoder, records: Sequence[Record]) -> list[Result]:
    return [(place, _encode_record(encoder, record)) for place, record in records]


def _encode_record(encoder: ExampleEncoder, record: dict[str, Any]) -> list[EncodedChat] | str:
    try:
        return encoder.encode(record)
    except DataError as error:
        return str(error)


class _Worker:
    """State of a worker process. A process pool offers no other way to keep an object between its tasks."""

    encoder: ExampleEncoder


def _start_worker(load: Callable[[], ExampleEncoder]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel already
    _Worker.encoder = load()


def _encode_in_worker(records: Sequence[Record]) -> list[Result]:
    return _encode_batch(_Worker.encoder, records)


def _records(files: Sequence[Path], progress: Progress, reject: Reject) -> Iterator[Record]:
    for path in files:
        file, done = InputFile(path, [], None, reject), 0
        for place, record in file.records():
            yield place, record
            progress.update(file.position - done)
            done = file.position
        progress.update(path.stat().st_size - done)


def _encoded(template: ChatTemplate, chat: Sequence[Message]) -> EncodedChat:
    encoded = template.encode(chat)
    if not any(encoded.mask):
        raise DataError('no message with the role "assistant" has text, so there is nothing to learn')
    return encoded


def _prompt(record: Mapping[str, Any]) -> Sequence[Message]:
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if prompt is None:
        _missing(record, ("prompt",), 'expected "prompt", a text or a list of messages')
    return _messages(prompt, "prompt")


def _answer(record: Mapping[str, Any], key: str) -> Sequence[Message]:
    answer = record.get(key)
    if isinstance(answer, str):
        return [{"role": ASSISTANT, "content": answer}]
    if answer is None:
        _missing(record, (key,), f'expected "{key}", a text or a list of messages')
    return _messages(answer, key)


def _messages(value: object, key: str) -> Sequence[Message]:
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise DataError(f'"{key}": expected a list of messages, such as [{{"role": "user", "content": "..."}}]')
    return value


def _missing(record: Mapping[str, Any], wanted: Sequence[str], expected: str) -> None:
    """Raise DataError with the key of the record that is nearest to those that are missing."""
    near = [match for key in wanted for match in difflib.get_close_matches(key, list(record), n=1)]
    found = f"; nearest: {near[0]!r}" if near else f"; found {', '.join(map(repr, record))}" if record else ""
    raise DataError(f"{expected}{found}")
