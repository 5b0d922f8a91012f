"""What gunicorn's workers run: the example, and in a header which of them has answered."""

from __future__ import annotations

import os

from starlette.types import Message, Receive, Scope, Send

from quotalimit import RateLimiter

from . import example_app

STARTS = RateLimiter("1000/day", name="starts")
STARTS.acquire("all")  # a preloaded application is forked with its store in use


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    async def tell(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-worker", b"%d" % os.getpid())]
        await send(message)

    await example_app.app(scope, receive, tell)
