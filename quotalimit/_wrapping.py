"""The shapes that a call can have, and the only import of wrapt.

A wrapper is a wrapt proxy, so that it looks like its function to everything that looks. Its class is made for it,
with a `__call__` that closes over function and guard: that is several times faster than attributes of a proxy.
"""

# wrapt keeps on the proxy itself only what is named _self_*.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any, Final

import wrapt

from quotalimit._arguments import compile_call
from quotalimit._calls import InterruptedCall
from quotalimit._generators import drive, drive_async, first, first_async
from quotalimit._guard import Guard
from quotalimit._layers import Layer
from quotalimit._streams import deliver
from quotalimit._trial import guard_of
from quotalimit.events import listeners
from quotalimit.recording import begin, end

Caller = Callable[..., Any]


class Guarded(wrapt.CallableObjectProxy):  # type: ignore[type-arg]
    """A function with a guard around it."""

    def __init__(self, function: Callable[..., Any], guard: Guard) -> None:
        super().__init__(function)
        self._self_guard = guard

    def __reduce__(self) -> str:
        name = getattr(self, "__qualname__", None)
        if not isinstance(name, str):
            from pickle import PicklingError

            raise PicklingError(
                f"a decorated {type(self.__wrapped__).__name__} has no name to be found by: decorate a function"
            )
        return name

    def __reduce_ex__(self, _protocol: object) -> str:
        return self.__reduce__()

    def __copy__(self) -> Guarded:
        return self

    def __deepcopy__(self, _memo: object) -> Guarded:
        return self


class GuardedDescriptor(Guarded):
    """A guarded function that becomes a method where it stands in a class."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        function = self.__wrapped__
        bound = function.__get__(instance, owner)
        subject = getattr(bound, "__self__", instance)
        if subject is None or bound is function or isinstance(function, staticmethod):
            return self
        return BoundGuarded(self, subject, bound)


def _get_method(self: Guarded, instance: Any, _owner: type | None = None) -> Any:
    """The `__get__` of a guarded plain function."""
    return self if instance is None else MethodType(self, instance)


class BoundGuarded(wrapt.ObjectProxy):  # type: ignore[type-arg]
    """A guarded descriptor that is no plain function, bound by itself to an instance or a class."""

    def __init__(self, guarded: Guarded, instance: Any, bound: Callable[..., Any]) -> None:
        super().__init__(bound)
        self._self_guarded = guarded
        self._self_instance = instance

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        guard, instance = self._self_guarded._self_guard, self._self_instance
        call = _caller(lambda _instance, *args, **kwargs: self.__wrapped__(*args, **kwargs), guard, self.__wrapped__)
        return call(instance, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._self_instance, self.__name__)

    def __reduce_ex__(self, _protocol: object) -> tuple[Any, ...]:
        return self.__reduce__()


def wrap(function: Any, make_layer: Callable[[Callable[..., Any], Sequence[Layer]], Layer]) -> Any:
    """Put a layer around a function, or around the layers that it has already: these become one guard."""
    if issubclass(type(function), (classmethod, staticmethod)):
        return type(function)(wrap(function.__func__, make_layer))
    inner: tuple[Layer, ...] = ()
    if isinstance(function, Guarded):
        inner = function._self_guard.layers
        function = function.__wrapped__
    guard = guard_of(function, (make_layer(function, inner), *inner))

    if hasattr(type(function), "__get__"):

        class GuardedFunction(GuardedDescriptor):
            __call__ = staticmethod(_common_caller(function, guard) or _caller(function, guard, function))
            if type(function) is FunctionType:
                __get__ = _get_method  # type: ignore[assignment]

        return GuardedFunction(function, guard)

    class GuardedCall(wrapt.CallableObjectProxy):  # type: ignore[type-arg]
        """The `__call__` of a callable object, which looks as it did."""

        __call__ = staticmethod(_caller(function, guard, function))

    class GuardedObject(Guarded):
        __call__ = GuardedCall(function.__call__)

    return GuardedObject(function, guard)


def guards_of(function: Any) -> list[Guard]:
    """The guards around a function, the outermost first, also through other decorators."""
    found: list[Guard] = []
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        if isinstance(function, Guarded):
            found.append(function._self_guard)
        elif isinstance(function, BoundGuarded):
            found.append(function._self_guarded._self_guard)
        if isinstance(function, (MethodType, classmethod, staticmethod)):
            function = function.__func__
        elif isinstance(function, functools.partial) and not isinstance(function, Guarded):
            function = function.func
        else:
            function = getattr(function, "__wrapped__", None)
    return found


def _caller(function: Callable[..., Any], guard: Guard, kind: Callable[..., Any]) -> Caller:
    """The `__call__` of a wrapper, by the kind of function that `kind` is."""
    if _is_kind(kind, inspect.isasyncgenfunction):
        return _async_generator_caller(function, guard)
    if _is_kind(kind, inspect.iscoroutinefunction):
        return _coroutine_caller(function, guard)
    if _is_kind(kind, inspect.isgeneratorfunction):
        return _generator_caller(function, guard)
    return _function_caller(function, guard)


_COMMON_CALL: Final = """\
{async}def {{title}}({{parameters}}):
    {{_}}key = {{answer}}
    {{_}}verdict = False if {{_}}listeners else {{_}}limiter.gate({{_}}key)
    if {{_}}verdict is not True:
        if {{_}}verdict is not False:
            raise {{_}}exceeded({{_}}verdict, {{_}}key)
        {await}{{_}}admit({{_}}key)
    return {await}{{_}}function({{arguments}})
"""
_PLAIN_CALL: Final = _COMMON_CALL.format_map({"async": "", "await": ""})
_ASYNC_CALL: Final = (
    _COMMON_CALL.format_map({"async": "async ", "await": "await "})
    + """
{_}run = {title}

def {title}({parameters}):  # a `__call__` that is async would look like that of a callable object
    return {_}run({arguments})
"""
)


def _common_caller(function: Callable[..., Any], guard: Guard) -> Caller | None:
    """What happens at a call of a plain function of which every call is common.

    It is the one fast path: written out with the function's own parameters, so that nothing is packed and unpacked,
    and leading through nothing but the gate of the limiter. What that does not decide goes the way of all others.
    """
    limiter = guard.common
    if limiter is None or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return None
    names = {"limiter": limiter, "exceeded": limiter.exceeded, "function": function, "listeners": listeners}
    if inspect.iscoroutinefunction(function):
        return compile_call(function, guard.questions, _ASYNC_CALL, names | {"admit": guard.admit_common_async})
    return compile_call(function, guard.questions, _PLAIN_CALL, names | {"admit": guard.admit_common})


def _is_kind(function: Any, test: Callable[[Any], bool]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return test(function) or (not inspect.isroutine(function) and test(type(function).__call__))


def _function_caller(function: Callable[..., Any], guard: Guard) -> Caller:
    def call(*args: Any, **kwargs: Any) -> Any:
        entered = guard.enter(args, kwargs)
        if entered is None:
            return function(*args, **kwargs)
        token = None
        try:
            token = begin(entered)
            result = deliver(entered, function(*args, **kwargs))
        except BaseException as error:
            entered.__class__ = InterruptedCall  # a second interrupt may come before this is settled
            entered.fail(error)
            entered.flush()
            raise
        finally:
            end(token)
        entered.flush()
        return result

    return call


def _coroutine_caller(function: Callable[..., Any], guard: Guard) -> Caller:
    async def run(*args: Any, **kwargs: Any) -> Any:
        entered = await guard.enter_async(args, kwargs)
        if entered is None:
            return await function(*args, **kwargs)
        token = None
        try:
            token = begin(entered)
            result = deliver(entered, await function(*args, **kwargs))
        except BaseException as error:
            entered.__class__ = InterruptedCall  # a second interrupt may come before this is settled
            entered.fail(error)
            await entered.flush_async()
            raise
        finally:
            end(token)
        await entered.flush_async()
        return result

    return lambda *args, **kwargs: run(*args, **kwargs)  # an async `__call__` would look like a callable object's


def _generator_caller(function: Callable[..., Any], guard: Guard) -> Caller:
    def call(*args: Any, **kwargs: Any) -> Any:
        stream = function(*args, **kwargs)
        entered = guard.enter(args, kwargs)
        if entered is None:
            return stream
        try:
            return first(drive(entered, stream))
        except BaseException:  # an interrupt
            entered.release()
            raise

    return call


def _async_generator_caller(function: Callable[..., Any], guard: Guard) -> Caller:
    def call(*args: Any, **kwargs: Any) -> Any:
        stream = function(*args, **kwargs)
        entered, enter_later = guard.enter_now_or_later(args, kwargs)
        if enter_later is not None:
            return drive_async(enter_later, None, stream)
        if entered is None:
            return stream
        try:
            return first_async(drive_async(None, entered, stream))
        except BaseException:  # an interrupt
            entered.release()
            raise

    return call
