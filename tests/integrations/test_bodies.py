"""The responses of decorated endpoints: a body that is streamed belongs to the call, whatever becomes of it."""

from __future__ import annotations

import asyncio
import gc
import io
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from typing import Any

import pytest
from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from flask import Response as FlaskResponse
from starlette.responses import JSONResponse, StreamingResponse

from quotalimit import TokenBudget, collect_decisions, record_usage, token_budget

from ..helpers import open_holds, used
from . import test_django  # noqa: F401  # configures Django

pytestmark = pytest.mark.usefixtures("clock", "small_heap")


class Body:
    """A body of three parts, each of which uses ten tokens; and whether it was closed."""

    def __init__(self) -> None:
        self.closed = 0

    def parts(self) -> Iterator[bytes]:
        try:
            for _ in range(3):
                record_usage(10)
                yield b"part"
        finally:
            self.closed += 1

    async def parts_async(self) -> AsyncIterator[bytes]:
        try:
            for _ in range(3):
                record_usage(10)
                yield b"part"
        finally:
            self.closed += 1


Respond = Callable[[Body], Any]

SYNC: dict[str, tuple[Respond, Callable[[Any], Iterator[bytes]]]] = {
    "flask": (lambda body: FlaskResponse(body.parts()), lambda response: iter(response.response)),
    "django": (lambda body: StreamingHttpResponse(body.parts()), iter),
}

ASYNC: dict[str, tuple[Respond, Callable[[Any], AsyncIterator[bytes]]]] = {
    "starlette": (lambda body: StreamingResponse(body.parts_async()), lambda response: response.body_iterator),
    "starlette in a thread": (lambda body: StreamingResponse(body.parts()), lambda response: response.body_iterator),
    "django": (lambda body: StreamingHttpResponse(body.parts_async()), aiter),
}


def answer(respond: Respond, body: Body) -> tuple[Any, TokenBudget]:
    """The response of a decorated endpoint, and the budget that it holds 50 on."""
    budget = TokenBudget("1000/day", name="tokens")

    @token_budget(budget, key="user", reserve=50)
    def endpoint(user: str) -> Any:
        return respond(body)

    response = endpoint("alice")
    assert (open_holds(budget), used(budget)) == (1, 50)
    return response, budget


async def collected(is_closed: Callable[[], bool]) -> None:
    """Wait until what was dropped is closed: async generators by the event loop, those of threads by these."""
    for _ in range(10_000):
        gc.collect()  # Django's responses refer to themselves
        await asyncio.sleep(0.001)
        if is_closed():
            return
    raise AssertionError("it was never closed")


@pytest.mark.parametrize("framework", SYNC)
@pytest.mark.parametrize("read", [1, 2, 3, 4])
def test_a_body_is_charged_for_what_was_read_of_it(framework: str, read: int) -> None:
    respond, iterate = SYNC[framework]
    body = Body()
    response, budget = answer(respond, body)
    parts = iterate(response)
    assert list(islice(parts, read)) == [b"part"] * min(read, 3)
    response.close()
    del parts
    assert (open_holds(budget), used(budget)) == (0, 10 * min(read, 3))
    assert body.closed == 1


@pytest.mark.parametrize("framework", ASYNC)
@pytest.mark.parametrize("read", [1, 2, 3, 4])
async def test_an_async_body_is_charged_for_what_was_read_of_it(framework: str, read: int) -> None:
    respond, iterate = ASYNC[framework]
    body = Body()
    response, budget = answer(respond, body)
    parts, got = iterate(response), 0
    async for part in parts:
        assert part == b"part"
        got += 1
        if got == read:
            break
    await parts.aclose()  # type: ignore[attr-defined]
    del parts, response
    await collected(lambda: body.closed == 1 and open_holds(budget) == 0)
    assert used(budget) == 10 * got


@pytest.mark.parametrize("framework", [*SYNC, *ASYNC])
async def test_a_response_that_is_never_sent_keeps_what_was_reserved(framework: str) -> None:
    """The endpoint has run, and may have called the model: that the body was not read makes it no cheaper."""
    respond = (SYNC | ASYNC)[framework][0]
    response, budget = answer(respond, Body())
    del response
    await collected(lambda: open_holds(budget) == 0)
    assert used(budget) == 50


@pytest.mark.parametrize("framework", SYNC)
def test_a_body_that_fails_is_settled(framework: str) -> None:
    def failing() -> Iterator[bytes]:
        record_usage(30)
        yield b"part"
        raise ZeroDivisionError

    make = FlaskResponse if framework == "flask" else StreamingHttpResponse
    response, budget = answer(lambda _: make(failing()), Body())
    with pytest.raises(ZeroDivisionError):
        list(SYNC[framework][1](response))
    assert (open_holds(budget), used(budget)) == (0, 30)


@pytest.mark.parametrize(
    "respond",
    [
        lambda: JSONResponse({}),
        lambda: FlaskResponse("text"),
        lambda: FlaskResponse(["a", "list"]),
        lambda: HttpResponse("text"),
    ],
)
def test_a_response_that_streams_nothing_is_settled_at_once(respond: Callable[[], Any]) -> None:
    budget = TokenBudget("1000/day", name="tokens")

    @token_budget(budget, key="user", reserve=50)
    def endpoint(user: str) -> Any:
        record_usage(30)
        return respond()

    with collect_decisions() as seen:
        endpoint("alice")
    assert (open_holds(budget), used(budget)) == (0, 30)
    assert seen[0].settlement is not None


def test_a_file_that_django_sends_stays_a_file() -> None:
    budget, file = TokenBudget("1000/day", name="tokens"), io.BytesIO(b"a file")

    @token_budget(budget, key="user", reserve=50)
    def endpoint(user: str) -> FileResponse:
        return FileResponse(file)

    response = endpoint("alice")
    assert response.file_to_stream is file
    assert (open_holds(budget), used(budget)) == (0, 50)
    response.close()
