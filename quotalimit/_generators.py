"""Generators, async generators and awaitables that settle their call once, whatever ends them.

Each is a real one of its kind. One that nobody runs settles all the same: a generator is advanced past an empty first
step, so that its `finally` runs; what is run by an event loop, and has none yet, is handed an `_Unbegun`.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from inspect import CO_ITERABLE_COROUTINE
from types import FunctionType, coroutine
from typing import Any, Final, Generic, TypeVar

from quotalimit._calls import Call
from quotalimit.recording import begin, end

_Work = TypeVar("_Work")
_Driver = TypeVar("_Driver")


def run(call: Call, stream: Generator[Any, Any, Any], *, begun: bool = False) -> Generator[Any, Any, Any]:
    """A generator that runs another for a call.

    `begun` says that the call has done work already, which is charged even if nobody iterates.
    """
    flags: int = getattr(getattr(stream, "gi_code", None), "co_flags", 0)
    driver = _named((_drive_awaited if flags & CO_ITERABLE_COROUTINE else drive)(call, stream, begun), stream)
    next(driver)  # past its first, empty yield: from here on its `finally` runs
    return driver


def run_async(
    call: Call | None,
    stream: AsyncGenerator[Any, Any],
    enter: Callable[[], Awaitable[Call | None]] | None = None,
    *,
    begun: bool = False,
) -> AsyncGenerator[Any, Any]:
    """The same for an async generator; a call that must wait first is entered at its first item.

    The event loop that sees its first step closes it, be it at the loop's end. That is the running one; where none
    runs, as in a thread that answers requests, it is the one that asks for the first item.
    """
    is_seen = enter is None and sys.get_asyncgen_hooks().firstiter is not None
    driver = _named(drive_async(_Unbegun(call, stream, begun), enter, is_seen), stream)
    if is_seen:
        try:
            driver.__anext__().__await__().__next__()
        except StopIteration:
            pass
    return driver


def drive(call: Call, stream: Generator[Any, Any, Any], begun: bool) -> Generator[Any, Any, Any]:
    """Run a generator for a call: everything that is yielded, sent, thrown and returned passes through."""
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
                call.finish_stream(stop.value)
                call.flush()
                return stop.value
            except BaseException as error:
                call.fail(error)
                call.flush()
                raise
            finally:
                thrown = None  # its traceback has this frame: it would keep itself alive
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


_drive_awaited: Final = FunctionType(drive.__code__, globals())
"""The same for a generator that can be awaited."""
coroutine(_drive_awaited)


async def drive_async(
    unbegun: _Unbegun[AsyncGenerator[Any, Any]], enter: Callable[[], Awaitable[Call | None]] | None, is_seen: bool
) -> AsyncGenerator[Any, Any]:
    """The same for an async generator, with that empty first step only if an event loop sees it."""
    call = unbegun.call if enter is None else await enter()
    value = None
    if is_seen:
        try:
            value = yield
        except BaseException:
            unbegun.drop()
            raise
    thrown: BaseException | None = None
    try:
        stream = unbegun.start()
        while True:
            token = None
            try:
                if call is not None:
                    token = begin(call)
                item = await (unseen(stream.asend, value) if thrown is None else stream.athrow(thrown))
            except StopAsyncIteration:
                if call is not None:
                    call.finish_stream()
                    await call.flush_async()
                return
            except BaseException as error:
                if call is not None:
                    call.fail(error)
                    await call.flush_async()
                raise
            finally:
                thrown = None
                end(token)
            try:
                if call is not None:
                    call.see(item)
                value, thrown = (yield item), None
            except GeneratorExit:
                token = None
                try:
                    if call is not None:
                        if sys.get_asyncgen_hooks().finalizer is None:  # no event loop comes back from what is awaited
                            call.cut()
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


def unseen(advance: Callable[..., Awaitable[Any]], *arguments: Any) -> Awaitable[Any]:
    """Advance an inner stream unseen by the event loop, which at its end would close it while its driver does."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, hooks.finalizer and _leave_to_driver)
    try:
        return advance(*arguments)
    finally:
        sys.set_asyncgen_hooks(*hooks)


def _leave_to_driver(_stream: AsyncGenerator[Any, Any]) -> None:
    """Finalize an inner stream that is collected together with its driver, which the event loop closes: not at all."""


def later(call: Call, awaitable: Awaitable[Any], deliver: Callable[[Call, Any], Any]) -> Coroutine[Any, Any, Any]:
    """A coroutine for an awaitable result; dropped before it ran, it gives back what it holds."""
    return _named(_later(call, _Unbegun(call, awaitable, False), deliver), awaitable)


def _named(driver: _Driver, driven: Any) -> _Driver:
    """Name what runs something like that."""
    named: Any = driver
    named.__name__ = getattr(driven, "__name__", named.__name__)
    named.__qualname__ = getattr(driven, "__qualname__", named.__qualname__)
    return driver


async def _later(call: Call, unbegun: _Unbegun[Awaitable[Any]], deliver: Callable[[Call, Any], Any]) -> Any:
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


class _Unbegun(Generic[_Work]):
    """What nobody has run yet, a coroutine or an async generator: it has no `finally`, but its arguments die."""

    __slots__ = ("_begun", "_work", "call")

    def __init__(self, call: Call | None, work: _Work, begun: bool) -> None:
        self.call = call
        self._work: _Work | None = work
        self._begun = begun

    def start(self) -> _Work:
        """The work, run from now on: what it returns, a stream say, may run on when this is gone."""
        work, self._work = self._work, None
        assert work is not None
        return work

    def drop(self) -> None:
        """Settle the call, if this never ran."""
        work, self._work = self._work, None
        if work is not None:
            if self.call is not None:
                (self.call.cut if self._begun else self.call.release)()
            close = getattr(work, "close", None)
            if close is not None:
                close()

    __del__ = drop
