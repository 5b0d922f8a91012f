"""FastAPI and Starlette: `install(app)` makes a breach a 429, and tells every client where it stands.

Exceptions are answered by exception handlers, inside of the application's middleware, so that CORS headers are on a
429 too; those that middleware raises, by a middleware of our own, if `install` is called after the others are added.
It also puts the headers of all decisions of a request on its answer. It is plain ASGI: Starlette's
`BaseHTTPMiddleware` runs the application in another task, and would stand in the way of streams.

A limit is checked before the first byte where the decorated function is called before the response is made: as an
endpoint, a dependency, or a function whose stream the endpoint returns. What raises inside a body comes too late: the
200 has been sent, and all that is left is to break the connection off.

**WebSockets.** Before `accept` the handshake is answered like any request, if the server can (uvicorn can; others
answer 403). After it the connection is closed with 1008, "policy violation" (RFC 6455, 7.4.1), and a reason that
says when to come again. 1013, "try again later", is registered for an overloaded server, and asks to connect to
another one; so it is for a store that cannot answer. 4429 and the like mean nothing to a client that was not told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from quotalimit.decision import collect_decisions
from quotalimit.decorators import limiters_of
from quotalimit.errors import LimitExceeded, StoreError
from quotalimit.integrations import http
from quotalimit.integrations.client_address import Header, Proxies

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.dependencies.models import Dependant

POLICY_VIOLATION: Final = 1008
TRY_AGAIN_LATER: Final = 1013
LONGEST_REASON: Final = 123
"""Bytes that a close frame has room for (RFC 6455, 5.5)."""


def install(app: Starlette, *, x_ratelimit: bool = False) -> None:
    """Answer breaches with 429 (or 413, 503), put the headers of limits on all answers, and document the 429.

    Call it after other middleware has been added, and on mounted applications too.
    `x_ratelimit` adds `X-RateLimit-Limit`, `-Remaining` and `-Reset`.
    """

    async def answer(connection: HTTPConnection, error: Exception) -> Response | None:
        assert isinstance(error, (LimitExceeded, StoreError))
        if isinstance(connection, WebSocket):
            await _turn_away(connection, error, x_ratelimit=x_ratelimit)
            return None
        return problem(error, x_ratelimit=x_ratelimit)

    app.add_exception_handler(LimitExceeded, answer)  # type: ignore[arg-type]
    app.add_exception_handler(StoreError, answer)  # type: ignore[arg-type]
    app.add_middleware(RateLimitMiddleware, x_ratelimit=x_ratelimit)
    if hasattr(app, "openapi"):
        _document(app)


def problem(error: LimitExceeded | StoreError, *, x_ratelimit: bool = False) -> Response:
    """The response that answers an exception, for an exception handler of your own."""
    status, headers, body = http.answer_to(error, x_ratelimit=x_ratelimit)
    return Response(body, status, headers)


def client_address(*proxies: str, header: Header = "X-Forwarded-For") -> Callable[[HTTPConnection], str]:
    """A key function: the address that a request comes from, IPv6 by /64.

    `proxies` are the addresses and networks of the proxies that are believed, `"unix"` for one on a Unix socket;
    `header` is the one that they write. Without any it is the address of the peer. The decorated function takes
    `request: Request`. See `quotalimit.integrations.client_address`.
    """
    believed = Proxies(proxies, header)

    def client_address(request: HTTPConnection) -> str:
        peer = request.client
        return believed.client(peer.host if peer else None, request.headers.getlist(header))

    return client_address


class RateLimitMiddleware:
    """Puts the headers of a request's decisions on its answer, and answers what other middleware raises."""

    def __init__(self, app: ASGIApp, *, x_ratelimit: bool = False) -> None:
        self.app = app
        self._x_ratelimit = x_ratelimit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if seen:
                    message.setdefault("headers", [])  # which an application may leave out
                    headers = http.rate_limit_headers(seen, x_ratelimit=self._x_ratelimit)
                    MutableHeaders(scope=message).update(headers)
            seen.clear()  # a stream may make many calls, whose headers are too late
            await send(message)

        with collect_decisions() as seen:
            try:
                await self.app(scope, receive, send_with_headers)
            except (LimitExceeded, StoreError) as error:
                if started:
                    raise
                await problem(error, x_ratelimit=self._x_ratelimit)(scope, receive, send_with_headers)


async def _turn_away(websocket: WebSocket, error: LimitExceeded | StoreError, *, x_ratelimit: bool) -> None:
    accepted = websocket.application_state is WebSocketState.CONNECTED
    if not accepted and "websocket.http.response" in websocket.scope.get("extensions", {}):
        await websocket.send_denial_response(problem(error, x_ratelimit=x_ratelimit))
        return
    if websocket.application_state is not WebSocketState.DISCONNECTED:
        code = TRY_AGAIN_LATER if isinstance(error, StoreError) else POLICY_VIOLATION
        await websocket.close(code, http.summary_of(error)[:LONGEST_REASON])


def _document(app: Any) -> None:
    """Show the 429 in the OpenAPI schema of the operations that may answer it."""
    make_schema: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make_schema()
        for route in _routes(app):
            for method in route.methods if _is_limited(route.dependant) else ():
                operation = schema["paths"].get(route.path_format, {}).get(method.lower())
                if operation is not None:
                    operation["responses"].setdefault("429", _REFUSAL)
        return schema

    app.openapi = openapi


def _routes(app: FastAPI) -> Iterator[Any]:
    """The routes of an application that are in its schema, those of its routers too."""
    from fastapi import routing

    every: Callable[[Iterable[Any]], Iterable[Any]] = getattr(routing, "iter_route_contexts", iter)
    for route in every(app.routes):
        if isinstance(getattr(route, "original_route", route), routing.APIRoute):
            yield route


def _is_limited(dependant: Dependant) -> bool:
    """Whether an endpoint, or anything that it depends on, is decorated."""
    call = dependant.call
    return (call is not None and bool(limiters_of(call))) or any(map(_is_limited, dependant.dependencies))


_REFUSAL: Final = {
    "description": "Too many requests: a limit was passed",
    "headers": {
        "Retry-After": {"description": "Seconds after which to try again", "schema": {"type": "integer"}},
        "RateLimit-Policy": {"description": "The limits that hold", "schema": {"type": "string"}},
        "RateLimit": {"description": "What is left of them", "schema": {"type": "string"}},
    },
    "content": {
        http.PROBLEM_TYPE: {
            "schema": {
                "type": "object",
                "properties": {
                    "type": {"type": "string"},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "detail": {"type": "string"},
                    "violated-policies": {"type": "array", "items": {"type": "string"}},
                },
            }
        }
    },
}
