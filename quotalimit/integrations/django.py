"""Django: `RateLimitMiddleware` makes a breach a 429, and tells every client where it stands.

Put `"quotalimit.integrations.django.RateLimitMiddleware"` first in `MIDDLEWARE`. It serves sync and async views.
`QUOTALIMIT_X_RATELIMIT = True` among the settings adds `X-RateLimit-Limit`, `-Remaining` and `-Reset`. Django makes a
500 of what middleware itself raises: middleware that calls a limited function catches `LimitExceeded` and returns
`problem(error)`. A streaming body that raises while it is sent comes too late for a 429.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.http import HttpRequest, HttpResponse

from quotalimit.decision import Decision, collect_decisions
from quotalimit.errors import LimitExceeded, StoreError
from quotalimit.integrations import http
from quotalimit.integrations.client_address import Header, Proxies


class RateLimitMiddleware:
    """Answers breaches with 429 (or 413, 503), and puts the headers of limits on all answers."""

    sync_capable: ClassVar[bool] = True
    async_capable: ClassVar[bool] = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        # Python 3.11's own does not see what Django marks
        self._is_async: bool = iscoroutinefunction(get_response)  # pyright: ignore[reportDeprecated]
        if self._is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponse | Awaitable[HttpResponse]:
        if self._is_async:
            return self._call_async(request)
        with collect_decisions() as seen:
            return _with_headers(self.get_response(request), seen)

    async def _call_async(self, request: HttpRequest) -> HttpResponse:
        with collect_decisions() as seen:
            return _with_headers(await self.get_response(request), seen)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        """What Django asks when a view has raised."""
        return problem(error) if isinstance(error, (LimitExceeded, StoreError)) else None


def problem(error: LimitExceeded | StoreError) -> HttpResponse:
    """The response that answers an exception."""
    status, headers, body = http.answer_to(error, x_ratelimit=_wants_x_ratelimit())
    return HttpResponse(body, status=status, headers=headers)


def client_address(*proxies: str, header: Header = "X-Forwarded-For") -> Callable[[HttpRequest], str]:
    """A key function: the address that a request comes from, IPv6 by /64.

    `proxies` are the addresses and networks of the proxies that are believed, `"unix"` for one on a Unix socket;
    `header` is the one that they write. Without any it is the address of the peer. The view takes `request`. See
    `quotalimit.integrations.client_address`.
    """
    believed = Proxies(proxies, header)
    name = "HTTP_" + header.upper().replace("-", "_")

    def client_address(request: HttpRequest) -> str:
        line = request.META.get(name)
        return believed.client(request.META.get("REMOTE_ADDR"), [] if line is None else [line])

    return client_address


def _with_headers(response: HttpResponse, seen: list[Decision]) -> HttpResponse:
    for name, value in http.rate_limit_headers(seen, x_ratelimit=_wants_x_ratelimit()).items():
        response[name] = value
    return response


def _wants_x_ratelimit() -> bool:
    return bool(getattr(settings, "QUOTALIMIT_X_RATELIMIT", False))
