"""Flask: `install(app)` makes a breach a 429, and tells every client where it stands.

Exceptions that views and `before_request` functions raise are answered by error handlers. The headers are put on by
wrapping `app.wsgi_app`, so the decisions gathered are those made before the response starts, also in async views. A
body that raises while it is sent comes too late for a 429.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, request

from quotalimit.decision import collect_decisions
from quotalimit.errors import LimitExceeded, StoreError
from quotalimit.integrations import http
from quotalimit.integrations.client_address import Header, Proxies

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


def install(app: Flask, *, x_ratelimit: bool = False) -> None:
    """Answer breaches with 429 (or 413, 503), and put the headers of limits on all answers.

    `x_ratelimit` adds `X-RateLimit-Limit`, `-Remaining` and `-Reset`.
    """

    def answer(error: LimitExceeded | StoreError) -> Response:
        return problem(error, x_ratelimit=x_ratelimit)

    app.register_error_handler(LimitExceeded, answer)
    app.register_error_handler(StoreError, answer)
    app.wsgi_app = _with_headers(app.wsgi_app, x_ratelimit)  # type: ignore[assignment, method-assign]


def problem(error: LimitExceeded | StoreError, *, x_ratelimit: bool = False) -> Response:
    """The response that answers an exception, for an error handler of your own."""
    status, headers, body = http.answer_to(error, x_ratelimit=x_ratelimit)
    return Response(body, status, headers)


def client_address(*proxies: str, header: Header = "X-Forwarded-For") -> Callable[[], str]:
    """A key function: the address that the present request comes from, IPv6 by /64.

    `proxies` are the addresses and networks of the proxies that are believed, `"unix"` for one on a Unix socket;
    `header` is the one that they write. Without any it is the address of the peer. See
    `quotalimit.integrations.client_address`.
    """
    believed = Proxies(proxies, header)

    def client_address() -> str:
        return believed.client(request.remote_addr, request.headers.getlist(header))

    return client_address


def _with_headers(app: WSGIApplication, x_ratelimit: bool) -> WSGIApplication:
    def wsgi_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Callable[[bytes], object]:
            ours = http.rate_limit_headers(seen, x_ratelimit=x_ratelimit)
            theirs = [(name, value) for name, value in headers if name not in ours]
            return start_response(status, [*theirs, *ours.items()], *error)

        with collect_decisions() as seen:
            return app(environ, start)

    return wsgi_app
