"""The README's example under uvicorn: each of its layers refuses at exactly its limit, and streams are settled."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import time_machine
from llmock.pytest_plugin import LLMock

from quotalimit import TokenBudget, limiters_of

from ..helpers import open_holds, used
from . import example_app
from .fields import limits, policies
from .servers import ModelServer, eventually, uvicorn_serving

pytestmark = pytest.mark.usefixtures("clock")
WORD = "x" * 40
"""Ten tokens of text, as an estimate."""

POLICIES = {
    "by-address": {"q": 100, "w": 60},
    "by-user": {"q": 20, "w": 60},
    "tokens": {"q": 10_000, "w": 86400, "qu": "tokens"},
}

Connect = Callable[..., httpx.Client]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    """What the example's OpenAI client talks to."""
    server = ModelServer()
    with uvicorn_serving(server.app) as url:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        yield server
        server.go_on.set()


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Makes clients of the example, from different addresses, who have logged in or not."""

    @asynccontextmanager
    async def end_connections(_app: object) -> AsyncIterator[None]:
        yield
        if example_app.model.cache_info().currsize:
            await example_app.model().close()
            await asyncio.sleep(0)

    monkeypatch.setattr(example_app.app.router, "lifespan_context", end_connections)
    example_app.model.cache_clear()
    clients: list[httpx.Client] = []
    with uvicorn_serving(example_app.app, lifespan="on") as url:

        def connect(user: str | None = None, address: str = "127.0.0.1") -> httpx.Client:
            client = httpx.Client(base_url=url, transport=httpx.HTTPTransport(local_address=address), timeout=30)
            clients.append(client)
            if user is not None:
                login = {"user": user, "password": example_app.PASSWORDS[user]}
                token = client.post("/login", json=login).raise_for_status().json()["token"]
                client.headers["Authorization"] = f"Bearer {token}"
            return client

        yield connect
        for client in clients:
            client.close()


@pytest.fixture
def tokens() -> TokenBudget:
    (budget,) = limiters_of(example_app.ask)
    assert isinstance(budget, TokenBudget)
    return budget


def ask(client: httpx.Client, prompt: str = "hi") -> httpx.Response:
    return client.post("/chat", json={"prompt": prompt})


def assert_refused_until(
    refused: httpx.Response, policy: str, seconds: int, again: Callable[[], int], clock: time_machine.Traveller
) -> None:
    """A 429 of this policy, of which the headers are true: waiting a second less refuses, waiting as told admits."""
    assert refused.status_code == 429
    assert refused.headers["Content-Type"] == "application/problem+json"
    assert refused.json()["violated-policies"] == [policy]
    assert policies(refused.headers)[policy] == POLICIES[policy]
    assert limits(refused.headers)[policy] == {"r": 0, "t": seconds}
    assert refused.headers["Retry-After"] == str(seconds)
    clock.shift(timedelta(seconds=seconds - 1))
    assert again() == 429
    clock.shift(timedelta(seconds=1))
    assert again() == 200


# Each layer refuses at exactly its limit


def test_a_hundred_requests_a_minute_by_address(connect: Connect, clock: time_machine.Traveller) -> None:
    """On every endpoint: also where nobody has logged in, and where nobody could."""
    client = connect()
    wrong = {"user": "alice", "password": "guess"}
    assert [client.post("/login", json=wrong).status_code for _ in range(50)] == [401] * 50
    clock.shift(timedelta(seconds=10))
    answers = [client.get("/me") for _ in range(50)]
    assert [answer.status_code for answer in answers] == [401] * 50
    assert [limits(answer.headers)["by-address"]["r"] for answer in answers] == list(range(49, -1, -1))

    refused = client.post("/login", json=wrong)
    assert connect(address="127.0.0.2").get("/me").status_code == 401

    def again() -> int:
        return 200 if client.get("/me").status_code == 401 else 429

    assert_refused_until(refused, "by-address", 50, again, clock)


def test_a_hundred_requests_by_address_though_they_come_at_once(connect: Connect) -> None:
    client = connect()
    with ThreadPoolExecutor(8) as pool:
        statuses = Counter(pool.map(lambda _: client.get("/me").status_code, range(130)))
    assert statuses == {401: 100, 429: 30}


def test_a_header_that_the_client_writes_does_not_change_its_address(connect: Connect) -> None:
    client = connect()
    for number in range(100):
        client.get("/me", headers={"X-Forwarded-For": f"198.51.100.{number}", "Forwarded": f"for=192.0.2.{number}"})
    assert client.get("/me", headers={"X-Forwarded-For": "203.0.113.1"}).status_code == 429


def test_twenty_requests_a_minute_by_user(connect: Connect, clock: time_machine.Traveller) -> None:
    """From whatever address, and for nobody else."""
    here, there, bob = connect("alice"), connect("alice", "127.0.0.2"), connect("bob")
    clients = [here, there] * 10
    answers = [client.get("/me") for client in clients]
    assert [answer.status_code for answer in answers] == [200] * 20
    assert [limits(answer.headers)["by-user"]["r"] for answer in answers] == list(range(19, -1, -1))

    refused = there.get("/me")
    assert here.get("/me").status_code == 429
    assert bob.get("/me").status_code == 200
    assert_refused_until(refused, "by-user", 60, lambda: here.get("/me").status_code, clock)


def test_the_readme_shows_an_answer_as_it_is(connect: Connect, clock: time_machine.Traveller) -> None:
    client = connect("alice")
    for _ in range(20):
        client.get("/me")
    clock.shift(timedelta(seconds=10))
    answer = client.get("/me")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (shown,) = re.findall(r"^```http\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    head, _, body = shown.partition("\n\n")
    status, *lines = head.splitlines()
    assert status == f"HTTP/1.1 {answer.status_code} {answer.reason_phrase}"
    headers = dict(line.split(": ", 1) for line in lines)
    assert headers == {name: answer.headers[name] for name in headers}
    assert " ".join(body.split()) == answer.text


def test_ten_thousand_tokens_a_day(
    connect: Connect, model: ModelServer, tokens: TokenBudget, clock: time_machine.Traveller
) -> None:
    """Admitted while one token is left, and no longer; the model is never reached by who is refused."""
    client = connect("alice")
    for model.usage, spent in [(3_000, 3_000), (6_999, 9_999), (1, 10_000)]:
        answer = ask(client)
        assert (answer.status_code, answer.text) == (200, "hello world")
        assert used(tokens) == spent
    assert len(model.requests) == 3

    refused = ask(client)
    assert len(model.requests) == 3
    assert client.get("/me").status_code == 200
    assert ask(connect("bob")).status_code == 200
    assert used(tokens, "bob") == 1
    assert_refused_until(refused, "tokens", 12 * 3600, lambda: ask(client).status_code, clock)
    assert open_holds(tokens, "alice", "bob") == 0


def test_an_answer_tells_of_every_layer(connect: Connect, model: ModelServer) -> None:
    client = connect("alice")
    ask(client)
    answer = ask(client)
    assert policies(answer.headers) == POLICIES
    assert limits(answer.headers) == {
        "by-address": {"r": 97, "t": 60},
        "by-user": {"r": 18, "t": 60},
        "tokens": {"r": 9_985, "t": 12 * 3600},
    }


def test_no_identity_is_told(connect: Connect, model: ModelServer) -> None:
    client = connect("alice")
    model.usage = 10_000
    answers = [ask(client) for _ in range(2)] + [client.get("/me") for _ in range(19)]
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        told = f"{answer.headers}" + (answer.text if answer.status_code == 429 else "")
        assert "alice" not in told
        assert "127.0.0" not in told


def test_the_usage_that_llmock_reports_is_charged(connect: Connect, llmock: LLMock, tokens: TokenBudget) -> None:
    """A mock server that is not ours: its tokens for a prompt, and its stream."""
    client = connect("alice")
    answer = ask(client, "why is the sky blue?")
    assert answer.status_code == 200
    assert answer.text
    assert used(tokens) > len(answer.text) // 10
    assert open_holds(tokens) == 0
    again = ask(client, "why is the sky blue?")
    assert limits(again.headers)["tokens"]["r"] == 10_000 - used(tokens) // 2


# Clients that go away


@pytest.mark.parametrize("received", [1, 3, 7])
def test_a_client_that_goes_away_is_charged_for_what_was_sent(
    connect: Connect, model: ModelServer, tokens: TokenBudget, received: int
) -> None:
    """The prompt and the user's name, ten tokens, and ten for every word; and no hold is left."""
    client = connect("alice")
    model.words, model.pause_at = [WORD] * 50, received
    with client.stream("POST", "/chat", json={"prompt": "x" * 35}) as answer:
        parts, text = answer.iter_text(), ""  # kept: an iterator that is dropped closes the connection
        while len(text) < received * len(WORD):
            text += next(parts)
        assert open_holds(tokens) == 1
    eventually(lambda: open_holds(tokens) == 0)
    assert used(tokens) == 10 + 10 * received
    assert model.sent == received
    model.go_on.set()
    assert ask(client).status_code == 200


def test_a_client_that_goes_away_before_the_first_word_is_charged_for_its_prompt(
    connect: Connect, model: ModelServer, tokens: TokenBudget
) -> None:
    client = connect("alice")
    model.pause_at = 0
    with client.stream("POST", "/chat", json={"prompt": "x" * 35}) as answer:
        assert answer.status_code == 200
    eventually(lambda: open_holds(tokens) == 0)
    assert used(tokens) == 10


def test_a_client_that_asks_for_too_much_in_parallel_leaves_no_hold(
    connect: Connect, model: ModelServer, tokens: TokenBudget
) -> None:
    client = connect("alice")
    model.usage = 2_000
    with ThreadPoolExecutor(8) as pool:
        statuses = Counter(pool.map(lambda _: ask(client).status_code, range(20)))
    assert statuses[200] >= 5
    assert set(statuses) == {200, 429}
    assert used(tokens) == 2_000 * statuses[200]
    assert open_holds(tokens) == 0


def test_openapi_shows_the_429_everywhere(connect: Connect) -> None:
    paths = connect().get("/openapi.json").json()["paths"]
    assert all("429" in operation["responses"] for path in paths.values() for operation in path.values())
    assert set(paths) == {"/login", "/me", "/chat"}
