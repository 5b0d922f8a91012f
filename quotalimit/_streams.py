"""Streams of SDKs: the object that a function returns, itself, watched to its end.

An SDK's stream is more than an iterator: it has `with`, `.response`, `.text_stream`, `.get_final_message()`. So it is
not wrapped. Its class is swapped for a subclass made for it, whose `__next__`, `close` and the like also tell the call:
whatever the SDK or its user does with the stream goes through them, and it stays what it was.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from enum import Enum, auto
from functools import lru_cache, partial
from types import AsyncGeneratorType, GeneratorType
from typing import Any, Final
from weakref import WeakKeyDictionary, finalize, ref

from quotalimit._bodies import drive_body, has_body
from quotalimit._calls import Call
from quotalimit._generators import later, run, run_async
from quotalimit.providers import is_plainly_read

_WATCH: Final = "_quotalimit_watch"
_PLAIN: Final = (str, bytes, dict, list, tuple, set, int, float, type(None), io.IOBase)
_VALUES: Final = frozenset((str, bytes, list, tuple, set, int, float, bool, type(None)))
_MORE_THAN_AWAITABLE: Final = ("__aenter__", "__aiter__")
_STREAM_FIELDS: Final = ("stream", "completion", "responseStream", "body")


class Delivery(Enum):
    """How a result of some type is delivered."""

    AS_IT_IS = auto()
    DICT = auto()
    GENERATOR = auto()
    ASYNC_GENERATOR = auto()
    FUTURE = auto()
    AWAITABLE = auto()
    BODY = auto()
    STREAM = auto()


@lru_cache(maxsize=1_024)
def _delivery(kind: type, seen: type) -> Delivery:
    """How results are delivered of a type, and of what it lets be seen, as a proxy does: each is looked at once."""
    if kind in _VALUES:
        return Delivery.AS_IT_IS
    if kind is dict:
        return Delivery.DICT
    if issubclass(seen, GeneratorType):
        return Delivery.GENERATOR
    if issubclass(seen, AsyncGeneratorType):
        return Delivery.ASYNC_GENERATOR
    if hasattr(kind, "add_done_callback"):
        return Delivery.FUTURE
    if issubclass(seen, Awaitable) and not any(hasattr(kind, name) for name in _MORE_THAN_AWAITABLE):
        return Delivery.AWAITABLE
    if has_body(kind):
        return Delivery.BODY
    return Delivery.STREAM if _is_stream(kind, seen) else Delivery.AS_IT_IS


@lru_cache(maxsize=1_024)
def _never_streams(kind: type) -> bool:
    """Whether all objects of a type are delivered as they are, for none of them can look like something else."""
    has_other_looks = any("__class__" in vars(base) for base in kind.__mro__[:-1]) or not is_plainly_read(kind)
    return not has_other_looks and _delivery(kind, kind) is Delivery.AS_IT_IS


def _seen(result: object) -> type:
    """The class that an object says it is of: a proxy's is that of what it stands for, if it can be had."""
    try:
        seen = result.__class__
    except Exception:  # of a lazy proxy, out of its context
        return type(result)
    return seen if isinstance(seen, type) else type(result)


def deliver(call: Call, result: Any) -> Any:
    """What the caller gets of a call's result: the result itself, settled, or a stream of it that will be."""
    kind: Any = type(result)
    if _never_streams(kind):
        call.finish(result)
        return result
    delivery = _delivery(kind, _seen(result))
    if delivery is Delivery.AS_IT_IS:
        call.finish(result)
    elif delivery is Delivery.DICT:
        _deliver_dict(call, result)
    elif delivery is Delivery.GENERATOR:
        return run(call, result)
    elif delivery is Delivery.ASYNC_GENERATOR:
        return run_async(call, result)
    elif delivery is Delivery.FUTURE:
        _deliver_future(call, result)
    elif delivery is Delivery.AWAITABLE:
        return later(call, result, deliver)
    elif delivery is Delivery.BODY and drive_body(call, result):
        return result
    elif not (_is_stream(kind, _seen(result)) and watch(call, result)):
        if hasattr(type(result), "__next__"):  # map, filter and their like, whose class cannot be swapped
            return run(call, _each(result))
        call.finish(result)
    return result


def _deliver_dict(call: Call, result: dict[str, Any]) -> None:
    """Settle a response off the wire, or watch the stream inside one of Bedrock's."""
    for name in _STREAM_FIELDS:
        stream = result.get(name)
        if stream is not None and _streams(stream) and watch(call, stream):
            return
    call.finish(result)


def _deliver_future(call: Call, future: Any) -> None:
    future.add_done_callback(partial(_done, call))
    try:
        finalize(future, call.cut).atexit = False
    except TypeError:  # it knows no weak references
        pass


def _each(items: Any) -> Generator[Any]:
    yield from items


def _done(call: Call, future: Any) -> None:
    """Settle the call of a task or a future, which runs on though nobody awaits it."""
    try:
        result = future.result()
    except BaseException as error:
        call.fail(error)
    else:
        if not (_streams(result) and watch(call, result)):  # it cannot be replaced: others hold the future
            call.finish(result)


def watch(call: Call, stream: Any) -> bool:
    """Watch a stream, or what yields one when it is entered, for a call. False if its class does not let us."""
    fields = getattr(stream, "__dict__", None)
    if not isinstance(fields, dict):
        return False
    known = fields.get(_WATCH)
    if known is not None and known.owns(stream):  # by a nested call, which settles first
        known.calls = [*(other for other in known.calls if not other.finished), call]
        return True
    try:
        object.__setattr__(stream, "__class__", _watched(type(stream)))
    except Exception:  # a foreign class may refuse in its own way
        return False
    fields[_WATCH] = Watch(call, stream)
    return True


class Watch:
    """Tells the calls that return a stream, the innermost first, what happens to it."""

    __slots__ = ("_owner", "begun", "calls", "handed_on")

    def __init__(self, call: Call, stream: object) -> None:
        self.calls = [call]
        self.handed_on = False
        """Whether what this yielded when it was entered is watched too, and may outlive it."""
        self.begun = _iterates(type(stream))
        """Whether the request has been made: what yields a stream when it is entered makes it then."""
        self._owner = id(stream)

    def owns(self, stream: object) -> bool:
        """Whether this is the stream itself, and not a copy that the SDK made of it."""
        return id(stream) == self._owner

    def leave(self) -> None:
        """The stream was left: closed, exited or dropped."""
        for call in self.calls:
            if self.begun:
                call.cut()
            else:
                call.release()

    def see(self, item: object) -> None:
        for call in self.calls:
            call.see(item)

    def finish(self) -> None:
        for call in self.calls:
            call.finish()

    def fail(self, error: BaseException) -> None:
        for call in self.calls:
            call.fail(error)

    def flush(self) -> None:
        for call in self.calls:
            call.flush()

    async def flush_async(self) -> None:
        for call in self.calls:
            await call.flush_async()


def _streams(result: Any) -> bool:
    """Whether an object is a stream of an SDK."""
    kind: Any = type(result)
    return _delivery(kind, _seen(result)) is Delivery.STREAM


def _is_stream(kind: type, seen: type) -> bool:
    if issubclass(seen, _PLAIN) or any(base.__module__ == "unittest.mock" for base in kind.__mro__):
        return False
    if hasattr(kind, "__next__") or hasattr(kind, "__anext__"):
        return True
    return "Stream" in kind.__name__ and (_iterates(kind) or hasattr(kind, "__enter__") or hasattr(kind, "__aenter__"))


def _iterates(kind: type) -> bool:
    return hasattr(kind, "__iter__") or hasattr(kind, "__aiter__")


def _watched(kind: type) -> type:
    """The subclass of a stream's class that is watched."""
    if kind.__dict__.get("__del__") is _delete:  # a copy of a watched stream
        return kind
    reference = _classes.get(kind)
    known = None if reference is None else reference()
    if known is None:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": (), "__del__": _delete}
        hooks = {name: hook(getattr(kind, name), kind) for name, hook in _HOOKS.items() if hasattr(kind, name)}
        known = type(kind.__name__, (kind,), names | {n: h for n, h in hooks.items() if h is not None})
        _classes[kind] = ref(known)
    return known


_classes: Final[WeakKeyDictionary[type, ref[type]]] = WeakKeyDictionary()


def _of(stream: object) -> Watch:
    watch: Watch = getattr(stream, _WATCH)
    return watch


def _delete(self: Any) -> None:
    watch = self.__dict__.get(_WATCH)
    try:
        if watch is not None and watch.owns(self) and not watch.handed_on:
            watch.leave()
    finally:
        finalizers = (kind.__dict__.get("__del__") for kind in type(self).__mro__)
        base = next((each for each in finalizers if each not in (None, _delete)), None)
        if base is not None:
            base(self)


def _next(base: Callable[..., Any], _kind: type) -> Callable[..., Any]:
    def __next__(self: Any) -> Any:  # noqa: N807
        call = _of(self)
        try:
            item = base(self)
        except StopIteration:
            call.finish()
            call.flush()
            raise
        except BaseException as error:
            call.fail(error)
            call.flush()
            raise
        call.see(item)
        return item

    return __next__


def _anext(base: Callable[..., Any], _kind: type) -> Callable[..., Any]:
    async def __anext__(self: Any) -> Any:  # noqa: N807
        call = _of(self)
        try:
            item = await base(self)
        except StopAsyncIteration:
            call.finish()
            await call.flush_async()
            raise
        except BaseException as error:
            call.fail(error)
            await call.flush_async()
            raise
        call.see(item)
        return item

    return __anext__


def _iter(base: Callable[..., Any], kind: type) -> Callable[..., Any] | None:
    """An `__iter__` that passes by `__next__` is led through it; one that returns the stream itself is left alone."""
    if hasattr(kind, "__next__"):
        return _iter_by_next if inspect.isgeneratorfunction(base) else None

    def __iter__(self: Any) -> Iterator[Any]:  # noqa: N807
        return drive_stream(_of(self), base(self))

    return __iter__


def _aiter(base: Callable[..., Any], kind: type) -> Callable[..., Any] | None:
    return _aiter_by_anext if hasattr(kind, "__anext__") and inspect.isasyncgenfunction(base) else None


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


def drive_stream(call: Watch, items: Iterator[Any]) -> Iterator[Any]:
    """The items of a stream that is iterable but no iterator."""
    try:
        for item in items:
            call.see(item)
            yield item
    except GeneratorExit:
        call.leave()
        raise
    except BaseException as error:
        call.fail(error)
        call.flush()
        raise
    call.finish()
    call.flush()


def _leave(base: Callable[..., Any], _kind: type) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(base):

        async def leave_async(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return await base(self, *args, **kwargs)
            finally:
                _of(self).leave()
                await _of(self).flush_async()

        return leave_async

    def leave(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return base(self, *args, **kwargs)
        finally:
            _of(self).leave()
            _of(self).flush()

    return leave


def _enter(base: Callable[..., Any], _kind: type) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(base):

        async def enter_async(self: Any) -> Any:
            return _entered(self, await _tried(self, base))

        return enter_async

    def enter(self: Any) -> Any:
        call = _of(self)
        call.begun = True
        try:
            stream = base(self)
        except BaseException as error:
            call.fail(error)
            call.flush()
            raise
        return _entered(self, stream)

    return enter


async def _tried(manager: Any, base: Callable[..., Any]) -> Any:
    _of(manager).begun = True
    try:
        return await base(manager)
    except BaseException as error:
        _of(manager).fail(error)
        await _of(manager).flush_async()
        raise


def _entered(manager: Any, stream: Any) -> Any:
    if stream is not manager:
        watched = [watch(call, stream) for call in _of(manager).calls]  # every call, also after one that cannot
        _of(manager).handed_on = all(watched)
    return stream


_HOOKS: Final[dict[str, Callable[[Callable[..., Any], type], Callable[..., Any] | None]]] = {
    "__next__": _next,
    "__anext__": _anext,
    "__iter__": _iter,
    "__aiter__": _aiter,
    "__enter__": _enter,
    "__aenter__": _enter,
    "__exit__": _leave,
    "__aexit__": _leave,
    "close": _leave,
    "aclose": _leave,
}
