"""Answers have OpenAI's shapes and the text of the engine alone; what cannot be answered is a clear 4xx."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.runs import Tree
from support.server import POSITIONS, byte_model, service_of

from megagpt.inference.generate import TextGenerator
from megagpt.inference.sampling import Sampling
from megagpt.inference.source import TrainedModel
from megagpt.serving.app import Service, create_app

HOST = "http://localhost"
GREEDY: Tree = {"model": "tiny", "temperature": 0, "max_tokens": 12}
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return byte_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def service(trained: TrainedModel) -> Service:
    return service_of(trained)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), base_url=HOST) as client:
        yield client


def expected(trained: TrainedModel, prompt: list[int], sampling: Sampling, stop: tuple[str, ...] = ()) -> str:
    """Return the text of a generator that has nothing else to do."""
    generator = trained.generator(POSITIONS, 1)
    completion = generator.add(prompt, sampling, stop)
    list(generator.run())
    return completion.text


def events_of(text: str) -> list[Any]:
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_has_the_text_of_the_engine_alone(client: TestClient, trained: TrainedModel) -> None:
    answer = client.post("/v1/completions", json={**GREEDY, "prompt": "abc"}).json()
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "text": expected(trained, list(b"abc"), Sampling(12, temperature=0)),
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_every_prompt_gets_n_texts_with_seeds_of_their_own(client: TestClient, trained: TrainedModel) -> None:
    body = {"model": "tiny", "prompt": ["abc", "xy"], "n": 2, "seed": 7, "max_tokens": 9, "top_k": 50, "min_p": 0.001}
    answer = client.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in answer["choices"]]
    for number, prompt in enumerate([b"abc", b"abc", b"xy", b"xy"]):
        sampling = Sampling(9, top_k=50, min_p=0.001, seed=7 + number)
        assert texts[number] == expected(trained, list(prompt), sampling)
    assert answer["usage"]["prompt_tokens"] == 5
    assert client.post("/v1/completions", json=body).json()["choices"] == answer["choices"]
    ids = {**body, "prompt": [list(b"abc"), list(b"xy")]}
    assert client.post("/v1/completions", json=ids).json()["choices"] == answer["choices"]
    one = client.post("/v1/completions", json={**body, "prompt": list(b"abc"), "n": 1}).json()
    assert one["choices"] == answer["choices"][:1]


def test_log_probabilities_of_a_completion(client: TestClient) -> None:
    report = client.post("/v1/completions", json={**GREEDY, "prompt": "abc", "logprobs": 2}).json()["choices"][0]["logprobs"]
    assert len(report["tokens"]) == len(report["token_logprobs"]) == len(report["top_logprobs"]) == 12
    for value, top in zip(report["token_logprobs"], report["top_logprobs"], strict=True):
        assert max(top.values()) == value < 0


def test_a_stream_joins_to_the_answer(client: TestClient) -> None:
    body = {**GREEDY, "prompt": ["abc", "xy"]}
    answer = client.post("/v1/completions", json=body).json()
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    response = client.post("/v1/completions", json=streamed)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert events[-1]["usage"] == answer["usage"] and events[-1]["choices"] == []
    for choice in answer["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"]


def test_a_chat_is_the_completion_of_its_template(client: TestClient, service: Service, trained: TrainedModel) -> None:
    assert service.template is not None
    prompt = service.template.prompt(MESSAGES)
    assert bytes(prompt).decode().endswith("<|im_start|>assistant\n")
    body = {**GREEDY, "messages": MESSAGES, "logprobs": True, "top_logprobs": 3}
    answer = client.post("/v1/chat/completions", json=body).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == expected(trained, prompt, Sampling(12, temperature=0))
    entries = choice["logprobs"]["content"]
    assert len(entries) == 12 and all(len(entry["top_logprobs"]) == 3 for entry in entries)
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in entries)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    in_parts = {**body, "messages": [MESSAGES[0], {"role": "user", "content": parts}]}
    assert client.post("/v1/chat/completions", json=in_parts).json()["choices"] == [choice]
    events = events_of(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == choice["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_chat_without_a_limit_fills_the_context(client: TestClient, service: Service) -> None:
    assert service.template is not None
    body = {"model": "tiny", "messages": MESSAGES, "temperature": 0}
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["completion_tokens"] == min(100, POSITIONS - len(service.template.prompt(MESSAGES)))


def test_a_stop_string_ends_the_text_before_it(client: TestClient, trained: TrainedModel) -> None:
    text = expected(trained, list(b"abc"), Sampling(40, temperature=3.0, seed=1))
    stop = text[5:7]
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 40, "temperature": 3.0, "seed": 1, "stop": ["never", stop]}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == text[: text.find(stop)] and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "change", "status", "message"),
    [
        ("completions", {"model": "other"}, 404, "model: 'other' is not here; this server has 'tiny'"),
        ("completions", {"model": None}, 400, "model: "),
        ("completions", {"temperature": -1}, 400, "temperature: input should be greater than or equal to 0"),
        ("completions", {"temperature": "hot"}, 400, "temperature: input should be a valid number"),
        ("completions", {"top_p": 0}, 400, "top_p: "),
        ("completions", {"n": 5}, 400, "1 prompts with n 5: expected 1 to 4 texts in a request"),
        ("completions", {"prompt": []}, 400, "expected 1 to 4 texts"),
        ("completions", {"prompt": [999]}, 400, "prompt: 999 is not one of the model's 257 tokens"),
        ("completions", {"prompt": "\ud800"}, 400, "prompt: half of a surrogate pair"),
        ("completions", {"prompt": "x" * 120}, 400, "the prompt has 120 tokens, and with 12 for the answer that is more than"),
        ("completions", {"max_tokens": 0}, 400, "max_tokens: "),
        ("completions", {"max_tokens": 101}, 400, "max_tokens: 101 is above this server's limit of 100"),
        ("completions", {"max_tokens": 10**30}, 400, "max_tokens: "),
        ("completions", {"stop": [""]}, 400, "stop: expected texts of 1 to 200 characters"),
        ("completions", {"stop": ["a"] * 17}, 400, "stop: 17 texts; expected at most 16"),
        ("completions", {"presence_penalty": 0.5}, 400, "presence_penalty: "),
        ("completions", {"echo": True}, 400, "echo: "),
        ("completions", {"logit_bias": {}}, 400, "logit_bias: no such field"),
        ("chat/completions", {"messages": []}, 400, "messages: "),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content: required, but missing"),
        ("chat/completions", {"messages": [{"role": "usr", "content": "x"}]}, 400, "messages: message 1: unknown role 'usr'"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 200}]}, 400, "the model's context of 128"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs: goes with logprobs true"),
        ("chat/completions", {"prompt": "x"}, 400, "prompt: no such field"),
    ],
)  # fmt: skip
def test_a_request_with_a_wrong_field_is_refused_by_its_name(
    path: str, change: Tree, status: int, message: str, client: TestClient
) -> None:
    body = {**GREEDY, **({"prompt": "abc"} if path == "completions" else {"messages": MESSAGES}), **change}
    response = client.post(f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "not valid JSON"),
        (b"[" * 5000, "application/json", 400, "not valid JSON"),
        (b"\xff", "application/json", 400, "not valid JSON"),
        (b"[]", "application/json", 400, "expected a JSON object, found list"),
        (b"{}", "text/plain", 415, "Content-Type: application/json"),
        (b" " * 10_001, "application/json", 413, "larger than this server's limit of 10000 bytes"),
    ],
)
def test_a_body_that_is_no_request_is_refused(content: bytes, kind: str, status: int, message: str, client: TestClient) -> None:
    response = client.post("/v1/completions", content=content, headers={"Content-Type": kind})
    assert response.status_code == status and message in response.json()["error"]["message"]


def test_other_paths_and_methods_have_the_same_shape_of_error(client: TestClient) -> None:
    assert client.get("/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: not found"
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_models_health_page_and_metrics(client: TestClient) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert client.get("/health").json() == {"status": "ok"}
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "http://" not in page.text and "https://" not in page.text
    before = sample(client, "megagpt_generated_tokens_total")
    client.post("/v1/completions", json={**GREEDY, "prompt": "abc"})
    assert sample(client, "megagpt_generated_tokens_total") == before + 12
    assert sample(client, "megagpt_running_texts") == sample(client, "megagpt_cache_share") == 0
    assert sample(client, 'megagpt_requests_total{path="/v1/completions",status="200"}') >= 1
    assert sample(client, 'megagpt_requests_total{path="/v1/completions",status="400"}') >= 0


def sample(client: TestClient, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[-1]) if lines else 0.0


def test_a_key_is_asked_for_and_other_hosts_are_refused_without_one(trained: TrainedModel) -> None:
    with TestClient(create_app(service_of(trained, api_key="secret")), base_url="http://gpu7.example") as client:
        assert client.get("/health").status_code == client.get("/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Basic secret"}):
            for path in ("/v1/models", "/metrics"):
                response = client.get(path, headers=headers)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    with TestClient(create_app(service_of(trained)), base_url="http://evil.example") as client:
        assert client.get("/v1/models").status_code == 400


def test_texts_beyond_the_queue_are_refused_with_429(trained: TrainedModel) -> None:
    """Two places and one in the queue: a request of 4 texts does not fit, one of 3 does."""
    with TestClient(create_app(service_of(trained, rows=2, max_waiting=1)), base_url=HOST) as client:
        response = client.post("/v1/completions", json={**GREEDY, "prompt": "abc", "n": 4})
        assert response.status_code == 429 and response.json()["error"]["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "1"
        assert client.post("/v1/completions", json={**GREEDY, "prompt": "abc", "n": 3}).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_engine_answers_with_an_error_and_health_says_so(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: TextGenerator) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TextGenerator, "step", broken)
    with TestClient(create_app(service_of(trained)), base_url=HOST) as client:
        for status in (500, 503):
            response = client.post("/v1/completions", json={**GREEDY, "prompt": "abc"})
            assert response.status_code == status and "out of memory" in response.json()["error"]["message"]
        assert client.get("/health").status_code == 503


def test_scores_that_are_not_finite_are_an_error_of_that_request(trained: TrainedModel) -> None:
    weight = trained.model.tokens.weight
    before = weight[9].clone()
    weight[9] = float("nan")
    try:
        with TestClient(create_app(service_of(trained)), base_url=HOST) as client:
            streamed = client.post("/v1/completions", json={**GREEDY, "prompt": [9], "stream": True}).text
            assert "the model's scores are not finite" in json.loads(streamed.removeprefix("data: "))["error"]["message"]
            response = client.post("/v1/completions", json={**GREEDY, "prompt": [9]})
            assert response.status_code == 500 and "not finite" in response.json()["error"]["message"]
            assert client.get("/health").status_code == 200
    finally:
        weight[9] = before


def test_a_model_without_a_template_says_which_path_works(trained: TrainedModel) -> None:
    with TestClient(create_app(replace(service_of(trained), template=None)), base_url=HOST) as client:
        response = client.post("/v1/chat/completions", json={**GREEDY, "messages": MESSAGES})
        assert response.status_code == 400 and "use /v1/completions" in response.json()["error"]["message"]
