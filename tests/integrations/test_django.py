"""Django under its own server and under uvicorn: sync and async views, sync and async middleware."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import django
import httpx
import pytest
import time_machine
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import RequestFactory, override_settings
from django.urls import path

from quotalimit import (
    InvalidKey,
    RateLimiter,
    RateLimitExceeded,
    StoreUnavailable,
    TokenBudget,
    limiters_of,
    rate_limited,
    record_usage,
    token_budget,
)
from quotalimit.integrations.django import client_address, problem

from ..helpers import open_holds, used
from .fields import limits, policies
from .servers import Watched, eventually, serving, uvicorn_serving

pytestmark = pytest.mark.usefixtures("clock")


@rate_limited("2/minute", key="user", name="sync")
def sync(request: HttpRequest, user: str) -> HttpResponse:
    return HttpResponse("hello")


@rate_limited("2/minute", key="user", name="async")
async def in_the_loop(request: HttpRequest, user: str) -> HttpResponse:
    return HttpResponse("hello")


@rate_limited("2/minute", key="user", name="deep")
def called(user: str) -> str:
    return "hello"


def deep(request: HttpRequest, user: str) -> HttpResponse:
    return HttpResponse(called(user))


@rate_limited("2/minute", key=client_address(), name="peer")
def peer(request: HttpRequest) -> HttpResponse:
    return HttpResponse("hello")


@rate_limited("2/minute", key=client_address("127.0.0.0/8"), name="proxied")
def proxied(request: HttpRequest) -> HttpResponse:
    return HttpResponse("hello")


go_on = threading.Event()


@token_budget("10_000/day", key="user", reserve=600, name="tokens")
def stream(request: HttpRequest, user: str) -> StreamingHttpResponse:
    def parts() -> Iterator[str]:
        for number in range(50):
            if number == 3:
                assert go_on.wait(30)
            record_usage(10)
            yield "x" * 100_000  # more than a socket buffers for a client that is gone

    return StreamingHttpResponse(parts())


@token_budget("10_000/day", key="user", reserve=600, name="tokens-async")
async def stream_async(request: HttpRequest, user: str) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[str]:
        for number in range(50):
            while number == 3 and not go_on.is_set():
                await asyncio.sleep(0.005)
            record_usage(10)
            yield "x" * 100_000

    return StreamingHttpResponse(parts())


@token_budget("1M/day", key="user", reserve=80, name="endless")
async def endless(request: HttpRequest, user: str) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(1_000):
            await asyncio.sleep(0)  # one that never waits cannot be interrupted
            record_usage(10)
            yield b"x" * 1_000_000

    return StreamingHttpResponse(parts())


def too_large(request: HttpRequest) -> HttpResponse:
    RateLimiter("5/minute").acquire("alice", cost=6)
    raise AssertionError


def down(request: HttpRequest) -> HttpResponse:
    raise StoreUnavailable("redis://u:hunter2@db.internal")


def broken(request: HttpRequest) -> HttpResponse:
    raise ZeroDivisionError


urlpatterns = [
    path("sync/<user>", sync),
    path("async/<user>", in_the_loop),
    path("deep/<user>", deep),
    path("peer", peer),
    path("proxied", proxied),
    path("stream/<user>", stream),
    path("stream-async/<user>", stream_async),
    path("endless/<user>", endless),
    path("too-large", too_large),
    path("down", down),
    path("broken", broken),
]


OURS = "quotalimit.integrations.django.RateLimitMiddleware"

settings.configure(
    SECRET_KEY="none", ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, MIDDLEWARE=[OURS], LOGGING_CONFIG=None, USE_TZ=True
)
django.setup()


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def serve(kind: str) -> AbstractContextManager[str]:
    """Django under `runserver`'s server or under uvicorn."""
    if kind == "asgi":
        return uvicorn_serving(get_asgi_application())
    server = ThreadedWSGIServer(("127.0.0.1", 0), Quiet)
    server.set_app(get_wsgi_application())
    return serving(server)


SERVERS = pytest.mark.parametrize("server", ["wsgi", "asgi"])


@SERVERS
@pytest.mark.parametrize("view", ["sync", "async", "deep"])
def test_a_breach_is_a_429_with_headers_and_a_problem_body(
    server: str, view: str, clock: time_machine.Traveller
) -> None:
    with serve(server) as url:
        *admitted, refused = [httpx.get(f"{url}/{view}/alice") for _ in range(3)]
        other = httpx.get(f"{url}/{view}/bob")
        assert [(answer.status_code, answer.text) for answer in (*admitted, other)] == [(200, "hello")] * 3
        assert [limits(answer.headers) for answer in admitted] == [{view: {"r": left, "t": 60}} for left in (1, 0)]
        assert policies(other.headers) == {view: {"q": 2, "w": 60}}

        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "60"
        assert refused.headers["Content-Type"] == "application/problem+json"
        assert limits(refused.headers) == {view: {"r": 0, "t": 60}}
        assert refused.json()["violated-policies"] == [view]
        assert "alice" not in f"{refused.headers} {refused.text}"

        clock.shift(timedelta(seconds=59))
        assert httpx.get(f"{url}/{view}/alice").status_code == 429
        clock.shift(timedelta(seconds=1))
        assert httpx.get(f"{url}/{view}/alice").status_code == 200


@SERVERS
def test_other_failures_get_their_own_status(server: str) -> None:
    with serve(server) as url:
        answers = {path: httpx.get(f"{url}/{path}") for path in ("too-large", "down", "broken", "nowhere")}
    statuses = {path: answer.status_code for path, answer in answers.items()}
    assert statuses == {"too-large": 413, "down": 503, "broken": 500, "nowhere": 404}
    assert "hunter2" not in answers["down"].text
    assert not any("Retry-After" in answer.headers for answer in answers.values())


@SERVERS
def test_forwarded_addresses_count_behind_named_proxies_only(server: str) -> None:
    forged = [{"X-Forwarded-For": f"9.9.9.9, 198.51.100.{number % 2}"} for number in range(5)]
    with serve(server) as url:
        statuses = {
            path: [httpx.get(f"{url}/{path}", headers=header).status_code for header in forged]
            for path in ("peer", "proxied")
        }
    assert statuses == {"peer": [200, 200, 429, 429, 429], "proxied": [200, 200, 200, 200, 429]}


@SERVERS
def test_x_ratelimit_headers_come_on_request(server: str) -> None:
    with override_settings(QUOTALIMIT_X_RATELIMIT=True), serve(server) as url:
        answers = [httpx.get(f"{url}/sync/alice") for _ in range(3)]
    assert [answer.headers["X-RateLimit-Remaining"] for answer in answers] == ["1", "0", "0"]


everything = RateLimiter("1/minute", name="everything")


def limiting(get_response: Any) -> Any:
    """A middleware of one's own, which limits all requests of an address, also those that no view is for."""
    by_address = client_address()

    def middleware(request: HttpRequest) -> HttpResponse:
        try:
            everything.acquire(by_address(request))
        except RateLimitExceeded as error:
            return problem(error)
        return get_response(request)

    return middleware


@SERVERS
def test_a_middleware_that_limits_answers_by_itself(server: str) -> None:
    with override_settings(MIDDLEWARE=[OURS, f"{__name__}.limiting"]), serve(server) as url:
        answers = [httpx.get(f"{url}/nowhere") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [404, 429]
    assert [limits(answer.headers) for answer in answers] == [{"everything": {"r": 0, "t": 60}}] * 2


@pytest.mark.parametrize("server", ["wsgi", "asgi"])
def test_a_stream_is_charged_when_it_ends_and_when_the_client_goes_away(server: str) -> None:
    view, endpoint = ("stream", stream) if server == "wsgi" else ("stream-async", stream_async)
    (budget,) = limiters_of(endpoint)
    assert isinstance(budget, TokenBudget)
    app = Watched(get_asgi_application())
    go_on.clear()
    with serve(server) if server == "wsgi" else uvicorn_serving(app) as url:
        with httpx.stream("GET", f"{url}/{view}/alice", timeout=30) as answer:
            received, read = answer.iter_bytes(), 0
            (policy,) = limits(answer.headers)
            assert limits(answer.headers)[policy]["r"] == 9_400
            while read < 300_000:
                read += len(next(received))
            assert open_holds(budget) == 1
        if server == "asgi":
            assert app.client_has_gone.wait(30)
        go_on.set()
        eventually(lambda: open_holds(budget) == 0)
        before = used(budget)
        assert before == 30 if server == "asgi" else 30 <= before < 500
        assert len(httpx.get(f"{url}/{view}/alice", timeout=30).content) == 5_000_000
        eventually(lambda: open_holds(budget) == 0)
        assert used(budget) == before + 500


def test_a_client_that_stops_reading_and_goes_away_leaves_no_hold() -> None:
    """The server is waiting for room to send then, and not for the next part."""
    (budget,) = limiters_of(endless)
    assert isinstance(budget, TokenBudget)
    with serve("asgi") as url:
        with httpx.stream("GET", f"{url}/endless/alice", timeout=30) as answer:
            received = answer.iter_bytes()
            assert next(received)
            assert open_holds(budget) == 1
        eventually(lambda: open_holds(budget) == 0)
    assert 0 < used(budget) < 10_000


def test_a_peer_without_an_address_is_refused_with_a_word_on_what_to_do() -> None:
    request = RequestFactory().get("/", REMOTE_ADDR="", headers={"Forwarded": "for=198.51.100.7"})
    with pytest.raises(InvalidKey, match="unix"):
        client_address()(request)
    assert client_address("unix", header="Forwarded")(request) == "198.51.100.7"
    assert client_address("unix")(request) == "unix"
