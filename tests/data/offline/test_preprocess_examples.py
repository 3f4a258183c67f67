"""Examples become token files: the ids and the mask of the chat template, example by example."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.chat import chat_tokenizer

from megagpt.data.chat_template import ChatTemplate
from megagpt.data.indexed import IndexedCorpus
from megagpt.data.offline.documents import Reject, stop
from megagpt.data.offline.preprocess_examples import ChatEncoder, ExampleCounts, ExamplesJob, PairEncoder, preprocess_examples
from megagpt.errors import DataError

CHATS: list[dict[str, Any]] = [
    {"prompt": "the quick fox?", "response": "yes", "source": "x"},
    {"messages": [{"role": "system", "content": "helpful"}, {"role": "user", "content": "a <|im_end|>"}]},
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "response": "the dog"},
]
CHATS[1]["messages"].append({"role": "assistant", "content": "no"})
USER, ANSWER = {"role": "user", "content": "the quick fox?"}, {"role": "assistant", "content": "yes"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(chat_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def template(tokenizer: str) -> ChatTemplate:
    return ChatTemplate.load(tokenizer)


def preprocess(path: Path, tokenizer: str, task: str, prefix: Path, workers: int = 1, reject: Reject = stop) -> ExampleCounts:
    load = partial(PairEncoder.load, tokenizer)
    if task != "pairs":
        load = partial(ChatEncoder.load, task, tokenizer, None)
    return preprocess_examples(ExamplesJob([path], load, task, str(prefix), workers), reject=reject)


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def written(prefix: Path, task: str) -> list[list[tuple[list[int], list[bool]]]]:
    tokens, mask = IndexedCorpus(f"{prefix}_{task}"), IndexedCorpus(f"{prefix}_{task}.mask")
    sequences = [(tokens.read(n).tolist(), (mask.read(n) == 1).tolist()) for n in range(len(tokens.sizes))]
    bounds = tokens.document_indices.tolist()
    return [sequences[start:end] for start, end in pairwise(bounds)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_each_example_has_the_ids_and_the_mask_of_its_chat(
    suffix: str, tokenizer: str, template: ChatTemplate, tmp_path: Path
) -> None:
    path = tmp_path / f"chats{suffix}"
    if suffix == ".parquet":
        chats: list[dict[str, Any]] = [CHATS[1]] * 3
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), path)
    else:
        chats = CHATS
        lines(path, chats)
    counts = preprocess(path, tokenizer, "chat", tmp_path / "o")
    messages = [
        chat.get("messages")
        or [
            *(chat["prompt"] if isinstance(chat["prompt"], list) else [{"role": "user", "content": chat["prompt"]}]),
            {"role": "assistant", "content": chat["response"]},
        ]
        for chat in chats
    ]
    expected = [template.encode(chat) for chat in messages]
    assert written(tmp_path / "o", "chat") == [[(chat.ids, chat.mask)] for chat in expected]
    sizes = [len(chat.ids) for chat in expected]
    assert counts == ExampleCounts(3, 0, sum(sizes), sum(sum(chat.mask) for chat in expected), max(sizes))


def test_a_preference_is_two_chats_with_the_same_prompt(tokenizer: str, template: ChatTemplate, tmp_path: Path) -> None:
    record = {"prompt": USER["content"], "chosen": "yes", "rejected": [{"role": "assistant", "content": "no"}]}
    preprocess(lines(tmp_path / "p.jsonl", [record] * 2), tokenizer, "preference", tmp_path / "o")
    chats = [template.encode([USER, {"role": "assistant", "content": text}]) for text in ("yes", "no")]
    assert written(tmp_path / "o", "preference") == [[(chat.ids, chat.mask) for chat in chats]] * 2


def test_a_pair_is_a_source_and_a_target_that_is_learned(tokenizer: str, template: ChatTemplate, tmp_path: Path) -> None:
    preprocess(lines(tmp_path / "p.jsonl", [{"source": "the quick fox", "target": "no"}]), tokenizer, "pairs", tmp_path / "o")
    source, target = ([*template.tokenizer.encode(text), template.tokenizer.eod_id] for text in ("the quick fox", "no"))
    assert written(tmp_path / "o", "pairs") == [[(source, [False] * len(source)), (target, [True] * len(target))]]


@pytest.mark.parametrize(
    ("task", "record", "problem"),
    [
        ("chat", "[1]", "expected a JSON object, found a list"),
        ("chat", '{"prompt": ', "not valid JSON"),
        ("chat", '{"text": "a"}', 'expected "messages", or "prompt" and "response"; found \'text\''),
        ("chat", '{"promt": "a", "response": "b"}', "expected \"prompt\", a text or a list of messages; nearest: 'promt'"),
        ("chat", '{"prompt": "a", "respons": "b"}', "expected \"response\", a text or a list of messages; nearest: 'respons'"),
        ("chat", '{"prompt": "a", "response": null}', 'expected "response", a text or a list of messages'),
        ("chat", '{"prompt": 3, "response": "b"}', '"prompt": expected a list of messages'),
        ("chat", '{"messages": [{"role": "user", "content": "a"}]}', 'no message with the role "assistant" has text'),
        ("chat", '{"messages": [{"role": "bot", "content": "a"}]}', "message 1: unknown role 'bot'"),
        ("chat", '{"messages": "a"}', '"messages": expected a list of messages'),
        ("preference", '{"prompt": "a", "chosen": "b"}', 'expected "rejected", a text or a list of messages'),
        ("preference", '{"prompt": "a", "chosen": "b", "rejected": "b"}', '"chosen" and "rejected" are equal'),
        ("pairs", '{"source": "a", "targt": "b"}', "expected a text under \"target\"; nearest: 'targt'"),
        ("pairs", '{"source": ["a"], "target": "b"}', 'expected a text under "source"'),
    ],
)
def test_an_example_that_cannot_be_used_is_reported_with_its_line_or_skipped(
    task: str, record: str, problem: str, tokenizer: str, tmp_path: Path
) -> None:
    good = {"prompt": "a", "response": "b", "chosen": "b", "rejected": "c", "source": "a", "target": "b"}
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{record}\n{json.dumps(good)}\n")
    with pytest.raises(DataError) as caught:
        preprocess(path, tokenizer, task, tmp_path / "o")
    assert f"x.jsonl:3: {problem}" in str(caught.value)
    assert list(tmp_path.glob("o*")) == []
    errors: list[DataError] = []
    counts = preprocess(path, tokenizer, task, tmp_path / "o", reject=errors.append)
    assert (counts.examples, len(errors)) == (2, 1)


def test_an_empty_input_writes_nothing(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="o_chat: not written, because the input has no example"):
        preprocess(lines(tmp_path / "x.jsonl", []), tokenizer, "chat", tmp_path / "o")
    assert list(tmp_path.glob("o*")) == []


def test_the_number_of_workers_does_not_change_the_output(tokenizer: str, tmp_path: Path) -> None:
    """Also not the errors: each is reported with its line, in order."""
    records: list[Any] = [{"prompt": f"the fox {n}", "response": "yes" if n % 100 else None} for n in range(600)]
    path, errors = lines(tmp_path / "x.jsonl", records), {}
    for workers in (1, 2):
        found: list[DataError] = []
        preprocess(path, tokenizer, "chat", tmp_path / str(workers), workers, found.append)
        errors[workers] = [str(error) for error in found]
    assert errors[1] == errors[2] and len(errors[1]) == 6 and "x.jsonl:1: " in errors[1][0]
    for suffix in (".bin", ".idx", ".mask.bin", ".mask.idx"):
        assert (tmp_path / f"1_chat{suffix}").read_bytes() == (tmp_path / f"2_chat{suffix}").read_bytes()
