"""The two decorators: `@rate_limited` and `@token_budget`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

from quotalimit import _wrapping
from quotalimit._layers import Layer, RateLayer, TokenLayer
from quotalimit.algorithms import Algorithm
from quotalimit.errors import InvalidKey, InvalidLimit
from quotalimit.failures import Failure, read_error
from quotalimit.keys import Key
from quotalimit.limiters import Limit, Limiter, RateLimiter, TokenBudget, Unlimited, patience_of
from quotalimit.providers import read_usage
from quotalimit.stores.base import Store
from quotalimit.usage import Usage

F = TypeVar("F")

KeyFunction: TypeAlias = str | Callable[..., Key]
"""The name of a parameter, or a function of some of the call's arguments that says whose call it is."""

Tiers: TypeAlias = Callable[..., Limit | Sequence[Limit] | Unlimited]
"""A function of some of the call's arguments that says which limits hold for it."""


def rate_limited(
    *limits: Limit | RateLimiter | Tiers,
    key: KeyFunction,
    cost: float | Callable[..., float] = 1,
    wait: float = 0.0,
    refund_on: type[BaseException] | tuple[type[BaseException], ...] = (),
    name: str | None = None,
    store: Store | None = None,
    enforce: bool = True,
) -> Callable[[F], F]:
    """Limit how often each identity may call a function: `@rate_limited("20/minute", key="user")`.

    `limits` are one or more strings, rates or algorithms (a bare string is an exact `SlidingWindow`); or one
    `RateLimiter`, whose counts are then shared; or one function of the call's arguments that returns limits or
    `UNLIMITED`. `key` names a parameter, or is a function that gets, by name, the parameters it declares. `cost` is
    the units that a call takes, or a function like `key`; `wait` the most seconds that a call may be delayed instead
    of refused, `math.inf` for ever; `refund_on` the exceptions of the function that give the units back; `name` what
    exceptions and a shared store call this limit. With `enforce=False` nobody is refused or delayed by it, and
    listeners are told who would have been: see `on_event`.

    A call past a limit raises `RateLimitExceeded`, charges nothing and does not reach the function. Raises
    `InvalidLimit`, `InvalidKey`, `TypeError` and `ValueError` at decoration for what can be known to be wrong.
    """
    refunds = refund_on if isinstance(refund_on, tuple) else (refund_on,)
    if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in refunds):
        raise TypeError(f"refund_on must be exception types, not {refund_on!r}")
    patience = patience_of(wait)
    _check_asked("cost", cost)

    def make_layer(limiter: Limiter) -> Layer:
        return RateLayer(limiter, key, patience, cost, refunds)

    return _decorator(RateLimiter, limits, key, name, store, enforce, make_layer)


def token_budget(
    *limits: Limit | TokenBudget | Tiers,
    key: KeyFunction,
    reserve: float | Callable[..., float] | None = None,
    usage: Callable[[Any], Usage | float | None] = read_usage,
    weigh: Callable[[Usage], float] | None = None,
    on_error: Callable[[BaseException], Failure] = read_error,
    wait: float = 0.0,
    name: str | None = None,
    store: Store | None = None,
    enforce: bool = True,
) -> Callable[[F], F]:
    """Limit the tokens that each identity may use: `@token_budget("10_000/day", key="user")`.

    `limits`, `key`, `wait`, `name` and `enforce` are as in `rate_limited`; a bare string is a `CalendarWindow` in UTC.
    `reserve` is the units held while a call runs, or a function like `key`; without it a call is admitted while
    anything is left, so that the calls in flight may pass the limit together. `usage` reads a result, or each item of a
    stream, into a `Usage`, a number or None; `weigh` turns a `Usage` into what is charged, by default its
    `total_tokens`; `on_error` reads an exception of the function into a `Usage`, a number, `RELEASE` or `KEEP`.

    A call past a limit raises `TokenBudgetExceeded`, charges nothing and does not reach the function. Raises
    `InvalidLimit`, `InvalidKey`, `TypeError` and `ValueError` at decoration for what can be known to be wrong.
    """
    patience = patience_of(wait)
    _check_asked("reserve", reserve)
    for what, reader in (("usage", usage), ("weigh", weigh), ("on_error", on_error)):
        if not callable(reader) and not (what == "weigh" and reader is None):
            raise TypeError(f"{what} must be a function, not {reader!r}")
        _check_asked(what, reader)

    def make_layer(limiter: Limiter) -> Layer:
        return TokenLayer(limiter, key, patience, reserve, usage, weigh, on_error)

    return _decorator(TokenBudget, limits, key, name, store, enforce, make_layer)


def limiters_of(function: Callable[..., Any]) -> tuple[Limiter, ...]:
    """The limiters of a decorated function, the outermost first, also through other decorators."""
    return tuple(layer.limiter for guard in _wrapping.guards_of(function) for layer in guard.layers)


def _decorator(
    kind: type[RateLimiter] | type[TokenBudget],
    limits: Sequence[object],
    key: KeyFunction,
    name: str | None,
    store: Store | None,
    enforce: bool,
    make_layer: Callable[[Limiter], Layer],
) -> Callable[[F], F]:
    if not isinstance(key, str) and not callable(key):
        raise InvalidKey(
            f"key must be the name of a parameter or a function, not {key!r}: use key=everyone for one count"
        )
    if not isinstance(enforce, bool):
        raise TypeError(f"enforce must be True or False, not {enforce!r}")
    _check_asked("key", key, InvalidKey)
    make_limiter = _limiter_maker(kind, limits, name, store)

    def decorate(function: F) -> F:
        if isinstance(function, type) or not (callable(function) or isinstance(function, (classmethod, staticmethod))):
            raise TypeError(f"decorate a function or a method, not {function!r}")

        def layer_of(target: Callable[..., Any], inner: Sequence[Layer]) -> Layer:
            limiter = make_limiter()
            others = [layer.limiter for layer in inner] + list(limiters_of(target))
            if limiter not in limits:
                origin = _origin(target)
                limiter.adopt(_default_name(origin, key, others), origin if hasattr(target, "__qualname__") else None)
            if any(limiter.contradicts(other) for other in others):
                raise InvalidLimit(
                    f"two layers of one function are called {limiter.name!r}: give one of them another name"
                )
            layer = make_layer(limiter)
            if not enforce:
                layer.stop_enforcing()
            return layer

        return cast(F, _wrapping.wrap(function, layer_of))

    return decorate


def _limiter_maker(
    kind: type[RateLimiter] | type[TokenBudget], limits: Sequence[object], name: str | None, store: Store | None
) -> Callable[[], Limiter]:
    """What makes, or is, the limiter of each function that a decorator is applied to."""
    if not limits:
        raise InvalidLimit('no limit given: write at least one, such as "20/minute"')
    only = limits[0]
    if isinstance(only, Limiter):
        if len(limits) > 1 or name is not None or store is not None:
            raise TypeError("a limiter brings its own limits, name and store: give nothing beside it but the key")
        if not isinstance(only, kind):
            raise TypeError(f"{only!r} is not a {kind.__name__}")
        return lambda: only
    for limit in limits:
        if isinstance(limit, type):
            example = f'{kind.default_algorithm.__name__}("20/minute")'
            raise InvalidLimit(f"{limit!r} is a class: give an algorithm with its rate, such as {example}")
    if callable(only) and len(limits) == 1:
        _check_asked("limit", only, InvalidLimit)
        return lambda: kind.for_function((), only, name, store)
    if any(callable(limit) or isinstance(limit, Limiter) for limit in limits):
        raise InvalidLimit(f"give one {kind.__name__}, one function, or limits, and do not mix them: {limits!r}")
    algorithms: tuple[Algorithm, ...] = tuple(map(kind.read_limit, limits))
    return lambda: kind.for_function(algorithms, None, name, store)


def _origin(target: Callable[..., Any]) -> str:
    while isinstance(target, functools.partial):
        target = target.func
    return f"{_text(target, '__module__')}:{_text(target, '__qualname__')}"


def _default_name(origin: str, key: KeyFunction, others: Sequence[Limiter]) -> str:
    """`module:qualname:key`, with `#n` from the innermost where that repeats."""
    title = key if isinstance(key, str) else getattr(key, "__name__", type(key).__name__)
    base = f"{origin}:{title}"
    taken = sum(other.name.partition("#")[0] == base for other in others)
    return f"{base}#{taken + 1}" if taken else base


def _check_asked(what: str, question: object, error: type[Exception] = TypeError) -> None:
    """Refuse async functions where an answer is needed at once."""
    function = question
    while isinstance(function, functools.partial):
        function = function.func
    calls = (function, getattr(type(function), "__call__", None))  # noqa: B004
    if any(inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call) for call in calls):
        raise error(f"{what} must be a plain function, not the async {question!r}: its answer is needed at once")


def _text(function: object, attribute: str) -> str:
    value = getattr(function, attribute, None)
    return value if isinstance(value, str) else str(getattr(type(function), attribute))
