"""Rule 5 where a finalizer or a signal handler calls, in the middle of what a store does for another call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from quotalimit import (
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    StoreUnavailable,
    TokenBudget,
    clock,
    limiters_of,
    rate_limited,
    token_budget,
)
from quotalimit._waiting import LINES, ThreadBell, Waiter
from quotalimit.stores.base import Claim

from .helpers import open_holds, used

Interrupt = Callable[[Callable[[], object]], None]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """Lets something run as a finalizer does, in the middle of the next call: where a store reads the clock."""
    real = clock.now

    def interrupt(run: Callable[[], object]) -> None:
        def now() -> int:
            monkeypatch.setattr(clock, "now", real)  # once
            run()
            return real()

        monkeypatch.setattr(clock, "now", now)

    return interrupt


def limited(layers: int) -> Any:
    def ask(user: str) -> str:
        return user

    limit = rate_limited("5/hour", key="user")
    return limit(ask if layers == 1 else token_budget("100/hour", key="user", reserve=10, usage=lambda _: 10)(ask))


@pytest.mark.parametrize("inner", ["alice", "bob"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("calls_before", [0, 1])
def test_rule_5_a_call_in_the_middle_of_another_never_hangs(
    interrupt: Interrupt, inner: str, layers: int, calls_before: int
) -> None:
    """One for the same key cannot be answered: its count is in the middle of a change."""
    ask = limited(layers)
    limiter = limiters_of(ask)[0]
    for _ in range(calls_before):
        ask("alice"), ask("bob")
    outcomes: list[object] = []

    def call() -> None:
        try:
            outcomes.append(ask(inner))
        except StoreUnavailable as error:
            outcomes.append("finalizer" in str(error))

    interrupt(call)
    assert ask("alice") == "alice"
    assert outcomes == [True if inner == "alice" else "bob"]
    assert used(limiter, "alice") == calls_before + 1
    assert used(limiter, "bob") == calls_before + (inner == "bob")


@pytest.mark.parametrize("act", ["peek", "reset", "acquire"])
def test_rule_5_what_is_asked_in_the_middle_of_a_call_is_told_so(interrupt: Interrupt, act: str) -> None:
    limiter = RateLimiter("5/hour")
    told: list[object] = []

    def ask() -> None:
        with pytest.raises(StoreUnavailable, match="call later") as error:
            getattr(limiter, act)("alice")
        told.append(error)

    interrupt(ask)
    assert limiter.allow("alice")
    assert len(told) == used(limiter) == 1


def test_rule_5_what_is_settled_in_the_middle_of_a_call_is_settled_after_it(interrupt: Interrupt) -> None:
    ask = limited(2)
    budget = limiters_of(ask)[1]
    hold = budget.reserve("alice", 50)
    interrupt(lambda: hold.settle(7))
    ask("alice")
    assert used(budget) == 17


def test_rule_22_a_sweep_in_the_middle_of_which_a_call_comes_loses_no_state(interrupt: Interrupt) -> None:
    """A state is on its way between the generations: a call for its key must not begin to count anew."""
    limiter = RateLimiter("5/hour")
    for number in range(100):
        limiter.allow(number)
    (counts, limit), *_ = limiter.bound().places
    counts._old, counts.young = counts.young, {}

    admitted: Counter[int] = Counter()

    class Interrupted(type(limit)):  # type: ignore[misc]
        def matters(self, state: Any, now: int) -> bool:
            for number in range(100):
                with suppress(StoreUnavailable, RateLimitExceeded):
                    limiter.acquire(number)
                    admitted[number] += 1
            return True

    counts._slowest = Interrupted("5/hour")
    counts.sweep()
    counts._slowest = limit
    assert 0 < len(admitted) < 100
    assert [used(limiter, number) for number in range(100)] == [1 + admitted[number] for number in range(100)]


def test_rule_22_a_sweep_that_is_interrupted_loses_no_state() -> None:
    limiter = RateLimiter("5/hour")
    for number in range(100):
        limiter.allow(number)
    (counts, limit), *_ = limiter.bound().places
    counts._old, counts.young = counts.young, {}

    class Interrupted(type(limit)):  # type: ignore[misc]
        def matters(self, state: Any, now: int) -> bool:
            raise KeyboardInterrupt

    counts._slowest = Interrupted("5/hour")
    with pytest.raises(KeyboardInterrupt):
        counts.sweep()
    counts._slowest = limit
    assert [used(limiter, number) for number in range(100)] == [1] * 100
    for number in range(100):
        limiter.reset(number)
    limiter.allow("another")
    counts._old, counts.young = counts.young, {}
    counts.sweep()
    assert [used(limiter, number) for number in range(100)] == [0] * 100


@pytest.mark.parametrize("during", ["settle", "sweep"])
def test_rule_11_a_hold_is_settled_whole_in_the_middle_of_a_sweep_of_its_own_state(during: str) -> None:
    budget = TokenBudget(SlidingWindow("100/hour"))
    hold = budget.reserve("alice", 10)
    ((counts, limit),) = budget.bound().places
    counts._old, counts.young = counts.young, {}

    class Interrupted(SlidingWindow):
        def redate(self, state: Any, now: int) -> Any:
            if during == "sweep":
                counts.sweep()
            hold.settle(30)
            return super().redate(state, now)

    counts._slowest = Interrupted("100/hour")
    counts.sweep()
    counts._slowest = limit
    assert used(budget) == 30
    assert open_holds(budget) == 0


def test_rule_6_a_call_in_the_middle_of_asking_who_waits_never_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a signal handler, which may come at any moment while the lines are looked at."""
    limiter = RateLimiter("1/hour")
    limiter.acquire("alice")
    asked: list[bool] = []

    class Interrupted(ThreadBell):
        @property
        def loop(self) -> None:  # type: ignore[override]
            if not asked:
                asked.append(False)
                asked.append(limiter.allow("bob"))

    ((counts, limit),) = limiter.bound().places
    claim = Claim(counts, "alice", limit, 1, 1, False)
    waiter = Waiter([claim], Interrupted())
    LINES.join(waiter)
    try:
        assert not limiter.allow("alice")
    finally:
        LINES.leave(waiter)
    assert asked == [False, True]
    assert not LINES
