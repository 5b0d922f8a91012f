"""Generators, async generators and awaitables that settle their call once, whatever ends them.

Each is a real one of its kind, advanced past an empty first step, so that its `finally` runs even if nobody does.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from typing import Any

from quotalimit._calls import Call
from quotalimit.recording import begin, end


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


def drive(call: Call, stream: Generator[Any, Any, Any], *, begun: bool = False) -> Generator[Any, Any, Any]:
    """Run a generator for a call: everything that is yielded, sent, thrown and returned passes through.

    `begun` says that the call has done work already, which is charged even if nobody iterates.
    """
    try:
        value = yield
    except BaseException:
        (call.cut if begun else call.release)()
        stream.close()
        raise
    if value is not None:
        stream.close()
        call.release()
        raise TypeError("can't send non-None value to a just-started generator")
    thrown: BaseException | None = None
    try:
        while True:
            token = None
            try:
                token = begin(call)
                item = stream.send(value) if thrown is None else stream.throw(thrown)
            except StopIteration as stop:
                call.finish(stop.value)
                call.flush()
                return stop.value
            except BaseException as error:
                call.fail(error)
                call.flush()
                raise
            finally:
                end(token)
            try:
                call.see(item)
                value, thrown = (yield item), None
            except GeneratorExit:
                token = None
                try:
                    token = begin(call)
                    stream.close()
                finally:
                    try:
                        call.cut()
                    finally:
                        end(token)
                raise
            except BaseException as error:
                thrown = error
    except BaseException:
        if not call.finished:  # an interrupt between two steps
            call.cut()
        raise


async def drive_async(
    enter: Callable[[], Awaitable[Call | None]] | None,
    call: Call | None,
    stream: AsyncGenerator[Any, Any],
    *,
    begun: bool = False,
) -> AsyncGenerator[Any, Any]:
    """Run an async generator for a call; one that must wait first is entered at its first item. `begun` as above."""
    value = None
    if enter is not None:
        call = await enter()
    elif call is not None:
        try:
            value = yield
        except BaseException:
            (call.cut if begun else call.release)()
            raise
    thrown: BaseException | None = None
    try:
        while True:
            token = None
            try:
                if call is not None:
                    token = begin(call)
                item = await (_advance(stream, value) if thrown is None else stream.athrow(thrown))
            except StopAsyncIteration:
                if call is not None:
                    call.finish()
                    await call.flush_async()
                return
            except BaseException as error:
                if call is not None:
                    call.fail(error)
                    await call.flush_async()
                raise
            finally:
                end(token)
            try:
                if call is not None:
                    call.see(item)
                value, thrown = (yield item), None
            except GeneratorExit:
                token = None
                try:
                    if call is not None:
                        token = begin(call)
                    await stream.aclose()
                finally:
                    try:
                        if call is not None:
                            call.cut()
                    finally:
                        end(token)
                raise
            except BaseException as error:
                thrown = error
    except BaseException:
        if call is not None and not call.finished:  # an interrupt between two steps
            call.cut()
        raise


def _advance(stream: AsyncGenerator[Any, Any], value: Any) -> Awaitable[Any]:
    """Advance the inner stream unseen by the event loop, which at its end would close it while its driver does."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        return stream.asend(value)
    finally:
        sys.set_asyncgen_hooks(*hooks)


def later(call: Call, awaitable: Awaitable[Any], deliver: Callable[[Call, Any], Any]) -> Coroutine[Any, Any, Any]:
    """A coroutine for an awaitable result; dropped before it ran, it gives back what it holds."""
    coroutine: Any = _later(call, _Unbegun(call, awaitable), deliver)
    coroutine.__name__ = getattr(awaitable, "__name__", coroutine.__name__)
    coroutine.__qualname__ = getattr(awaitable, "__qualname__", coroutine.__qualname__)
    return coroutine  # type: ignore[no-any-return]


async def _later(call: Call, unbegun: _Unbegun, deliver: Callable[[Call, Any], Any]) -> Any:
    token = None
    try:
        token = begin(call)
        result = await unbegun.start()
    except BaseException as error:
        call.fail(error)
        await call.flush_async()
        raise
    finally:
        end(token)
    result = deliver(call, result)
    await call.flush_async()
    return result


class _Unbegun:
    """An awaitable that nobody has awaited yet. A coroutine that never runs has no `finally`, but its arguments die."""

    __slots__ = ("_awaitable", "_call")

    def __init__(self, call: Call, awaitable: Awaitable[Any]) -> None:
        self._call = call
        self._awaitable: Awaitable[Any] | None = awaitable

    def start(self) -> Awaitable[Any]:
        """The awaitable, awaited from now on: what it returns, a stream say, may run on when this is gone."""
        awaitable, self._awaitable = self._awaitable, None
        assert awaitable is not None
        return awaitable

    def __del__(self) -> None:
        if self._awaitable is not None:
            self._call.release()
            close = getattr(self._awaitable, "close", None)
            if close is not None:
                close()
