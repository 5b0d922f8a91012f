"""Rule 5 where a finalizer or a signal handler calls, in the middle of what a store does for another call."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from quotalimit import (
    Hold,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    Store,
    StoreUnavailable,
    TokenBudget,
    clock,
    limiters_of,
    rate_limited,
    token_budget,
)
from quotalimit._waiting import LINES, ThreadBell, Waiter
from quotalimit.stores.base import Charge, Claim
from quotalimit.stores.memory_counts import MemoryCounts
from quotalimit.stores.shared import SharedCounts
from quotalimit.stores.sqlite import SQLiteStore
from quotalimit.testing import use_store

from .conftest import STORES
from .helpers import open_holds, used

T = TypeVar("T")

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


@pytest.mark.parametrize("act", ["acquire", "peek"])
@pytest.mark.parametrize("keys", [(1, 2), (2, 1)])
def test_rule_5_a_call_is_in_the_middle_of_a_change_of_each_of_its_keys(
    interrupt: Interrupt, keys: tuple[int, int], act: str
) -> None:
    store = MemoryStore()
    limiter = RateLimiter("5/hour", store=store)
    ((counts, limit),) = limiter.bound().places
    told: list[int] = []

    def ask() -> None:
        for key in keys:
            with pytest.raises(StoreUnavailable, match="call later"):
                limiter.peek(key)
            told.append(key)

    interrupt(ask)
    getattr(store, act)([Claim(counts, key, limit, 1, 1, False) for key in keys])
    assert told == [*keys]


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


def test_rule_11_what_is_settled_while_another_thread_moves_states_is_settled_before_the_next_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = TokenBudget(SlidingWindow("100/hour"))
    hold = budget.reserve("alice", 50)
    ((counts, _),) = budget.bound().places
    counts._old, counts.young = counts.young, {}
    taken, done = threading.Event(), threading.Event()

    def move() -> None:
        with counts._moving:
            taken.set()
            done.wait(30)

    def load(counts: MemoryCounts, identity: Any, now: int) -> Any:
        done.set()  # whoever loads a state waits for the other thread
        mover.join()
        return real(counts, identity, now)

    real = MemoryCounts.load
    monkeypatch.setattr(MemoryCounts, "load", load)
    mover = threading.Thread(target=move)
    mover.start()
    taken.wait(30)
    hold.settle(7)
    assert mover.is_alive()
    assert used(budget) == 7


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


# Stores that processes share


@pytest.fixture(params=[name for name in STORES if name != "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with STORES[request.param](tmp_path) as place:
        yield place.make()


@pytest.fixture
def interrupt_notes(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """Lets something run in the middle of the next call that holds: where a shared store notes what is open."""
    real = SharedCounts.opened

    def interrupt(run: Callable[[], object]) -> None:
        def opened(counts: SharedCounts, charge: Charge) -> None:
            monkeypatch.setattr(SharedCounts, "opened", real)  # once
            run()
            real(counts, charge)

        monkeypatch.setattr(SharedCounts, "opened", opened)

    return interrupt


def in_time(act: Callable[[], T]) -> T:
    """What something returns, which must not hang."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(act())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(20)


async def hold(budget: TokenBudget) -> Hold:
    return await budget.reserve_async("alice", 5)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("act", ["peek", "reset", "acquire", "acquire_async"])
def test_rule_5_what_is_asked_in_the_middle_of_a_call_on_a_shared_store_is_told_so_at_once(
    store: Store, interrupt_notes: Interrupt, act: str, mode: str
) -> None:
    """And the store is not taken for one that is down: the next call is answered."""
    limiter = RateLimiter("5/hour", name="rate", store=store)
    budget = TokenBudget("100/hour", name="tokens", store=store)
    told: list[StoreUnavailable] = []

    def ask() -> None:
        try:
            answer = getattr(limiter, act)("alice")
            if isinstance(answer, Coroutine):
                answer.send(None)
        except StoreUnavailable as error:
            told.append(error)

    interrupt_notes(ask)
    taken = in_time(lambda: budget.reserve("alice", 5) if mode == "sync" else asyncio.run(hold(budget)))
    assert ["call later" in str(error) for error in told] == [True]
    assert used(budget) == 5
    taken.settle(3)
    assert used(limiter) == 0
    assert used(budget) == 3


def test_rule_11_a_call_that_ends_in_the_middle_of_another_on_a_shared_store_is_settled_after_it(
    store: Store, interrupt_notes: Interrupt, caplog: pytest.LogCaptureFixture
) -> None:
    budget = TokenBudget("100/hour", name="tokens", store=store)
    earlier = budget.reserve("alice", 50).__enter__()

    def end() -> None:
        earlier.settle(7)
        earlier.__exit__(None, None, None)

    interrupt_notes(end)
    taken = in_time(lambda: budget.reserve("alice", 5))
    assert used(budget) == 12
    taken.settle(0)
    assert not caplog.records


def test_rule_24_a_call_in_the_middle_of_another_is_what_the_store_says_of_those_it_cannot_answer(
    tmp_path: Path, interrupt_notes: Interrupt
) -> None:
    spare = MemoryStore()
    store = SQLiteStore(tmp_path / "counts.db", on_unavailable=spare)
    limiter = RateLimiter("5/hour", name="rate", store=store)
    budget = TokenBudget("100/hour", name="tokens", store=store)
    interrupt_notes(lambda: limiter.acquire("alice"))
    in_time(lambda: budget.reserve("alice", 5)).settle(5)
    assert used(limiter) == 0
    with use_store(spare, limiter):
        assert used(limiter) == 1
    store.close()
