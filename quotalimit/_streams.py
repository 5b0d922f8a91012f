"""Streams of SDKs: the object that a function returns, itself, watched to its end.

An SDK's stream is more than an iterator: it has `with`, `.response`, `.text_stream`, `.get_final_message()`. So it is
not wrapped. Its class is swapped for a subclass made for it, whose `__next__`, `close` and the like also tell the call:
whatever the SDK or its user does with the stream goes through them, and it stays what it was. What they do is part of
the call, too: the nested calls of a tool that an SDK runs between two items, say.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextvars import Token
from types import AsyncGeneratorType, GeneratorType
from typing import Any, Final
from weakref import WeakKeyDictionary, ref

from quotalimit._calls import Call
from quotalimit._generators import run, run_async, unseen
from quotalimit._kinds import MANAGERS, Delivery, class_seen, how_delivered, is_stream
from quotalimit.fields import field
from quotalimit.providers import read_usage
from quotalimit.recording import Recorder, begin, end

_WATCH: Final = "_quotalimit_watch"


def watch(call: Call, stream: Any, *, is_item: bool = False) -> bool:
    """Watch a stream, or what yields one when it is entered, for a call. False if its class does not let us.

    `is_item` says that it is an item of the call's own stream, and its end not that of the call.
    """
    try:
        kind: Any = type(stream)
        if kind is not class_seen(stream) and is_stream(inner := stream.__wrapped__):  # a proxy, which leads to it
            return watch(call, inner, is_item=is_item)
        known = _of(stream) if _is_watched(kind) else UNWATCHED
        if not known.owns(stream):
            object.__setattr__(stream, "__class__", _watched(kind))
            known = Watch(stream)
            fields = getattr(stream, "__dict__", None)
            if isinstance(fields, dict):
                fields[_WATCH] = known
            else:  # it has slots
                _elsewhere[id(stream)] = known
    except Exception:  # a foreign class may refuse in its own way
        return False
    known.add(call, is_item)
    return True


class Watch:
    """Tells the calls that return a stream, the innermost first, what happens to it."""

    __slots__ = ("_owner", "begun", "calls", "entered", "handed_on", "onlookers")

    def __init__(self, stream: object) -> None:
        self.calls: list[Call] = []
        self.onlookers: list[Call] = []
        """The calls of whose streams this is an item."""
        self.entered: Callable[[], object] | None = None
        """What this yielded when it was entered, if that was not itself."""
        self.handed_on = False
        """Whether that is a stream, which may outlive this."""
        self.begun = not type(stream).__name__.endswith(MANAGERS)
        """Whether the request may have been made: what yields a stream when it is entered makes it then."""
        self._owner = id(stream)

    def add(self, call: Call, is_item: bool) -> None:
        """Tell a call, too. Those that it is nested in come later, and those inside it settle first."""
        if not is_item:
            self.calls = [*(other for other in self.calls if not (other.finished or other is call)), call]
        elif call not in self.calls and call not in self.onlookers:
            self.onlookers.append(call)

    def owns(self, stream: object) -> bool:
        """Whether this is the stream itself, and not a copy that the SDK made of it."""
        return id(stream) == self._owner

    def begin(self) -> Token[Recorder | None] | None:
        """Make the innermost call that of what happens now."""
        for call in (*self.calls, *self.onlookers):
            if not call.finished:
                return begin(call)
        return None

    def hand_on(self, entered: Any) -> Any:
        """Watch what this yielded when it was entered. Returns that, or the generator that takes its place."""
        if not self.calls:
            return entered
        how = how_delivered(entered)
        if how is Delivery.STREAM:
            watched = [watch(call, entered) for call in self.calls]  # every call, also after one that cannot
            self.handed_on = all(watched)
        elif how is Delivery.GENERATOR or how is Delivery.ASYNC_GENERATOR:
            for call in self.calls:
                entered = (run if how is Delivery.GENERATOR else run_async)(call, entered, begun=True)
            self.handed_on = True
        self.entered = _weakly(entered) if self.handed_on else lambda: entered
        return entered

    def leave(self, stream: object) -> None:
        """The stream was left: closed, exited or dropped."""
        if self.begun:
            self._read(stream)
        for call in self.calls:
            if self.begun:
                call.cut()
            else:
                call.release()

    def exit(self, manager: object) -> None:
        """What was entered was left. If it is no stream, that is the end of the call, and it is the call's result."""
        if self.entered is None:
            self.leave(manager)
        elif self.handed_on:
            self.leave(self.entered())
        else:
            for call in self.calls:
                call.finish(self.entered())

    def see(self, item: object) -> None:
        streams = is_stream(item)
        for call in (*self.calls, *self.onlookers):
            if not (streams and watch(call, item, is_item=True)):
                call.see(item)

    def finish(self, stream: object) -> None:
        self._read(stream)
        for call in self.calls:
            call.finish_stream()

    def fail(self, stream: object, error: BaseException) -> None:
        self._read(stream)
        for call in self.calls:
            call.fail(error)

    def _read(self, stream: object) -> None:
        """Read the usage that a stream tells of itself, as pydantic-ai's do, if none of its items told any."""
        untold = [call for call in self.calls if not (call.finished or call.is_told)]
        if untold:
            report = field(stream, "usage")
            usage = read_usage(report)
            if usage is not None:
                for call in untold:
                    call.record(usage, (report,))

    def flush(self) -> None:
        for call in self.calls:
            call.flush()

    async def flush_async(self) -> None:
        for call in self.calls:
            await call.flush_async()


UNWATCHED: Final = Watch(None)
"""The watch of what is of a watched class, and is not watched: made anew by an SDK, say."""

_elsewhere: Final[dict[int, Watch]] = {}
"""The watches of streams that have no `__dict__`, by their ids."""


class _Elsewhere:
    """The watch of a stream that has none in its `__dict__`."""

    def __get__(self, stream: object, _kind: type) -> Watch:
        return _elsewhere.get(id(stream), UNWATCHED)


def _weakly(entered: Any) -> Callable[[], object]:
    try:
        return ref(entered)
    except TypeError:
        return lambda: None


def _is_watched(kind: type) -> bool:
    return kind.__dict__.get("__del__") is _delete


def _watched(kind: type) -> type:
    """The subclass of a stream's class that is watched."""
    if _is_watched(kind):  # a copy of a watched stream
        return kind
    reference = _classes.get(kind)
    known = None if reference is None else reference()
    if known is None:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": (), "__del__": _delete}
        hooks = {name: hook(getattr(kind, name), kind) for name, hook in _HOOKS.items() if hasattr(kind, name)}
        hooks = {name: hook for name, hook in hooks.items() if hook is not None}
        known = type(kind.__name__, (kind,), names | hooks | {_WATCH: _Elsewhere()})
        _classes[kind] = ref(known)
    return known


_classes: Final[WeakKeyDictionary[type, ref[type]]] = WeakKeyDictionary()


def _of(stream: object) -> Watch:
    watch: Watch = getattr(stream, _WATCH)
    return watch


def _delete(self: Any) -> None:
    watch = _of(self)
    try:
        if watch.owns(self) and not watch.handed_on:
            watch.leave(self)
    finally:
        _elsewhere.pop(id(self), None)
        finalizers = (kind.__dict__.get("__del__") for kind in type(self).__mro__)
        base = next((each for each in finalizers if each not in (None, _delete)), None)
        if base is not None:
            base(self)


def _step(stream: Any, advance: Callable[[Any], Any], items: Any) -> Any:
    """The next item of a stream."""
    watch = _of(stream)
    token = None
    try:
        token = watch.begin()
        item = advance(items)
    except StopIteration:
        watch.finish(stream)
        watch.flush()
        raise
    except BaseException as error:
        watch.fail(stream, error)
        watch.flush()
        raise
    finally:
        end(token)
    watch.see(item)
    return item


async def _step_async(stream: Any, advance: Callable[[Any], Awaitable[Any]], items: Any) -> Any:
    """The twin of `_step`."""
    watch = _of(stream)
    token = None
    try:
        token = watch.begin()
        item = await advance(items)
    except StopAsyncIteration:
        watch.finish(stream)
        await watch.flush_async()
        raise
    except BaseException as error:
        watch.fail(stream, error)
        await watch.flush_async()
        raise
    finally:
        end(token)
    watch.see(item)
    return item


def _next(base: Callable[..., Any], _kind: type) -> Callable[..., Any]:
    def __next__(self: Any) -> Any:  # noqa: N807
        return _step(self, base, self)

    return __next__


def _anext(base: Callable[..., Any], _kind: type) -> Callable[..., Any]:
    async def __anext__(self: Any) -> Any:  # noqa: N807
        return await _step_async(self, base, self)

    return __anext__


def _iter(base: Callable[..., Any], kind: type) -> Callable[..., Any] | None:
    """An `__iter__` that passes by `__next__` is led through it; one that returns the stream itself is left alone."""
    if hasattr(kind, "__next__"):
        return _iter_by_next if inspect.isgeneratorfunction(base) else None

    def __iter__(self: Any) -> Iterator[Any]:  # noqa: N807
        return _drive_stream(self, iter(base(self)))

    return __iter__


def _aiter(base: Callable[..., Any], kind: type) -> Callable[..., Any] | None:
    """The twin of `_iter`."""
    if hasattr(kind, "__anext__"):
        return _aiter_by_anext if inspect.isasyncgenfunction(base) else None

    def __aiter__(self: Any) -> AsyncIterator[Any]:  # noqa: N807
        return _drive_stream_async(self, base(self))

    return __aiter__


def _iter_by_next(self: Any) -> Iterator[Any]:
    while True:
        try:
            item = self.__next__()
        except StopIteration:
            return
        yield item


async def _aiter_by_anext(self: Any) -> AsyncIterator[Any]:
    while True:
        try:
            item = await self.__anext__()
        except StopAsyncIteration:
            return
        yield item


def _drive_stream(stream: Any, items: Iterator[Any]) -> Iterator[Any]:
    """The items of a stream that is iterable but no iterator."""
    try:
        while True:
            try:
                item = _step(stream, next, items)
            except StopIteration:
                return
            yield item
    except GeneratorExit:
        watch = _of(stream)
        token = None
        try:
            if isinstance(items, GeneratorType):
                token = watch.begin()
                items.close()
        finally:
            end(token)
            watch.leave(stream)
        raise


async def _drive_stream_async(stream: Any, items: Any) -> AsyncGenerator[Any]:
    """The twin of `_drive_stream`."""
    try:
        while True:
            try:
                item = await _step_async(stream, _anext_of, items)
            except StopAsyncIteration:
                return
            yield item
    except GeneratorExit:
        watch = _of(stream)
        token = None
        try:
            if isinstance(items, AsyncGeneratorType):
                token = watch.begin()
                await items.aclose()
        finally:
            end(token)
            watch.leave(stream)
        raise


def _anext_of(items: Any) -> Awaitable[Any]:
    return unseen(items.__anext__) if isinstance(items, AsyncGeneratorType) else anext(items)


def _await(base: Callable[..., Any], _kind: type) -> Callable[..., Any]:
    from quotalimit._delivery import deliver  # which delivers streams, too

    def __await__(self: Any) -> Generator[Any, Any, Any]:  # noqa: N807
        watch = _of(self)
        token = None
        try:
            token = watch.begin()
            result = yield from base(self)
        except BaseException as error:
            watch.fail(self, error)
            yield from watch.flush_async().__await__()
            raise
        finally:
            end(token)
        for call in watch.calls:
            if not call.finished:
                result = deliver(call, result)
        yield from watch.flush_async().__await__()
        return result

    return __await__


def _leave(base: Callable[..., Any], _kind: type) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(base):

        async def leave_async(self: Any, *args: Any, **kwargs: Any) -> Any:
            watch = _of(self)
            token = None
            try:
                token = watch.begin()
                return await base(self, *args, **kwargs)
            finally:
                end(token)
                watch.exit(self)
                await watch.flush_async()

        return leave_async

    def leave(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = _of(self)
        token = None
        try:
            token = watch.begin()
            return base(self, *args, **kwargs)
        finally:
            end(token)
            watch.exit(self)
            watch.flush()

    return leave


def _enter(base: Callable[..., Any], _kind: type) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(base):

        async def enter_async(self: Any) -> Any:
            watch = _of(self)
            watch.begun = True
            token = None
            try:
                token = watch.begin()
                entered = await base(self)
            except BaseException as error:
                watch.fail(self, error)
                await watch.flush_async()
                raise
            finally:
                end(token)
            return self if entered is self else watch.hand_on(entered)

        return enter_async

    def enter(self: Any) -> Any:
        watch = _of(self)
        watch.begun = True
        token = None
        try:
            token = watch.begin()
            entered = base(self)
        except BaseException as error:
            watch.fail(self, error)
            watch.flush()
            raise
        finally:
            end(token)
        return self if entered is self else watch.hand_on(entered)

    return enter


_HOOKS: Final[dict[str, Callable[[Callable[..., Any], type], Callable[..., Any] | None]]] = {
    "__next__": _next,
    "__anext__": _anext,
    "__iter__": _iter,
    "__aiter__": _aiter,
    "__await__": _await,
    "__enter__": _enter,
    "__aenter__": _enter,
    "__exit__": _leave,
    "__aexit__": _leave,
    "close": _leave,
    "aclose": _leave,
}
