"""Streams that settle once: generators and what is awaited later, watched to their end."""

from __future__ import annotations

import inspect
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from typing import Any

from quotalimit._calls import Call
from quotalimit.usage import begin, end


def first(stream: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Advance a driver past its first, empty yield: from here on its `finally` runs, even if nobody iterates."""
    next(stream)
    return stream


def first_async(stream: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
    """The same for an async driver: its first yield comes before any await, so it needs no event loop."""
    try:
        stream.__anext__().__await__().__next__()
    except StopIteration:
        pass
    return stream


def drive(call: Call, stream: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Run a generator for a call: everything that is yielded, sent, thrown and returned passes through."""
    try:
        value = yield
    except BaseException:
        call.release()
        stream.close()
        raise
    if value is not None:
        stream.close()
        call.release()
        raise TypeError("can't send non-None value to a just-started generator")
    thrown: BaseException | None = None
    while True:
        token = begin(call)
        try:
            item = stream.send(value) if thrown is None else stream.throw(thrown)
        except StopIteration as stop:
            call.finish(stop.value)
            return stop.value
        except BaseException as error:
            call.fail(error)
            raise
        finally:
            end(token)
        call.see(item)
        try:
            value, thrown = (yield item), None
        except GeneratorExit:
            token = begin(call)
            try:
                stream.close()
            finally:
                end(token)
                call.finish()
            raise
        except BaseException as error:
            thrown = error


async def drive_async(
    enter: Callable[[], Awaitable[Call | None]] | None, call: Call | None, stream: AsyncGenerator[Any, Any]
) -> AsyncGenerator[Any, Any]:
    """Run an async generator for a call; one that must wait first is entered at its first item."""
    value = None
    if enter is not None:
        call = await enter()
    elif call is not None:
        try:
            value = yield
        except BaseException:
            call.release()
            raise
    thrown: BaseException | None = None
    while True:
        token = begin(call)
        try:
            item = await (stream.asend(value) if thrown is None else stream.athrow(thrown))
        except StopAsyncIteration:
            if call is not None:
                call.finish()
            return
        except BaseException as error:
            if call is not None:
                call.fail(error)
            raise
        finally:
            end(token)
        if call is not None:
            call.see(item)
        try:
            value, thrown = (yield item), None
        except GeneratorExit:
            try:
                await stream.aclose()
            finally:
                if call is not None:
                    call.finish()
            raise
        except BaseException as error:
            thrown = error


def settle_later(call: Call, result: Any) -> Any:
    """A result that is not the end of its call: the same kind of object, settled when it has run."""
    if inspect.isgenerator(result):
        return first(drive(call, result))
    if inspect.isasyncgen(result):
        return first_async(drive_async(None, call, result))
    return _await(call, result)


def _await(call: Call, awaitable: Awaitable[Any]) -> Coroutine[Any, Any, Any]:
    """A coroutine advanced past an empty step, like the generators: dropped before it ran, it gives its hold back."""

    async def settled() -> Any:
        try:
            await _pause()
        except BaseException:
            call.release()
            raise
        token = begin(call)
        try:
            result = await awaitable
        except BaseException as error:
            call.fail(error)
            raise
        finally:
            end(token)
        call.finish(result)
        return result

    coroutine = settled()
    coroutine.send(None)
    return coroutine


@types.coroutine
def _pause() -> Generator[None, None, None]:
    yield
