"""Real servers on loopback, in threads of this process: so their clock can be moved, and their counts looked at."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@contextmanager
def uvicorn_serving(app: Any, **options: Any) -> Iterator[str]:
    """Serve an ASGI application; yields its address, such as `http://127.0.0.1:54321`."""
    settings = {"lifespan": "off", "loop": "asyncio", "log_config": None, "proxy_headers": False}
    config = uvicorn.Config(app, **settings | options)
    server = _Server(config)
    # asyncio turns Nagle's algorithm off only where it sees that the protocol is TCP: 40 ms of each answer
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert server.ready.wait(30)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Watched:
    """An ASGI application, and whether it has been told that a client went away in the middle of an answer."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.client_has_gone = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watch() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.client_has_gone.set()
            return message

        await self.app(scope, watch, send)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something is so in another thread."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.005)


class ModelServer:
    """What stands for OpenAI: it streams `words`, then tells `usage`; it pauses before the word number `pause_at`."""

    def __init__(self) -> None:
        self.words = ["hello", " world"]
        self.usage = 15
        self.pause_at: int | None = None
        self.go_on = threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.sent = 0
        """Words sent, of all answers."""
        self.app = Starlette(routes=[Route("/v1/chat/completions", self._complete, methods=["POST"])])

    async def _complete(self, request: Request) -> StreamingResponse:
        self.requests.append(await request.json())
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        for number, word in enumerate(self.words):
            if number == self.pause_at:
                while not self.go_on.is_set():
                    await asyncio.sleep(0.005)
            self.sent += 1
            yield _event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
        counted = {"prompt_tokens": 1, "completion_tokens": self.usage - 1, "total_tokens": self.usage}
        yield _event({"choices": [], "usage": counted})
        yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "a-model"}
    return f"data: {json.dumps(common | chunk)}\n\n"


@contextmanager
def serving(server: Any) -> Iterator[str]:
    """Run a server of the standard library's kind in a thread; yields its address."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
