"""FastAPI and Starlette: breaches are answered, every answer tells where the client stands, streams are settled."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import pytest
import time_machine
from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import WebSocketDenialResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from quotalimit import (
    InvalidKey,
    LimitExceeded,
    MemoryStore,
    RateLimiter,
    StoreUnavailable,
    TokenBudget,
    rate_limited,
    record_usage,
    token_budget,
)
from quotalimit.integrations.fastapi import client_address, install, problem

from ..helpers import open_holds, used
from .conftest import NOON
from .fields import limits, policies

pytestmark = pytest.mark.usefixtures("clock")


def serve(app: Starlette) -> TestClient:
    return TestClient(app, client=("203.0.113.9", 50_000))


def endpoints() -> FastAPI:
    """One application with each kind of decorated endpoint and dependency, twice a minute each."""
    app = FastAPI()
    install(app)

    @app.get("/sync")
    @rate_limited("2/minute", key="user", name="sync")
    def sync(user: str) -> str:
        return user

    @app.get("/async")
    @rate_limited("2/minute", key="user", name="async")
    async def in_the_loop(user: str) -> str:
        return user

    @rate_limited("2/minute", key="user", name="sync-dependency")
    def dependency(user: str) -> str:
        return user

    @rate_limited("2/minute", key="user", name="async-dependency")
    async def dependency_in_the_loop(user: str) -> str:
        return user

    @rate_limited("2/minute", key="user", name="yielding-dependency")
    def yielding(user: str) -> Iterator[str]:
        yield user

    @rate_limited("2/minute", key="user", name="async-yielding-dependency")
    async def yielding_in_the_loop(user: str) -> AsyncIterator[str]:
        yield user

    for name, depends in {
        "sync-dependency": dependency,
        "async-dependency": dependency_in_the_loop,
        "yielding-dependency": yielding,
        "async-yielding-dependency": yielding_in_the_loop,
    }.items():

        @app.get(f"/{name}")
        async def of_dependency(user: str = Depends(depends)) -> str:
            return user

    @rate_limited("2/minute", key="user", name="deep")
    def called(user: str) -> str:
        return user

    @app.get("/deep")
    def deep(user: str) -> str:
        return called(user)

    @app.get("/stream")
    @rate_limited("2/minute", key="user", name="stream")
    async def stream(user: str) -> StreamingResponse:
        return StreamingResponse(iter([user, "!"]))

    @app.get("/jsonl")
    @rate_limited("2/minute", key="user", name="jsonl")
    async def jsonl(user: str) -> AsyncIterator[str]:
        yield user

    return app


PATHS = [
    "sync",
    "async",
    "sync-dependency",
    "async-dependency",
    "yielding-dependency",
    "async-yielding-dependency",
    "deep",
    "stream",
    "jsonl",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_breach_is_a_429_with_headers_and_a_problem_body(path: str, clock: time_machine.Traveller) -> None:
    client = serve(endpoints())
    for left in (1, 0):
        admitted = client.get(f"/{path}?user=alice")
        assert (admitted.status_code, "alice" in admitted.text) == (200, True)
        assert policies(admitted.headers) == {path: {"q": 2, "w": 60}}
        assert limits(admitted.headers) == {path: {"r": left, "t": 60}}
        assert "Retry-After" not in admitted.headers

    refused = client.get(f"/{path}?user=alice")
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "60"
    assert refused.headers["Content-Type"] == "application/problem+json"
    assert limits(refused.headers) == {path: {"r": 0, "t": 60}}
    assert refused.json()["violated-policies"] == [path]
    assert "alice" not in f"{refused.headers} {refused.text}"
    assert client.get(f"/{path}?user=bob").status_code == 200

    clock.shift(timedelta(seconds=59))
    assert client.get(f"/{path}?user=alice").status_code == 429
    clock.shift(timedelta(seconds=1))
    assert client.get(f"/{path}?user=alice").status_code == 200


def test_the_headers_of_a_refusal_tell_of_the_layers_that_admitted_too() -> None:
    app = FastAPI()
    install(app)

    @rate_limited("9/minute", key="user", name="outer")
    def outer(user: str) -> None: ...

    @app.get("/", dependencies=[Depends(outer)])
    @rate_limited("1/hour", key="user", name="inner")
    def root(user: str) -> None: ...

    client = serve(app)
    client.get("/?user=alice")
    refused = client.get("/?user=alice")
    assert limits(refused.headers) == {"outer": {"r": 7}, "inner": {"r": 0, "t": 3600}}
    assert refused.json()["violated-policies"] == ["inner"]


def test_an_answer_without_limits_has_no_headers_of_limits() -> None:
    client = serve(endpoints())
    assert not {name for name in client.get("/openapi.json").headers if "ratelimit" in name.lower()}


def test_requests_at_once_tell_of_their_own_decisions_only() -> None:
    from concurrent.futures import ThreadPoolExecutor

    app = FastAPI()
    install(app)

    @app.get("/")
    @rate_limited("1/minute", key="user", name="one")
    def root(user: str) -> str:
        return user

    with serve(app) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda user: client.get(f"/?user={user}"), range(40)))
    assert [answer.status_code for answer in answers] == [200] * 40
    assert all(limits(answer.headers) == {"one": {"r": 0, "t": 60}} for answer in answers)


def test_a_breach_that_the_endpoint_catches_is_told_and_not_answered() -> None:
    app = FastAPI()
    install(app)
    large, small = RateLimiter("1/minute", name="large"), RateLimiter("9/minute", name="small")

    @app.get("/")
    def root() -> str:
        try:
            large.acquire("alice")
        except LimitExceeded:
            small.acquire("alice")
            return "small"
        return "large"

    client = serve(app)
    assert client.get("/").json() == "large"
    answer = client.get("/")
    assert (answer.status_code, answer.json()) == (200, "small")
    assert limits(answer.headers) == {"large": {"r": 0, "t": 60}, "small": {"r": 8}}


def test_x_ratelimit_headers_come_on_request() -> None:
    app = FastAPI()
    install(app, x_ratelimit=True)

    @app.get("/")
    @rate_limited("1/minute", key="user")
    def root(user: str) -> None: ...

    client = serve(app)
    for status in (200, 429):
        answer = client.get("/?user=alice")
        assert answer.status_code == status
        assert answer.headers["X-RateLimit-Limit"] == "1"
        assert answer.headers["X-RateLimit-Remaining"] == "0"
        assert answer.headers["X-RateLimit-Reset"] == str(int(NOON.timestamp()) + 60)


def test_a_request_that_can_never_fit_is_413() -> None:
    app = FastAPI()
    install(app)

    @app.get("/")
    @rate_limited("5/minute", key="user", cost=lambda images: images, name="images")
    def root(user: str, images: int) -> None: ...

    answer = serve(app).get("/?user=alice&images=6")
    assert (answer.status_code, answer.json()["violated-policies"]) == (413, ["images"])
    assert "Retry-After" not in answer.headers


def test_a_store_that_cannot_answer_is_503() -> None:
    app = FastAPI()
    install(app)

    @app.get("/")
    def root() -> None:
        raise StoreUnavailable("redis://u:hunter2@db.internal")

    answer = serve(app).get("/")
    assert (answer.status_code, "hunter2" in answer.text) == (503, False)


def test_a_full_store_is_503() -> None:
    app = FastAPI()
    install(app)

    @app.get("/")
    @rate_limited("5/minute", key="user", store=MemoryStore(max_keys=1))
    def root(user: str) -> None: ...

    client = serve(app)
    assert [client.get(f"/?user={user}").status_code for user in ("alice", "bob", "alice")] == [200, 503, 200]


def test_other_exceptions_are_left_alone() -> None:
    app = FastAPI()
    install(app)

    @app.get("/")
    @rate_limited("5/minute", key="user")
    def root(user: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        serve(app).get("/?user=alice")


def test_an_error_handler_of_ones_own_can_use_the_answer() -> None:
    app = FastAPI()
    install(app)

    @app.exception_handler(LimitExceeded)
    def brand(_request: Request, error: LimitExceeded) -> Any:
        response = problem(error)
        response.headers["X-Brand"] = "ours"
        return response

    @app.get("/")
    @rate_limited("1/minute", key="user", name="one")
    def root(user: str) -> None: ...

    client = serve(app)
    client.get("/?user=alice")
    refused = client.get("/?user=alice")
    assert (refused.status_code, refused.headers["X-Brand"]) == (429, "ours")
    assert limits(refused.headers) == {"one": {"r": 0, "t": 60}}


# Where it stands among middleware


def test_a_limit_in_middleware_holds_for_everything_that_is_not_found_too() -> None:
    app = FastAPI()
    by_address, everything = client_address(), RateLimiter("2/minute", name="everything")

    @app.middleware("http")
    async def limit(request: Request, call_next: Any) -> Any:
        await everything.acquire_async(by_address(request))
        return await call_next(request)

    @app.get("/somewhere")
    @rate_limited("9/minute", key="user", name="inside")
    def somewhere(user: str) -> None: ...

    install(app)
    client = serve(app)
    answers = [client.get(path) for path in ("/somewhere?user=alice", "/nowhere", "/somewhere?user=alice")]
    assert [answer.status_code for answer in answers] == [200, 404, 429]
    assert [limits(answer.headers)["everything"]["r"] for answer in answers] == [1, 0, 0]
    assert [list(limits(answer.headers)) for answer in answers] == [["everything", "inside"], *[["everything"]] * 2]
    assert answers[2].headers["Retry-After"] == "60"


def test_a_browser_of_another_site_may_read_a_429() -> None:
    app = endpoints()
    app.add_middleware(CORSMiddleware, allow_origins=["https://app.example"])
    client = serve(app)
    for _ in range(3):
        answer = client.get("/sync?user=alice", headers={"Origin": "https://app.example"})
    assert answer.status_code == 429
    assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"


def test_an_application_that_is_mounted_answers_for_itself() -> None:
    """It makes a 500 of what it does not know before the outer one hears of it, so it is installed on as well."""
    app, inner = FastAPI(), FastAPI()
    install(app)
    install(inner)
    app.mount("/inner", inner)

    @inner.get("/")
    @rate_limited("1/minute", key="user", name="one")
    def root(user: str) -> None: ...

    client = serve(app)
    answers = [client.get("/inner/?user=alice") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert [limits(answer.headers) for answer in answers] == [{"one": {"r": 0, "t": 60}}] * 2


@pytest.mark.parametrize("start", [{}, {"headers": ()}, {"headers": [(b"x-own", b"1")]}])
def test_an_answer_of_any_application_tells_where_the_client_stands(start: dict[str, Any]) -> None:
    """Also one that names no headers, as ASGI allows."""
    limiter = RateLimiter("3/minute", name="raw")

    async def raw(_scope: Scope, _receive: Receive, send: Send) -> None:
        limiter.acquire("alice")
        await send({"type": "http.response.start", "status": 200, **start})
        await send({"type": "http.response.body", "body": b"ok"})

    app = Starlette(routes=[Mount("/", raw)])
    install(app)
    answer = serve(app).get("/")
    assert (answer.status_code, answer.text) == (200, "ok")
    assert limits(answer.headers) == {"raw": {"r": 2, "t": 60}}
    assert answer.headers.get("X-Own") == ("1" if start.get("headers") else None)


@pytest.mark.parametrize("is_async", [False, True])
def test_starlette_without_fastapi(is_async: bool) -> None:
    by_address = client_address()

    @rate_limited("1/minute", key=by_address, name="one")
    def root(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    @rate_limited("1/minute", key=by_address, name="one-async")
    async def root_async(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    app = Starlette(routes=[Route("/", root_async if is_async else root)])
    install(app)
    client = serve(app)
    answers = [client.get("/") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert all(len(limits(answer.headers)) == 1 for answer in answers)


# Streams


def stream_of(budget: TokenBudget, is_async: bool) -> FastAPI:
    """An endpoint that is itself decorated, and streams what it records only while the body is written."""
    app = FastAPI()
    install(app)

    @app.get("/sync")
    @token_budget(budget, key="user")
    def sync(user: str) -> StreamingResponse:
        def body() -> Iterator[str]:
            for number in range(4):
                yield f"part {number};"
            record_usage(60)

        return StreamingResponse(body())

    @app.get("/async")
    @token_budget(budget, key="user")
    async def in_the_loop(user: str) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            for number in range(4):
                yield f"part {number};"
            record_usage(60)

        return StreamingResponse(body())

    return app


@pytest.mark.parametrize("path", ["sync", "async"])
def test_a_decorated_endpoint_is_charged_what_its_body_used(path: str) -> None:
    budget = TokenBudget("100/day", name="tokens")
    client = serve(stream_of(budget, path == "async"))
    for _ in range(2):
        answer = client.get(f"/{path}?user=alice")
        assert answer.text == "part 0;part 1;part 2;part 3;"
        assert answer.status_code == 200
    assert used(budget) == 120
    assert open_holds(budget) == 0
    refused = client.get(f"/{path}?user=alice")
    assert (refused.status_code, refused.json()["violated-policies"]) == (429, ["tokens"])


def test_a_breach_inside_a_body_comes_too_late_to_be_a_429() -> None:
    """What is documented: the 200 has been sent, so the connection breaks off with an exception in the log."""
    app = FastAPI()
    install(app)
    limiter = RateLimiter("1/minute", name="late")

    @app.get("/")
    async def root() -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            for _ in range(2):
                limiter.acquire("alice")
                yield "part"

        return StreamingResponse(body())

    with pytest.raises(RuntimeError, match="response already started") as late:
        serve(app).get("/")
    assert isinstance(late.value.__cause__, LimitExceeded)


def test_a_long_stream_that_calls_on_and_on_gathers_no_heap_of_decisions() -> None:
    from quotalimit.decision import collectors

    app = FastAPI()
    install(app)
    limiter, most = RateLimiter("1000/minute"), list[int]()

    @app.get("/")
    async def root() -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            for _ in range(100):
                limiter.acquire("alice")
                most.append(sum(map(len, collectors())))
                yield "part"

        return StreamingResponse(body())

    assert serve(app).get("/").status_code == 200
    assert max(most) == 1


# WebSockets


def sockets(*, x_ratelimit: bool = False) -> FastAPI:
    app = FastAPI()
    install(app, x_ratelimit=x_ratelimit)
    by_address = client_address()

    @rate_limited("1/minute", key=lambda websocket: by_address(websocket), name="handshakes")
    def handshake(websocket: WebSocket) -> None: ...

    @app.websocket("/guarded", dependencies=[Depends(handshake)])
    async def guarded(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("in")
        await websocket.close()

    messages = RateLimiter("2/minute", name="messages")

    @app.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await messages.acquire_async("alice")
            await websocket.send_text(text)

    @app.websocket("/down")
    async def down(websocket: WebSocket) -> None:
        await websocket.accept()
        raise StoreUnavailable("redis://u:hunter2@db.internal")

    return app


def test_a_websocket_is_turned_away_before_accept_with_a_429() -> None:
    client = serve(sockets(x_ratelimit=True))
    with client.websocket_connect("/guarded") as socket:
        assert socket.receive_text() == "in"
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/guarded"):
        pass
    assert denied.value.status_code == 429
    assert denied.value.headers["Retry-After"] == "60"
    assert limits(denied.value.headers) == {"handshakes": {"r": 0, "t": 60}}
    assert denied.value.headers["X-RateLimit-Remaining"] == "0"


async def test_a_server_that_cannot_answer_a_handshake_closes_it_with_a_reason() -> None:
    """Without the extension a close before accept is all there is; servers answer it with a 403."""
    app, sent = sockets(), list[Any]()

    async def connect() -> None:
        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/guarded", "headers": [], "query_string": b"", "client": ("1.2.3.4", 5)}
        await app(scope, receive, send)

    await connect()
    sent.clear()
    await connect()
    reason = "1/minute exceeded: 1 requested, 0 remaining; retry after 60 s"
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": reason}]


def test_a_websocket_is_closed_after_accept_with_a_code_and_a_reason() -> None:
    with serve(sockets()).websocket_connect("/echo") as socket:
        for word in ("one", "two"):
            socket.send_text(word)
            assert socket.receive_text() == word
        socket.send_text("three")
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
    assert closed.value.code == 1008
    assert closed.value.reason == "2/minute exceeded: 1 requested, 0 remaining; retry after 60 s"


def test_a_websocket_is_asked_to_try_later_where_the_store_cannot_answer() -> None:
    with serve(sockets()).websocket_connect("/down") as socket, pytest.raises(WebSocketDisconnect) as closed:
        socket.receive_text()
    assert (closed.value.code, closed.value.reason) == (1013, "limits cannot be checked now")


# OpenAPI


def test_openapi_shows_the_429_of_what_is_decorated() -> None:
    app = endpoints()
    router = APIRouter()

    @rate_limited("1/minute", key="user")
    def deepest(user: str) -> str:
        return user

    def between(user: str = Depends(deepest)) -> str:
        return user

    @router.post("/routed", dependencies=[Depends(between)])
    def routed() -> None: ...

    @app.get("/free")
    def free(user: str) -> None: ...

    @app.get("/own", responses={429: {"description": "our own words"}})
    @rate_limited("1/minute", key="user")
    def own(user: str) -> None: ...

    app.include_router(router, prefix="/api")
    paths = serve(app).get("/openapi.json").json()["paths"]
    shown = {path for path, operations in paths.items() for op in operations.values() if "429" in op["responses"]}
    assert shown == {"/api/routed", "/own", *(f"/{path}" for path in PATHS)} - {"/deep"}
    assert paths["/own"]["get"]["responses"]["429"]["description"] == "our own words"
    assert "application/problem+json" in paths["/sync"]["get"]["responses"]["429"]["content"]
    assert "Retry-After" in paths["/sync"]["get"]["responses"]["429"]["headers"]
    assert json.dumps(app.openapi()) == json.dumps(app.openapi())


# Whose request it is


def test_the_client_address_of_a_request() -> None:
    app = FastAPI()
    install(app)

    @app.get("/peer")
    @rate_limited("1/minute", key=client_address())
    def peer(request: Request) -> None: ...

    @app.get("/proxied")
    @rate_limited("1/minute", key=client_address("203.0.113.0/24"))
    def proxied(request: Request) -> None: ...

    client = serve(app)
    forged = [{"X-Forwarded-For": f"198.51.100.{number}"} for number in range(3)]
    assert [client.get("/peer", headers=header).status_code for header in forged] == [200, 429, 429]
    assert [client.get("/proxied", headers=header).status_code for header in forged] == [200, 200, 200]
    assert client.get("/proxied", headers={"X-Forwarded-For": "9.9.9.9, 198.51.100.0"}).status_code == 429


async def test_a_peer_without_an_address_is_refused_with_a_word_on_what_to_do() -> None:
    async def receive() -> Any: ...

    def request(peer: Any) -> Request:
        return Request({"type": "http", "headers": [], "client": peer})

    for peer in (None, ("", 0), ("testclient", 50_000)):
        with pytest.raises(InvalidKey, match=r'client_address\("unix"\)'):
            client_address()(request(peer))
        assert client_address("unix")(request(peer)) == "unix"


async def test_lifespan_and_other_scopes_pass_through() -> None:
    from quotalimit.integrations.fastapi import RateLimitMiddleware

    seen: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(*_: Any) -> Any: ...

    await RateLimitMiddleware(app)({"type": "lifespan"}, nothing, nothing)
    assert seen == ["lifespan"]
