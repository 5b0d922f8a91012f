"""What a decorated call costs, as a multiple of a bare `wrapt.decorator` no-op around the same function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import wrapt

from quotalimit import MemoryStore, RateLimitExceeded, rate_limited, token_budget
from tests.benchmarks.peers import LIMITS
from tests.benchmarks.report import Aim, Table, ns, times
from tests.benchmarks.states import Pace, half_full
from tests.benchmarks.timing import Case, Timings, compile_loop, finish, measure

N = 1_000
COLUMNS = ("", "a call", "× the no-op")
STATES = (
    "*full, sliding*: the window holds N calls, and each call is admitted as the oldest expires, by a clock that moves "
    "by one N-th of the period at each. *filling*: by the real clock, from half full to full."
)

Decorator: TypeAlias = Callable[[Any], Any]


@wrapt.decorator
def noop(wrapped: Callable[..., Any], _instance: Any, args: Any, kwargs: Any) -> Any:
    """The floor: a decorator that does nothing."""
    return wrapped(*args, **kwargs)


def limited(function: Any, amount: int = N, **options: Any) -> Any:
    """The decorator that is measured: one sliding window, its key a lambda.

    Each has a store of its own: where one has seen a later time, the others would look for states to re-date.
    """
    return rate_limited(f"{amount}/hour", key=lambda user: user, **{"store": MemoryStore(), **options})(function)


@dataclass(frozen=True)
class Kind:
    """A kind of function, and a statement that calls one. `make` returns what the statement names, `ask` among it."""

    name: str
    statement: str
    make: Callable[[Decorator], dict[str, Any]]

    def case(self, name: str, decorate: Decorator) -> Case:
        return Case(name, compile_loop(self.statement, self.make(decorate)))

    def sliding(self, decorate: Decorator, amount: int = N, name: str = "full, sliding") -> Case:
        """A case in which the window is full and slides."""
        names = self.make(decorate)
        loop = compile_loop(self.statement, names)
        pace = Pace(lambda: finish(loop(["alice"])), amount)
        return Case(
            name,
            loop,
            around=pace.running,
            after=lambda: pace.check_full(names["ask"], amount),
            added_ns=pace.saved_ns(),
        )

    def filling(self, decorate: Decorator, name: str = "filling") -> Case:
        """A case in which the windows of many keys fill, by the real clock."""
        loop = compile_loop(self.statement, self.make(decorate))
        return Case(name, loop, half_full(lambda key: finish(loop([key])), N))


def function(decorate: Decorator) -> dict[str, Any]:
    def ask(user: str, prompt: str) -> str:
        return prompt

    return {"ask": decorate(ask)}


def method(decorate: Decorator) -> dict[str, Any]:
    class Client:
        @decorate
        def ask(self, user: str, prompt: str) -> str:
            return prompt

    client = Client()
    return {"client": client, "ask": client.ask}


def coroutine_function(decorate: Decorator) -> dict[str, Any]:
    async def ask(user: str, prompt: str) -> str:
        return prompt

    return {"ask": decorate(ask)}


def model_call(decorate: Decorator) -> dict[str, Any]:
    """A function that returns a response which reports its usage."""
    usage = SimpleNamespace(prompt_tokens=10, completion_tokens=5, total_tokens=15)
    response = SimpleNamespace(usage=usage)

    def ask(user: str, prompt: str) -> Any:
        return response

    return {"ask": decorate(ask)}


FUNCTION = Kind("function", "ask(key, 'hello')", function)
METHOD = Kind("method", "client.ask(key, 'hello')", method)
COROUTINE = Kind("coroutine function, awaited", "await ask(key, 'hello')", coroutine_function)
LAYERED = Kind("layers", "ask(key, 'hello')", model_call)


def add_rows(table: Table, kind: Kind, timings: Timings, aim: Aim) -> None:
    """The rows of one kind of function: without decorator, with the no-op, with ours."""
    table.add(f"{kind.name}, undecorated", ns(timings.ns("undecorated")), times(timings.ratio("undecorated", "no-op")))
    table.add(f"{kind.name}, `wrapt.decorator` no-op", ns(timings.ns("no-op")), times(1))
    for state in ("full, sliding", "filling"):
        ratio = timings.ratio(state, "no-op")
        table.add(f"**quotalimit**: {kind.name}, {state}", ns(timings.ns(state)), times(ratio), figure=ratio, aim=aim)


def measured(kind: Kind, decorate: Decorator, rounds: int, *others: Case, calls: int = 1_000) -> Timings:
    undecorated, floor = kind.case("undecorated", lambda ask: ask), kind.case("no-op", noop)
    ours = kind.sliding(decorate), kind.filling(decorate)
    return measure([undecorated, floor, *ours, *others], rounds=rounds, calls=calls)


def functions(rounds: int) -> Table:
    table = Table(f"A decorated function, one sliding window, N = {N:,}, key a lambda, admitted", COLUMNS, [STATES])
    add_rows(table, FUNCTION, measured(FUNCTION, limited, rounds), Aim(1.5))
    return table


def kinds(rounds: int) -> Table:
    table = Table("The same as a method and as a coroutine function", COLUMNS, [STATES])
    for kind in (METHOD, COROUTINE):
        add_rows(table, kind, measured(kind, limited, rounds), Aim(1.8))
    return table


class Empty(Exception):
    """An exception with nothing in it."""


def refused(rounds: int) -> Table:
    def fail(user: str, prompt: str) -> str:
        raise Empty

    ask = function(limited)["ask"]
    for _ in range(N):
        ask("alice", "hello")
    catch = "try:\n    ask(key, 'hello')\n    admitted = False\nexcept Refusal:\n    pass"
    timings = measure(
        [
            Case("no-op", compile_loop(catch, {"ask": noop(fail), "Refusal": Empty})),
            Case("ours", compile_loop(catch, {"ask": ask, "Refusal": RateLimitExceeded})),
        ],
        rounds=rounds,
        calls=1_000,
    )
    table = Table(f"Refused, exception raised and caught, N = {N:,}", ("", "a call", "× the empty exception"))
    table.add("an empty exception through the no-op", ns(timings.ns("no-op")), times(1))
    ratio = timings.ratio("ours", "no-op")
    table.add("**quotalimit**, `RateLimitExceeded`", ns(timings.ns("ours")), times(ratio), figure=ratio, aim=Aim(2.5))
    return table


def layered(ask: Any, amount: int = N) -> Any:
    """Three layers, folded into one guard; both windows are full at the same pace."""
    store = MemoryStore()
    ask = token_budget("1_000_000_000/day", key="user", reserve=20, store=store)(ask)
    ask = rate_limited(f"{2 * amount}/2 hours", key="user", store=store)(ask)
    return rate_limited(f"{amount}/hour", key=lambda user: user, store=store)(ask)


def layers(rounds: int) -> Table:
    others = []
    if LIMITS.version:
        bare = LIMITS.make(N)
        hits = compile_loop("\n".join(f"admitted = hit(item, key, '{name}')" for name in "abc"), bare.names)
        others.append(Case("limits", hits, half_full(lambda key: hits([key]), N), after=bare.after))
    timings = measured(LAYERED, layered, rounds, *others, calls=200)
    table = Table("Three folded layers: two sliding windows and a token budget settled from usage", COLUMNS, [STATES])
    add_rows(table, LAYERED, timings, Aim(6))
    if others:
        table.add(
            "three bare `limits` moving-window hits", ns(timings.ns("limits")), times(timings.ratio("limits", "no-op"))
        )
        for state in ("full, sliding", "filling"):
            ratio = timings.ratio(state, "limits")
            table.add(
                f"**quotalimit**, {state}, against these", "", f"{times(ratio)} of these", figure=ratio, aim=Aim(0.35)
            )
    return table
