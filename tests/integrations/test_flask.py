"""Flask under werkzeug's server: breaches are answered, every answer tells where the client stands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
import time_machine
from flask import Flask, Response
from werkzeug.serving import WSGIRequestHandler, make_server

from quotalimit import (
    InvalidKey,
    LimitExceeded,
    RateLimiter,
    StoreUnavailable,
    TokenBudget,
    rate_limited,
    record_usage,
    token_budget,
)
from quotalimit.integrations.flask import client_address, install, problem

from ..helpers import open_holds, used
from .fields import limits, policies
from .servers import eventually, serving

pytestmark = pytest.mark.usefixtures("clock")


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        pass


def get(app: Flask, *paths: str, **options: Any) -> list[httpx.Response]:
    """The answers to one request after another, over real connections."""
    with serving(make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)) as url:
        return [httpx.get(url + path, **options) for path in paths]


@pytest.fixture
def app() -> Flask:
    app = Flask("an-app")
    install(app)

    @app.get("/sync/<user>")
    @rate_limited("2/minute", key="user", name="sync")
    def sync(user: str) -> str:
        return "hello"

    @app.get("/async/<user>")
    @rate_limited("2/minute", key="user", name="async")
    async def in_a_loop(user: str) -> str:
        return "hello"

    @rate_limited("2/minute", key="user", name="deep")
    def called(user: str) -> str:
        return "hello"

    @app.get("/deep/<user>")
    def deep(user: str) -> str:
        return called(user)

    @app.get("/stream/<user>")
    @rate_limited("2/minute", key="user", name="stream")
    def stream(user: str) -> Iterator[str]:
        yield from ("hel", "lo")

    return app


@pytest.mark.parametrize("path", ["sync", "async", "deep", "stream"])
def test_a_breach_is_a_429_with_headers_and_a_problem_body(
    app: Flask, path: str, clock: time_machine.Traveller
) -> None:
    *admitted, refused, other = get(app, *[f"/{path}/alice"] * 3, f"/{path}/bob")
    assert [(answer.status_code, answer.text) for answer in (*admitted, other)] == [(200, "hello")] * 3
    assert [limits(answer.headers) for answer in admitted] == [{path: {"r": left, "t": 60}} for left in (1, 0)]
    assert policies(other.headers) == {path: {"q": 2, "w": 60}}

    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "60"
    assert refused.headers["Content-Type"] == "application/problem+json"
    assert limits(refused.headers) == {path: {"r": 0, "t": 60}}
    assert refused.json()["violated-policies"] == [path]
    assert "alice" not in f"{refused.headers} {refused.text}"

    clock.shift(timedelta(seconds=59))
    assert get(app, f"/{path}/alice")[0].status_code == 429
    clock.shift(timedelta(seconds=1))
    assert get(app, f"/{path}/alice")[0].status_code == 200


def test_a_limit_before_every_request_holds_for_what_is_not_found_too() -> None:
    app = Flask("an-app")
    install(app, x_ratelimit=True)
    app.before_request(rate_limited("2/minute", key=client_address(), name="everything")(lambda: None))
    answers = get(app, *["/nowhere"] * 3)
    assert [answer.status_code for answer in answers] == [404, 404, 429]
    assert [limits(answer.headers)["everything"]["r"] for answer in answers] == [1, 0, 0]
    assert [answer.headers["X-RateLimit-Remaining"] for answer in answers] == ["1", "0", "0"]


def test_forwarded_addresses_count_behind_named_proxies_only() -> None:
    app = Flask("an-app")
    install(app)
    app.get("/peer")(rate_limited("1/minute", key=client_address())(lambda: "ok"))
    app.get("/proxied", endpoint="proxied")(rate_limited("1/minute", key=client_address("127.0.0.0/8"))(lambda: "ok"))

    def statuses(path: str) -> list[int]:
        forged = [{"X-Forwarded-For": f"9.9.9.9, 198.51.100.{number % 2}"} for number in range(3)]
        return [get(app, path, headers=header)[0].status_code for header in forged]

    assert statuses("/peer") == [200, 429, 429]
    assert statuses("/proxied") == [200, 200, 429]


def test_a_peer_without_an_address_is_refused_with_a_word_on_what_to_do(app: Flask) -> None:
    with app.test_request_context(environ_base={"REMOTE_ADDR": ""}), pytest.raises(InvalidKey, match="unix"):
        client_address()()
    with app.test_request_context(environ_base={"REMOTE_ADDR": ""}, headers={"Forwarded": "for=198.51.100.7"}):
        assert client_address("unix", header="Forwarded")() == "198.51.100.7"


@pytest.mark.parametrize(
    ("failing", "status"),
    [
        (lambda: RateLimiter("5/minute").acquire("alice", cost=6), 413),
        (lambda: _raise(StoreUnavailable("redis://u:hunter2@db.internal")), 503),
        (lambda: _raise(ZeroDivisionError()), 500),
    ],
)
def test_other_failures_get_their_own_status(failing: Callable[[], Any], status: int) -> None:
    app = Flask("an-app")
    install(app)
    app.get("/")(failing)
    (answer,) = get(app, "/")
    assert (answer.status_code, "hunter2" in answer.text) == (status, False)
    assert "Retry-After" not in answer.headers


def test_an_error_handler_of_ones_own_can_use_the_answer(app: Flask) -> None:
    @app.errorhandler(LimitExceeded)
    def brand(error: LimitExceeded) -> Response:
        response = problem(error)
        response.headers["X-Brand"] = "ours"
        return response

    refused = get(app, *["/sync/alice"] * 3)[-1]
    assert (refused.status_code, refused.headers["X-Brand"]) == (429, "ours")
    assert limits(refused.headers) == {"sync": {"r": 0, "t": 60}}


@pytest.mark.parametrize("kind", ["generator", "response"])
def test_a_stream_is_charged_when_it_ends_and_when_the_client_goes_away(kind: str) -> None:
    budget, go_on = TokenBudget("10_000/day", name="tokens"), threading.Event()
    app = Flask("an-app")
    install(app)

    def parts() -> Iterator[str]:
        for number in range(50):
            if number == 3:
                assert go_on.wait(30)
            record_usage(10)
            yield "x" * 100_000  # more than a socket buffers for a client that is gone

    @app.get("/<user>")
    @token_budget(budget, key="user", reserve=600)
    def stream(user: str) -> Any:
        return parts() if kind == "generator" else Response(parts())

    with serving(make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)) as url:
        with httpx.stream("GET", f"{url}/alice", timeout=30) as answer:
            received, read = answer.iter_bytes(), 0
            assert limits(answer.headers)["tokens"]["r"] == 9_400
            while read < 300_000:
                read += len(next(received))
            assert open_holds(budget) == 1
        go_on.set()
        eventually(lambda: open_holds(budget) == 0)
        assert 30 <= used(budget) < 500
        before = used(budget)
        assert len(httpx.get(f"{url}/alice", timeout=30).content) == 5_000_000
        eventually(lambda: open_holds(budget) == 0)
        assert used(budget) == before + 500


def _raise(error: Exception) -> None:
    raise error
