"""The shapes that a call can have, and the only import of wrapt.

A wrapper is a wrapt proxy, so that it looks like its function to everything that looks. Its class is made for it,
with a `__call__` that closes over function and guard: that is several times faster than attributes of a proxy.
"""

# wrapt keeps on the proxy itself only what is named _self_*.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from types import FunctionType, MethodType
from typing import Any, Final

import wrapt

from quotalimit._arguments import compile_call
from quotalimit._calls import InterruptedCall
from quotalimit._delivery import deliver
from quotalimit._generators import run, run_async
from quotalimit._guard import Guard
from quotalimit._layers import Layer
from quotalimit._trial import guard_of
from quotalimit.events import listeners
from quotalimit.limiters import Limiter
from quotalimit.recording import begin, end

Caller = Callable[..., Any]


class Guarded(wrapt.CallableObjectProxy):  # type: ignore[type-arg]
    """A function with a guard around it."""

    def __init__(self, function: Callable[..., Any], guard: Guard) -> None:
        super().__init__(function)
        self._self_guard = guard
        self._self_bound_callers: dict[tuple[bool, ...], Caller] = {}

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

    def _self_caller_of(self, bound: Callable[..., Any]) -> Caller:
        """What calls this function once it is bound: only then its kind is known, and it may be another each time."""
        kind = tuple(_is_kind(bound, test) for test in _KINDS)
        caller = self._self_bound_callers.get(kind)
        if caller is None:
            caller = self._self_bound_callers[kind] = _caller(self.__wrapped__, self._self_guard, bound, bound=True)
        return caller

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

    def __init__(self, guarded: GuardedDescriptor, instance: Any, bound: Callable[..., Any]) -> None:
        super().__init__(bound)
        self._self_guarded = guarded
        self._self_instance = instance

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        call = self._self_guarded._self_caller_of(self.__wrapped__)
        return call(self.__wrapped__, self._self_instance, *args, **kwargs)

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
    guard = guard_of((make_layer(function, inner), *inner))

    if hasattr(type(function), "__get__"):

        class GuardedFunction(GuardedDescriptor):
            __call__ = staticmethod(_caller(function, guard, function))
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


_GATED_CALL: Final = """\
{async}def {{title}}({{parameters}}):
    {{_}}key = {{answer}}
    {{_}}verdict = False if {{_}}listeners else {{_}}limiter.gate({{_}}key)
    if {{_}}verdict is not True:
        if {{_}}verdict is not False:
            raise {{_}}exceeded({{_}}verdict, {{_}}key)
        {await}{{_}}admit({{_}}key)
    return {await}{{_}}function({{arguments}})
"""
"""A call of one limit with nothing to settle. It leads through the gate of the limiter alone; what that does not
decide goes the way of all others."""

_CALL: Final = """\
{async}def {{title}}({{parameters}}):
    {{_}}answers = ({{answers}})
    {{_}}values = ({{values}})
    {{_}}call = {{_}}admit_at_once({{_}}answers, {{_}}values)
    if {{_}}call is None:
        {{_}}call = {await}{{_}}enter({{_}}answers, {{_}}values)
        if {{_}}call is None:
            return {await}{{_}}function({{arguments}})
    {{_}}token = None
    try:
        {{_}}token = {{_}}begin({{_}}call)
        {{_}}result = {{_}}deliver({{_}}call, {await}{{_}}function({{arguments}}))
    except {{_}}BaseException as {{_}}error:
        {{_}}call.__class__ = {{_}}InterruptedCall  # a second interrupt may come before this is settled
        {{_}}call.fail({{_}}error)
        {await}{{_}}call.{flush}()
        raise
    finally:
        {{_}}end({{_}}token)
    if {{_}}call.unflushed:
        {await}{{_}}call.{flush}()
    return {{_}}result
"""
_SYNC: Final = {"async": "", "await": "", "flush": "flush"}
_ASYNC: Final = {"async": "async ", "await": "await ", "flush": "flush_async"}
_CALL_ASYNC: Final = """
{_}run = {title}

def {title}({parameters}):  # a `__call__` that is async would look like that of a callable object
    return {_}run({arguments})
"""

_ITERATE: Final = """\
def {title}({parameters}):
    return {_}run({_}guard, {_}function({arguments}), ({answers}), ({values}))
"""
"""A call that makes a generator: first of all, so that Python refuses a wrong call before anything is asked."""


def _caller(function: Callable[..., Any], guard: Guard, kind: Callable[..., Any], *, bound: bool = False) -> Caller:
    """The `__call__` of a wrapper, by the kind of function that `kind` is.

    It is written out with the function's own parameters where that can be, so that nothing is packed and unpacked.
    If `bound`, the function is known by its arguments alone, and the one to call is given before them.
    """
    names: dict[str, Any] = {"guard": guard} if bound else {"guard": guard, "function": function}
    is_async = _is_kind(kind, inspect.iscoroutinefunction)
    if _is_kind(kind, inspect.isasyncgenfunction):
        template, names["run"] = _ITERATE, _run_async_generator
    elif _is_kind(kind, inspect.isgeneratorfunction):
        template, names["run"] = _ITERATE, _run_generator
    else:
        if guard.gated is None:
            template, more = _CALL, _names_of_call(guard, is_async)
        else:
            template, more = _GATED_CALL, _names_of_gated_call(guard, guard.gated, is_async)
        template, names = template.format_map(_ASYNC if is_async else _SYNC), names | more
    if is_async and not bound:  # what is given the function to call is nobody's `__call__`
        template += _CALL_ASYNC
    return compile_call(function, guard.questions, template, names, bound=bound)


def _names_of_gated_call(guard: Guard, limiter: Limiter, is_async: bool) -> dict[str, Any]:
    admit = guard.admit_ungated_async if is_async else guard.admit_ungated
    return {"listeners": listeners, "limiter": limiter, "exceeded": limiter.exceeded, "admit": admit}


def _names_of_call(guard: Guard, is_async: bool) -> dict[str, Any]:
    return {
        "admit_at_once": guard.admit_at_once,
        "enter": guard.enter_async if is_async else guard.enter,
        "BaseException": BaseException,
        "begin": begin,
        "deliver": deliver,
        "InterruptedCall": InterruptedCall,
        "end": end,
    }


_KINDS: Final = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def _is_kind(function: Any, test: Callable[[Any], bool]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return test(function) or (not inspect.isroutine(function) and test(type(function).__call__))


def _run_generator(
    guard: Guard, stream: Generator[Any, Any, Any], answers: Sequence[Any], arguments: Sequence[object]
) -> Generator[Any, Any, Any]:
    """Admit the call of a generator function, which has made its generator, and run it."""
    call = guard.admit_at_once(answers, arguments) or guard.enter(answers, arguments)
    if call is None:
        return stream
    try:
        return run(call, stream)
    except BaseException:  # an interrupt
        call.release()
        raise


def _run_async_generator(
    guard: Guard, stream: AsyncGenerator[Any, Any], answers: Sequence[Any], arguments: Sequence[object]
) -> AsyncGenerator[Any, Any]:
    """The same for an async generator function. If the call must wait, it is admitted at the first item."""
    call, enter_later = guard.admit_at_once(answers, arguments), None
    if call is None:
        call, enter_later = guard.enter_now_or_later(answers, arguments)
    if enter_later is not None:
        return run_async(None, stream, enter_later)
    if call is None:
        return stream
    try:
        return run_async(call, stream)
    except BaseException:  # an interrupt
        call.release()
        raise
