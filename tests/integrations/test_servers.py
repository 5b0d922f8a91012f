"""FastAPI under uvicorn, as clients over real connections see it: streams that break off, and WebSockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio.to_thread
import httpx
import pytest
from fastapi import Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from quotalimit import RateLimiter, TokenBudget, rate_limited, record_usage, token_budget
from quotalimit.integrations.fastapi import client_address, install

from ..helpers import open_holds, used
from .fields import limits
from .servers import Watched, eventually, uvicorn_serving

pytestmark = pytest.mark.usefixtures("clock")


class Streams:
    """Decorated endpoints that stream: each records 10 tokens a part, and waits before the fourth to be let on."""

    def __init__(self, **options: Any) -> None:
        self.budget = TokenBudget("100/day", name="tokens")
        self.go_on = threading.Event()
        self.app = FastAPI()
        install(self.app)

        def parts() -> Iterator[str]:
            for number in range(6):
                if number == 3:
                    assert self.go_on.wait(30)
                record_usage(10)
                yield f"part {number};"

        async def parts_async() -> AsyncIterator[str]:
            for number in range(6):
                if number == 3:
                    await anyio.to_thread.run_sync(self.go_on.wait, 30, abandon_on_cancel=True)
                record_usage(10)
                yield f"part {number};"

        @self.app.get("/sync")
        @token_budget(self.budget, key="user", **options)
        def sync(user: str) -> StreamingResponse:
            return StreamingResponse(parts())

        @self.app.get("/async")
        @token_budget(self.budget, key="user", **options)
        async def in_the_loop(user: str) -> StreamingResponse:
            return StreamingResponse(parts_async())


@pytest.mark.parametrize("path", ["sync", "async"])
def test_a_decorated_endpoint_whose_client_goes_away_is_charged_for_what_was_written(path: str) -> None:
    streams = Streams(reserve=80)
    app = Watched(streams.app)
    with uvicorn_serving(app) as url:
        with httpx.stream("GET", f"{url}/{path}?user=alice", timeout=30) as answer:
            assert limits(answer.headers) == {"tokens": {"r": 20, "t": 12 * 3600}}
            parts, read = answer.iter_text(), ""  # kept: an iterator that is dropped closes the connection
            while "part 2" not in read:
                read += next(parts)
            assert open_holds(streams.budget) == 1
            assert httpx.get(f"{url}/{path}?user=alice", timeout=30).status_code == 429
        assert app.client_has_gone.wait(30)
        if path == "sync":  # a thread cannot be interrupted: it ends with the part that it is at
            streams.go_on.set()
        eventually(lambda: open_holds(streams.budget) == 0)
        assert used(streams.budget) == (40 if path == "sync" else 30)
        streams.go_on.set()


@pytest.mark.parametrize("path", ["sync", "async"])
def test_a_client_that_stops_reading_and_goes_away_leaves_no_hold(path: str) -> None:
    """The server is waiting for room to send then, and not for the next part."""
    budget, app = TokenBudget("1M/day", name="tokens"), FastAPI()

    @app.get("/sync")
    @token_budget(budget, key="user", reserve=80)
    def sync(user: str) -> StreamingResponse:
        def parts() -> Iterator[bytes]:
            for _ in range(1_000):
                record_usage(10)
                yield b"x" * 1_000_000

        return StreamingResponse(parts())

    @app.get("/async")
    @token_budget(budget, key="user", reserve=80)
    async def in_the_loop(user: str) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(1_000):
                await asyncio.sleep(0)  # one that never waits cannot be interrupted
                record_usage(10)
                yield b"x" * 1_000_000

        return StreamingResponse(parts())

    with uvicorn_serving(app) as url:
        with httpx.stream("GET", f"{url}/{path}?user=alice", timeout=30) as answer:
            received = answer.iter_bytes()
            assert next(received)
            assert open_holds(budget) == 1
        eventually(lambda: open_holds(budget) == 0)
    assert 0 < used(budget) < 10_000


@pytest.mark.parametrize("path", ["sync", "async"])
def test_a_decorated_endpoint_that_is_read_to_its_end_is_charged_in_full(path: str) -> None:
    streams = Streams()
    streams.go_on.set()
    with uvicorn_serving(streams.app) as url:
        statuses = [httpx.get(f"{url}/{path}?user=alice", timeout=30).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert used(streams.budget) == 120
    assert open_holds(streams.budget) == 0


def test_websockets_are_turned_away_with_a_429_and_closed_with_a_reason() -> None:
    app = FastAPI()
    install(app)
    by_address, messages = client_address(), RateLimiter("2/minute", name="messages")

    @rate_limited("2/minute", key=lambda websocket: by_address(websocket), name="handshakes")
    def handshake(websocket: WebSocket) -> None: ...

    @app.websocket("/echo", dependencies=[Depends(handshake)])
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await messages.acquire_async("alice")
            await websocket.send_text(text)

    with uvicorn_serving(app) as url:
        address = url.replace("http", "ws") + "/echo"
        with connect(address) as socket:
            for word in ("one", "two"):
                socket.send(word)
                assert socket.recv() == word
            socket.send("three")
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv()
        with connect(address):
            pass
        with pytest.raises(InvalidStatus) as denied, connect(address):
            pass
    assert closed.value.rcvd is not None
    reason = "2/minute exceeded: 1 requested, 0 remaining; retry after 60 s"
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, reason)
    response = denied.value.response
    assert (response.status_code, response.headers["Retry-After"]) == (429, "60")
    assert limits(response.headers) == {"handshakes": {"r": 0, "t": 60}}
