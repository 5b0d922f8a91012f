"""The same endpoints limited by quotalimit, slowapi and fastapi-limiter: what clients get and what it costs.

    pip install -e '.[test,compare]' && python -m tests.integrations.compare

Each is set up as its own documentation says, all count in memory. Everything is run against uvicorn by httpx; the cost
of a request is that of the application alone, called as a server would call it, cases interleaved, medians.
"""

from __future__ import annotations

import asyncio
import json
import logging
import statistics
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import httpx
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from .servers import uvicorn_serving

LIMIT, SECONDS = 3, 2
"""What each user may do, in the probes: so many requests in so many seconds."""

Make = Callable[[int, int], FastAPI]
"""Makes an application that lets each user do so many requests in so many seconds."""


def user_of(request: Request) -> str:
    return request.headers["X-User"]


def bare(_limit: int, _seconds: int) -> FastAPI:
    app = FastAPI()

    @app.get("/me")
    async def me(request: Request) -> JSONResponse:
        return JSONResponse({"user": user_of(request)})

    @app.get("/sync")
    def sync(request: Request) -> JSONResponse:
        return JSONResponse({"user": user_of(request)})

    return app


def with_quotalimit(limit: int, seconds: int) -> FastAPI:
    from quotalimit import TokenBudget, rate_limited, record_usage, token_budget
    from quotalimit.integrations.fastapi import client_address, install

    app = FastAPI()
    install(app)
    rate = f"{limit}/{seconds} seconds"

    @app.get("/me")
    @rate_limited(rate, key=user_of)
    async def me(request: Request) -> JSONResponse:
        return JSONResponse({"user": user_of(request)})

    @app.get("/sync")
    @rate_limited(rate, key=user_of)
    def sync(request: Request) -> JSONResponse:
        return JSONResponse({"user": user_of(request)})

    @app.get("/by-address")
    @rate_limited(rate, key=client_address())
    async def by_address(request: Request) -> JSONResponse:
        return JSONResponse({})

    @app.get("/stacked")
    @rate_limited(f"{limit}/minute", key=user_of)
    @rate_limited(f"{3 * limit}/minute", key=client_address())
    async def stacked(request: Request) -> JSONResponse:
        return JSONResponse({})

    @app.websocket("/ws")
    @rate_limited(rate, key=lambda websocket: user_of(websocket))
    async def ws(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app.state.budget = TokenBudget("1_000/day")

    @app.get("/tokens")
    @token_budget(app.state.budget, key=user_of)
    async def tokens(request: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "an answer"
            record_usage(400)

        return StreamingResponse(parts())

    return app


def with_slowapi(limit: int, seconds: int) -> FastAPI:
    from slowapi import Limiter, _rate_limit_exceeded_handler
    from slowapi.errors import RateLimitExceeded
    from slowapi.util import get_remote_address

    app = FastAPI()
    limiter = Limiter(key_func=get_remote_address, headers_enabled=True)
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)  # type: ignore[arg-type]
    rate = f"{limit}/{seconds} second"

    @app.get("/me")
    @limiter.limit(rate, key_func=user_of)
    async def me(request: Request) -> JSONResponse:
        return JSONResponse({"user": user_of(request)})

    @app.get("/sync")
    @limiter.limit(rate, key_func=user_of)
    def sync(request: Request) -> JSONResponse:
        return JSONResponse({"user": user_of(request)})

    @app.get("/by-address")
    @limiter.limit(rate)
    async def by_address(request: Request) -> JSONResponse:
        return JSONResponse({})

    @app.get("/stacked")
    @limiter.limit(f"{limit}/minute", key_func=user_of)
    @limiter.limit(f"{3 * limit}/minute")
    async def stacked(request: Request) -> JSONResponse:
        return JSONResponse({})

    @app.websocket("/ws")
    @limiter.limit(rate, key_func=user_of)
    async def ws(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    return app


def with_fastapi_limiter(limit: int, seconds: int) -> FastAPI:
    from fastapi_limiter.depends import RateLimiter, WebSocketRateLimiter
    from pyrate_limiter import Duration, Limiter, Rate

    async def by_user(request: Request) -> str:
        return user_of(request)

    def limited(amount: int, period: int, **options: Any) -> Any:
        return Depends(RateLimiter(Limiter(Rate(amount, Duration.SECOND * period)), **options))

    app = FastAPI()

    @app.get("/me", dependencies=[limited(limit, seconds, identifier=by_user)])
    async def me(request: Request) -> JSONResponse:
        return JSONResponse({"user": user_of(request)})

    @app.get("/sync", dependencies=[limited(limit, seconds, identifier=by_user)])
    def sync(request: Request) -> JSONResponse:
        return JSONResponse({"user": user_of(request)})

    @app.get("/by-address", dependencies=[limited(limit, seconds)])
    async def by_address(request: Request) -> JSONResponse:
        return JSONResponse({})

    @app.get("/stacked", dependencies=[limited(3 * limit, 60), limited(limit, 60, identifier=by_user)])
    async def stacked(request: Request) -> JSONResponse:
        return JSONResponse({})

    of_sockets = WebSocketRateLimiter(Limiter(Rate(limit, Duration.SECOND * seconds)), identifier=by_user)

    @app.websocket("/ws")
    async def ws(websocket: WebSocket) -> None:
        await websocket.accept()
        await of_sockets(websocket)
        await websocket.close()

    return app


CONTENDERS: dict[str, Make] = {
    "quotalimit": with_quotalimit,
    "slowapi": with_slowapi,
    "fastapi-limiter": with_fastapi_limiter,
}


# What clients get


@dataclass
class Probe:
    """One question about a contender, asked of a fresh server."""

    question: str
    ask: Callable[[httpx.Client, FastAPI], str]


def get(client: httpx.Client, path: str, user: str = "alice", **headers: str) -> httpx.Response:
    return client.get(path, headers={"X-User": user, **{name.replace("_", "-"): v for name, v in headers.items()}})


def refused(client: httpx.Client) -> httpx.Response:
    return [get(client, "/me") for _ in range(LIMIT + 1)][-1]


def told(response: httpx.Response) -> str:
    names = [name for name in response.headers if "ratelimit" in name or name == "retry-after"]
    return ", ".join(sorted(names)) or "nothing"


def body(client: httpx.Client, _app: FastAPI) -> str:
    response = refused(client)
    text = json.dumps(json.loads(response.text))
    return f"{response.headers['content-type']}: {text if len(text) < 60 else text[:57] + '...'}"


def retry_after_is_true(client: httpx.Client, _app: FastAPI) -> str:
    time.sleep(SECONDS - time.time() % SECONDS)  # the start of a fixed window
    for _ in range(LIMIT):
        get(client, "/me")
    time.sleep(0.3)
    response = get(client, "/me")
    if "retry-after" not in response.headers:
        return "no Retry-After"
    seconds = int(response.headers["retry-after"])
    time.sleep(seconds)
    return f"{seconds} s, then {get(client, '/me').status_code}"


def in_one_period(client: httpx.Client, _app: FastAPI) -> str:
    """As many as are admitted in half a second, around the end of a window that the first request began."""
    get(client, "/me")
    time.sleep(SECONDS - 0.3)
    admitted = [get(client, "/me").status_code for _ in range(LIMIT)]
    time.sleep(0.4)
    admitted += [get(client, "/me").status_code for _ in range(LIMIT)]
    return f"{admitted.count(200)} in half a second"


def forged(client: httpx.Client, _app: FastAPI) -> str:
    answers = [get(client, "/by-address", X_Forwarded_For=f"198.51.100.{n}").status_code for n in range(3 * LIMIT)]
    return f"{answers.count(200)} of {LIMIT}"


def others(client: httpx.Client, _app: FastAPI) -> str:
    for _ in range(LIMIT + 1):
        get(client, "/me")
    return "served" if get(client, "/me", "bob").status_code == 200 else "refused too"


def eaten(client: httpx.Client, _app: FastAPI) -> str:
    """What is left of the limit of an address after a user sent twice as much as she may, for other users there."""
    for _ in range(2 * LIMIT):
        get(client, "/stacked", "alice")
    left = 0
    while get(client, "/stacked", f"user {left}").status_code == 200:
        left += 1
    return str(left)


def websocket(client: httpx.Client, _app: FastAPI) -> str:
    url = f"ws://{client.base_url.host}:{client.base_url.port}/ws"
    outcome = ""
    for _ in range(LIMIT + 1):
        try:
            with connect(url, additional_headers={"X-User": "alice"}) as socket:
                socket.recv()
        except InvalidStatus as denied:
            outcome = f"handshake: HTTP {denied.response.status_code}"
        except ConnectionClosed as closed:
            code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else ("nothing", "")
            outcome = f"closed with {code} {reason}".strip()
    return outcome


def openapi(client: httpx.Client, _app: FastAPI) -> str:
    operation = client.get("/openapi.json").json()["paths"]["/me"]["get"]
    return "shown" if "429" in operation["responses"] else "not shown"


def tokens(client: httpx.Client, app: FastAPI) -> str:
    if not any(getattr(route, "path", None) == "/tokens" for route in app.routes):
        return "no such limit"
    statuses = [get(client, "/tokens").status_code for _ in range(4)]
    return f"{statuses}, {app.state.budget.peek('alice').used} charged"


PROBES = [
    Probe("Status", lambda client, _: str(refused(client).status_code)),
    Probe("Headers of a refusal", lambda client, _: told(refused(client))),
    Probe("Headers of an answer", lambda client, _: told(get(client, "/me"))),
    Probe("Body", body),
    Probe("Waiting `Retry-After`", retry_after_is_true),
    Probe(f"Limit of {LIMIT} in {SECONDS} s: admitted", in_one_period),
    Probe(f"{LIMIT} by address, `X-Forwarded-For` forged: admitted", forged),
    Probe("After alice is refused, bob is", others),
    Probe(f"Alice sends {2 * LIMIT}, {LIMIT} are refused: left of her address's {3 * LIMIT}", eaten),
    Probe("WebSocket", websocket),
    Probe("429 in OpenAPI", openapi),
    Probe("Tokens of a stream", tokens),
]


def run_probes() -> None:
    print(f"| | {' | '.join(CONTENDERS)} |\n|---|{'---|' * len(CONTENDERS)}")
    for probe in PROBES:
        cells = []
        for make in CONTENDERS.values():
            app = make(LIMIT, SECONDS)
            with uvicorn_serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
                try:
                    cells.append(probe.ask(client, app))
                except Exception as error:  # part of the answer
                    cells.append(f"{type(error).__name__}: {error}")
        print(f"| {probe.question} | {' | '.join(cells)} |", flush=True)


# What it costs


async def call(app: FastAPI, path: str, user: str) -> float:
    """Seconds that the application takes for one request."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"x-user", user.encode())],
        "client": ("203.0.113.9", 50_000),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    status = 0

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    start = time.perf_counter()
    await app(scope, receive, send)
    taken = time.perf_counter() - start
    assert status == (429 if user == "refused" else 200), status
    return taken


async def measure(path: str, *, is_refused: bool = False, rounds: int = 3_000) -> dict[str, float]:
    """The median seconds of a request to each application, asked in turns."""
    limit = 1 if is_refused else 10_000_000
    apps = {"bare": bare(0, 0)} | {name: make(limit, 3_600) for name, make in CONTENDERS.items()}
    taken: dict[str, list[float]] = {name: [] for name in apps}
    users: Iterator[int] = count()
    for name, app in apps.items():
        if is_refused and name != "bare":
            await first(app, path)
    for _ in range(rounds):
        user = f"user {next(users) % 100}"
        for name, app in apps.items():
            taken[name].append(await call(app, path, "refused" if is_refused and name != "bare" else user))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


async def first(app: FastAPI, path: str) -> None:
    """Use up a limit of one request."""
    try:
        await call(app, path, "refused")
    except AssertionError:
        pass


def run_costs() -> None:
    print(f"\n| time of a request, the bare application's as 1 | {' | '.join(CONTENDERS)} |")
    print(f"|---|{'---|' * len(CONTENDERS)}")
    for title, path, is_refused in [
        ("async endpoint", "/me", False),
        ("sync endpoint", "/sync", False),
        ("refused", "/me", True),
    ]:
        seconds = asyncio.run(measure(path, is_refused=is_refused))
        ratios = [f"{seconds[name] / seconds['bare']:.2f}" for name in CONTENDERS]
        print(f"| {title} (bare: {seconds['bare'] * 1e6:.0f} µs) | {' | '.join(ratios)} |", flush=True)


def main() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    run_probes()
    run_costs()


if __name__ == "__main__":
    main()
