"""The real openai client at a real server: one process, one port."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from support.server import byte_model, service_of

from megagpt.commands.serve import open_listener
from megagpt.inference.sampling import Sampling
from megagpt.serving.app import Service, create_app

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    return service_of(byte_model(tmp_path_factory.mktemp("served")), rows=4, max_waiting=100)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    """The address of a server in a thread."""
    listener = open_listener("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(30)


@pytest.fixture
def client(url: str) -> Iterator["openai.OpenAI"]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_the_client_of_openai_completes_chats_and_streams(client: "openai.OpenAI", service: Service) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    generator = service.trained.generator(128, 1)
    expected = generator.add(list(b"abc"), Sampling(10, temperature=0))
    list(generator.run())
    completion = client.completions.create(model="tiny", prompt="abc", max_tokens=10, temperature=0)
    assert completion.choices[0].text == expected.text and completion.usage.completion_tokens == 10
    messages = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=10, temperature=0, logprobs=True)
    assert len(chat.choices[0].logprobs.content) == 10
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=10, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat.choices[0].message.content
    assert chunks[-1].usage == chat.usage
    extra = client.completions.create(model="tiny", prompt="abc", max_tokens=5, extra_body={"top_k": 1, "min_p": 0.1})
    assert extra.choices[0].text == expected.text[: len(extra.choices[0].text)]


def test_errors_are_the_exceptions_of_the_client(client: "openai.OpenAI") -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model="gpt-4", prompt="abc")
    with pytest.raises(openai.BadRequestError, match="context of 128") as error:
        client.completions.create(model="tiny", prompt="x" * 500)
    assert error.value.code == "context_length_exceeded" and error.value.param == "prompt"


def wait_until_idle(service: Service) -> None:
    """Wait until the engine has no text; fail after 20 s."""
    engine = service.worker._generator.engine
    end = time.monotonic() + 20
    while engine.n_running or engine.n_waiting or service.worker._tickets:
        assert time.monotonic() < end, "a client that left still has its place"
        threading.Event().wait(0.005)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "one answer"])
def test_a_client_that_leaves_frees_its_place(
    stream: bool, url: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is held until the client has left, so the text cannot end by itself."""
    released, started = threading.Event(), threading.Event()
    generator = service.worker._generator
    plain = generator.step

    def held():
        started.set()
        if generator.engine.n_running and next(iter(generator._active)).n_new >= 30:
            assert released.wait(20)
        return plain()

    monkeypatch.setattr(generator, "step", held)
    cancelled = service.worker.metrics.cancelled._value.get()

    async def leave() -> None:
        client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        request = client.completions.create(model="tiny", prompt="abc", max_tokens=100, temperature=0, stream=stream)
        if stream:
            response = await request
            await anext(aiter(response))
            await response.close()
        else:
            task = asyncio.ensure_future(request)
            await asyncio.to_thread(started.wait, 20)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await client.close()

    asyncio.run(leave())
    end = time.monotonic() + 20
    while service.worker.metrics.cancelled._value.get() == cancelled and time.monotonic() < end:
        threading.Event().wait(0.005)
    released.set()
    wait_until_idle(service)
    assert service.worker.metrics.cancelled._value.get() == cancelled + 1
    assert generator.engine.cache_share == 0


def test_many_clients_at_once_all_get_their_own_text(url: str, service: Service) -> None:
    """40 requests for 4 places; each text is the one of its prompt alone."""
    prompts = [f"prompt {number}" for number in range(40)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            requests = [
                client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0) for prompt in prompts
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*requests)]

    generator = service.trained.generator(40 * 128, 8)
    expected = [generator.add(list(prompt.encode()), Sampling(8, temperature=0)) for prompt in prompts]
    list(generator.run())
    assert asyncio.run(ask()) == [completion.text for completion in expected]
    wait_until_idle(service)
