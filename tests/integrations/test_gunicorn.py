"""Rules 5 and 7: the README's example under gunicorn with four workers. Each layer refuses at exactly its limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from quotalimit import RateLimiter, Store, TokenBudget, store_from_url

from ..helpers import used
from ..stores import servers
from . import example_app
from .fields import limits
from .servers import ModelServer, eventually, uvicorn_serving

ROOT = Path(__file__).parents[2]
WORKERS = 4


class Site(NamedTuple):
    """The example under gunicorn, the store of its workers, and what its OpenAI clients talk to."""

    url: str
    store: Store
    model: ModelServer
    preloaded: bool

    @contextmanager
    def clients(self, address: str, user: str | None = None, *, each: int = 3) -> Iterator[list[httpx.Client]]:
        """As many clients for each worker, all from one address and of one user, with a connection open."""
        found: dict[str, list[httpx.Client]] = {}
        spare: list[httpx.Client] = []

        def connect() -> bool:
            client = httpx.Client(
                base_url=self.url, transport=httpx.HTTPTransport(verify=False, local_address=address), timeout=30
            )
            its = found.setdefault(client.get("/openapi.json").headers["X-Worker"], [])
            (its if len(its) < each else spare).append(client)
            return len(found) == WORKERS and all(len(its) == each for its in found.values())

        try:
            eventually(connect)
            clients = [client for its in zip(*found.values(), strict=True) for client in its]
            if user is not None:
                login = {"user": user, "password": example_app.PASSWORDS[user]}
                token = clients[0].post("/login", json=login).raise_for_status().json()["token"]
                for client in clients:
                    client.headers["Authorization"] = f"Bearer {token}"
            yield clients
        finally:
            for client in [*spare, *(client for its in found.values() for client in its)]:
                client.close()


@contextmanager
def gunicorn(store: str, model: str, *options: str) -> Iterator[str]:
    """Run the example with four workers; yields its address."""
    environment = {"PYTHONPATH": str(ROOT), "QUOTALIMIT_STORE": store, "SECRET": "of all workers"}
    environment |= {"OPENAI_BASE_URL": f"{model}/v1", "OPENAI_API_KEY": "none"}
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        options += ("--bind", f"fd://{listener.fileno()}", "--keep-alive", "60", "--log-level", "warning")
        command = [sys.executable, "-m", "gunicorn", "--workers", str(WORKERS), *options]
        command += ["--worker-class", "uvicorn_worker.UvicornWorker", "tests.integrations.worker_app:app"]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, pass_fds=[listener.fileno()], stderr=subprocess.PIPE
        )
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.terminate()
            _, said = process.communicate()
    assert (process.returncode, said.decode()) == (0, "")


@pytest.fixture(scope="module", params=["sqlite", "sqlite-preload", "valkey", "valkey-preload"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Workers that are forked before they import the application, or after; nobody has asked them yet."""
    kind, _, preload = request.param.partition("-")
    servers.server().empty()
    path = tmp_path_factory.mktemp("gunicorn") / "counts.db"
    store_url = f"sqlite:///{path}" if kind == "sqlite" else servers.server().url
    store, model = store_from_url(store_url), ModelServer()
    with (
        uvicorn_serving(model.app) as model_url,
        gunicorn(store_url, model_url, *(["--preload"] if preload else [])) as url,
    ):
        yield Site(url, store, model, preloaded=bool(preload))
        model.go_on.set()
    store.close()


def at_once(
    clients: list[httpx.Client], number: int, ask: Callable[[httpx.Client], httpx.Response]
) -> list[httpx.Response]:
    """The answers to as many requests, which the clients make in turn and all at the same time."""

    def ask_in_turn(place: int) -> list[httpx.Response]:
        return [ask(clients[place]) for _ in range(place, number, len(clients))]

    with ThreadPoolExecutor(len(clients)) as pool:
        return [answer for answers in pool.map(ask_in_turn, range(len(clients))) for answer in answers]


def statuses(answers: list[httpx.Response]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


def refused_by(answers: list[httpx.Response]) -> set[str]:
    """The policies that refusals name."""
    return {policy for answer in answers if answer.status_code == 429 for policy in answer.json()["violated-policies"]}


def test_rule_5_a_hundred_requests_a_minute_by_address(site: Site) -> None:
    with site.clients("127.0.0.1") as clients:
        answers = at_once(clients, 140, lambda client: client.get("/me"))
    assert statuses(answers) == {401: 100, 429: 40}
    left = [limits(answer.headers)["by-address"]["r"] for answer in answers if answer.status_code == 401]
    assert sorted(left) == list(range(100))
    assert refused_by(answers) == {"by-address"}
    assert len({answer.headers["X-Worker"] for answer in answers}) == WORKERS


def test_rule_5_twenty_requests_a_minute_by_user(site: Site) -> None:
    with site.clients("127.0.0.2", "alice") as clients:
        answers = at_once(clients, 60, lambda client: client.get("/me"))
    assert statuses(answers) == {200: 20, 429: 40}
    left = [limits(answer.headers)["by-user"]["r"] for answer in answers if answer.status_code == 200]
    assert sorted(left) == list(range(20))
    assert refused_by(answers) == {"by-user"}


def test_rule_7_ten_thousand_tokens_a_day(site: Site) -> None:
    """Seven streams run at the same time, one token is left, and with it one more call is made."""
    while datetime.now(UTC).strftime("%H:%M") == "23:59":  # the test belongs to one day
        time.sleep(1)
    tokens = TokenBudget("10_000/day", name="tokens", store=site.store)

    def chat(client: httpx.Client) -> httpx.Response:
        return client.post("/chat", json={"prompt": "hi"})

    with site.clients("127.0.0.3", "bob") as clients, ThreadPoolExecutor(1) as pool:
        site.model.usage, site.model.pause_at = 1_425, 1
        running = pool.submit(at_once, clients[:7], 7, chat)
        eventually(lambda: site.model.sent == 7 or running.done())
        site.model.go_on.set()
        answers = running.result()
        site.model.usage = 24
        answers.append(chat(clients[7]))
        assert used(tokens, "bob") == 9_999
        site.model.usage = 1
        answers.append(chat(clients[8]))
        assert used(tokens, "bob") == 10_000
        refused = at_once(clients[:8], 8, chat)
    assert [answer.text for answer in answers] == ["hello world"] * 9
    assert statuses(refused) == {429: 8}
    assert refused_by(refused) == {"tokens"}
    assert used(tokens, "bob") == 10_000
    assert len(site.model.requests) == 9


def test_an_application_that_was_preloaded_was_imported_once(site: Site) -> None:
    """So the parent's connection to the store is one that its workers must not use."""
    starts = RateLimiter("1000/day", name="starts", store=site.store)
    assert used(starts, "all") == (1 if site.preloaded else WORKERS)
