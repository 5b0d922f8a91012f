"""Responses of web frameworks: the body that one streams is part of the call that returned it.

A decorated endpoint returns long before its body is written, and what it used is known only then. So the stream in the
response is replaced by one that runs for the call: usage recorded while the body is written counts, and the call is
settled when the body ends, or when the client goes away and the server drops it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable
from typing import Any, Final

from quotalimit._calls import Call
from quotalimit._generators import run, run_async

_FIELDS: Final = {"starlette": "body_iterator", "werkzeug": "response", "django": "streaming_content"}
"""The attribute that is the stream of a streaming response, by the package of its class."""


def drive_body(call: Call, response: Any) -> bool:
    """Run the body of a streaming response for a call. False if this is not one."""
    field = _field_of(type(response))
    if field is None:
        return False
    if getattr(response, "file_to_stream", None) is not None:  # Django sends files its own way
        return False
    body: Any = getattr(response, field, None)
    if hasattr(body, "__aiter__"):
        setattr(response, field, run_async(call, each_async(body), begun=True))
    elif hasattr(body, "__next__"):
        setattr(response, field, run(call, _each(body), begun=True))
    else:
        return False
    return True


def has_body(kind: type) -> bool:
    """Whether responses of a class may have a body that is a stream."""
    return _field_of(kind) is not None


def _field_of(kind: type) -> str | None:
    packages = (str(base.__module__).partition(".")[0] for base in kind.__mro__)
    return next((_FIELDS[package] for package in packages if package in _FIELDS), None)


def _each(body: Iterable[Any]) -> Generator[Any]:
    try:
        yield from body
    finally:
        close = getattr(body, "close", None)
        if close is not None:
            close()


async def each_async(body: AsyncIterable[Any]) -> AsyncGenerator[Any]:
    try:
        async for part in body:
            yield part
    finally:
        close = getattr(body, "aclose", None)
        if close is not None:
            await close()
