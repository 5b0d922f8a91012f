"""Rule 11 on stores that wait for I/O: what a stream used is written, for all to see, when its end has been told."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from quotalimit import SQLiteStore, TokenBudget, token_budget
from tests.helpers import reply


class ChunkStream:
    """A stream as SDKs return it."""

    def __init__(self, fails: bool) -> None:
        self._items = iter(("once", "upon", reply(5, 2)))
        self._fails = fails

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = next(self._items)
        if self._fails and not isinstance(item, str):
            raise ConnectionError
        return item

    def close(self) -> None: ...


class AsyncChunkStream(ChunkStream):
    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        try:
            return ChunkStream.__next__(self)
        except StopIteration:
            raise StopAsyncIteration from None

    async def aclose(self) -> None: ...


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "counts.db")


def seen_by_others(path: str) -> int:
    """What another store on the same file counts."""
    other = SQLiteStore(path)
    try:
        return TokenBudget("1000/day", name="tokens", store=other).peek("alice").used
    finally:
        other.close()


def budget(path: str) -> Any:
    return token_budget("1000/day", key="user", name="tokens", reserve=100, store=SQLiteStore(path))


@pytest.mark.parametrize(("how", "charged"), [("end", 7), ("close", 100), ("error", 100)])
def test_a_stream_is_written_when_it_has_ended(path: str, how: str, charged: int) -> None:
    stream = budget(path)(lambda user: ChunkStream(fails=how == "error"))("alice")
    next(stream)
    assert seen_by_others(path) == 100
    if how == "close":
        stream.close()
    else:
        with contextlib.suppress(ConnectionError):
            list(stream)
    assert seen_by_others(path) == charged


@pytest.mark.parametrize(("how", "charged"), [("end", 7), ("close", 100), ("error", 100)])
async def test_an_async_stream_is_written_when_it_has_ended(path: str, how: str, charged: int) -> None:
    @budget(path)  # type: ignore[untyped-decorator]
    async def ask(user: str) -> AsyncChunkStream:
        return AsyncChunkStream(fails=how == "error")

    stream = await ask("alice")
    await anext(stream)
    assert seen_by_others(path) == 100
    if how == "close":
        await stream.aclose()
    else:
        with contextlib.suppress(ConnectionError):
            async for _ in stream:
                pass
    assert seen_by_others(path) == charged


def test_a_generator_that_is_closed_is_written_at_once(path: str) -> None:
    @budget(path)  # type: ignore[untyped-decorator]
    def ask(user: str) -> Iterator[str]:
        yield from ("once", "upon")

    stream: Any = ask("alice")
    next(stream)
    stream.close()
    assert seen_by_others(path) == 100
