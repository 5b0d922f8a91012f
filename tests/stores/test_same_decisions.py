"""Rule 21: the same trace gives the same decisions on every store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quotalimit import (
    CalendarWindow,
    Hold,
    LimitExceeded,
    MemoryStore,
    RateLimiter,
    SlidingWindow,
    Store,
    TokenBucket,
    TokenBudget,
    limiters_of,
    rate_limited,
)
from quotalimit._waiting import ThreadBell
from quotalimit.stores import journal
from quotalimit.stores.memory_counts import MemoryCounts

from ..conftest import STORES

T0 = 1_800_000_000_000_000
KEYS = ["alice", 7, ("acme", "bob")]

LIMITS: dict[str, tuple[Any, ...]] = {
    "sliding": (SlidingWindow("9/minute"),),
    "calendar": (CalendarWindow("9/minute"),),
    "zoned": (CalendarWindow("12/day", tz="Asia/Kathmandu"),),
    "bucket": (TokenBucket("6/minute", burst=4),),
    "several": (SlidingWindow("4/10 seconds"), TokenBucket("20/minute"), CalendarWindow("30/hour")),
}
"""The limits of a rate limiter and of a token budget each."""


class Clock:
    """Time that passes only where a trace says so, or a call waits."""

    def __init__(self) -> None:
        self.now = T0

    @contextmanager
    def running(self) -> Iterator[Clock]:
        def wait(bell: ThreadBell, seconds: float) -> bool:
            if current_thread() is not main_thread():
                return really_wait(bell, seconds)
            self.now += round(seconds * 1e6)
            return False

        really_wait = ThreadBell.wait
        with patch("quotalimit.clock.now", lambda: self.now), patch.object(ThreadBell, "wait", wait):
            yield self


class Players:
    """What a trace calls, on one store."""

    def __init__(self, store: Store) -> None:
        self.rates = {name: RateLimiter(*limits, name=f"rate {name}", store=store) for name, limits in LIMITS.items()}
        self.budgets = {name: TokenBudget(*limits, name=f"used {name}", store=store) for name, limits in LIMITS.items()}

        @rate_limited(
            lambda amount: (f"{amount}/minute", TokenBucket(f"{amount}/minute")), key="user", name="plan", store=store
        )
        def plan(user: Any, amount: int) -> None: ...

        # A state goes when it is idle for the slowest limit known, which for plans is the slowest that has been asked.
        limiters_of(plan)[0].bound().places_for(("1/minute", TokenBucket("1/minute")))

        @rate_limited("3/minute", key="user", refund_on=ZeroDivisionError, name="refund", store=store)
        def divide(user: Any, by: int) -> float:
            return 1 / by

        self.plan = plan
        self.divide = divide


class Replay:
    """One trace on the stores of one place, each of which stands for a process; it notes what is decided."""

    def __init__(self, stores: list[Store], clock: Clock) -> None:
        self._stores = stores
        self._players = [Players(store) for store in stores]
        self._clock = clock
        self._holds: list[Hold] = []
        self._entered: list[Hold] = []
        self.seen: list[object] = []

    def run(self, trace: list[Any]) -> list[object]:
        for number, (kind, name, key, *rest) in enumerate(trace):
            players = self._players[number % len(self._players)]
            self.note(partial(getattr(self, kind), players, name, KEYS[key], *rest))
        while self._entered:
            self.leave(None, "", None, 1)
        self._look(self._players[0])
        return self.seen

    def note(self, act: Callable[[], object]) -> None:
        try:
            self.seen.append(act())
        except LimitExceeded as refusal:
            self.seen.append((type(refusal), refusal.decision, refusal.violations))
        except ZeroDivisionError:
            self.seen.append("raised")

    def call(self, players: Players, name: str, key: Any, units: int, wait: int) -> object:
        return players.rates[name].acquire(key, units, wait=wait)

    def charge(self, players: Players, name: str, key: Any, units: int, wait: int) -> object:
        return players.budgets[name].charge(key, units, wait=wait)

    def peek(self, players: Players, name: str, key: Any, *_: int) -> object:
        return players.rates[name].peek(key), players.budgets[name].peek(key)

    def reset(self, players: Players, name: str, key: Any, units: int, _: int) -> object:
        return (players.rates[name] if units % 2 else players.budgets[name]).reset(key)

    def hold(self, players: Players, name: str, key: Any, units: int, wait: int) -> object:
        self._holds.append(players.budgets[name].reserve(key, units, wait=wait))
        return self._holds[-1].decision

    def settle(self, _players: object, _name: str, _key: Any, units: int, which: int) -> object:
        if not self._holds:
            return None
        settlement = self._holds.pop(which % len(self._holds)).settle(units)
        for store in self._stores:
            store.flush()
        return settlement

    def enter(self, players: Players, name: str, key: Any, units: int, wait: int) -> object:
        hold = players.budgets[name].reserve(key, units, wait=wait)
        self._entered.append(hold.__enter__())
        return hold.decision

    def leave(self, _players: object, _name: str, _key: Any, units: int, *_: int) -> object:
        if not self._entered:
            return None
        hold = self._entered.pop()
        settlement = hold.settle(units)
        hold.__exit__(None, None, None)
        return settlement

    def tier(self, players: Players, _name: str, key: Any, units: int, _: int) -> object:
        return players.plan(key, units + 1)

    def refund(self, players: Players, _name: str, key: Any, units: int, _: int) -> object:
        return players.divide(key, units % 2)

    def move(self, players: Players, _name: str, _key: Any, _: int, milliseconds: int) -> None:
        self._clock.now += milliseconds * 1_000
        if milliseconds < 0:  # what is not looked at is re-dated later, which may be seen
            self._look(players)

    def _look(self, players: Players) -> None:
        limiters = [limiter for name in LIMITS for limiter in (players.rates[name], players.budgets[name])]
        limiters += limiters_of(players.divide)
        self.seen += [limiter.peek(key) for limiter in limiters for key in KEYS]


names, keys, units = st.sampled_from(list(LIMITS)), st.integers(0, len(KEYS) - 1), st.integers(0, 7)


def acts(*kinds: str) -> Any:
    return st.tuples(st.sampled_from(kinds), names, keys, units, st.sampled_from([0, 0, 0, 1, 30]))


def moves(*milliseconds: int) -> Any:
    return st.tuples(st.just("move"), names, keys, units, st.sampled_from(milliseconds))


PLAIN = ("call", "call", "charge", "peek", "reset", "hold", "settle", "tier", "refund")
FORWARD = (1, 999, 2_500, 10_000, 31_000, 60_000, 4_000_000, 90_000_000)
HELD_NOTHING_FOR_A_WINDOW = (("enter", "sliding", 1, 0, 0), ("move", "sliding", 0, 0, 60_000), ("leave", "", 0, 1, 0))
"""Found by the test of one process: all that is to be counted has left the window before anything was."""
BACK = (-1, -999, -5_000, -61_000, -90_000_000)


@pytest.fixture
def _no_sweeps() -> Iterator[None]:
    """No state is dropped: one that is idle would come to matter again if the clock stepped back."""
    with patch.object(MemoryCounts, "sweep"), patch("quotalimit.stores.rows.Rows.sweep"):
        yield


def replay(stores: list[Store], trace: list[Any]) -> list[object]:
    with Clock().running() as clock:
        return Replay(stores, clock).run(trace)


@contextmanager
def made(kind: str, count: int) -> Iterator[list[Store]]:
    with tempfile.TemporaryDirectory() as directory, STORES[kind](Path(directory)) as place:
        yield [place.make() for _ in range(count)]


others = pytest.mark.parametrize("kind", [kind for kind in STORES if kind != "memory"])


@pytest.fixture(params=["as they are", "tiny journals"])
def _journals(request: pytest.FixtureRequest) -> Iterator[None]:
    """Journals for logs of a few entries, too, so that short traces have all that happens to them."""
    if request.param == "as they are":
        yield
        return
    with patch.multiple(journal, _SMALL=20, _CHUNK=3, _WORTH=8), patch("quotalimit.stores.rows.LARGE", 30):
        yield


@others
@pytest.mark.usefixtures("_journals")
@settings(max_examples=25, deadline=None)
@example(trace=list(HELD_NOTHING_FOR_A_WINDOW))
@given(trace=st.lists(st.one_of(acts(*PLAIN, "enter", "leave", "leave"), moves(*FORWARD)), max_size=30))
def test_rule_21_one_process_decides_as_the_memory_store_does(kind: str, trace: list[Any]) -> None:
    expected = replay([MemoryStore()], trace)
    with made(kind, 1) as stores:
        assert replay(stores, trace) == expected


@others
@pytest.mark.usefixtures("_journals", "_no_sweeps")
@settings(max_examples=25, deadline=None)
@given(trace=st.lists(st.one_of(acts(*PLAIN, "enter", "leave"), moves(*FORWARD, *BACK)), max_size=30))
def test_rule_21_and_19_it_does_so_when_the_clock_steps_back(kind: str, trace: list[Any]) -> None:
    expected = replay([MemoryStore()], trace)
    with made(kind, 1) as stores:
        assert replay(stores, trace) == expected


@others
@pytest.mark.usefixtures("_journals")
@settings(max_examples=25, deadline=None)
@given(trace=st.lists(st.one_of(acts(*PLAIN), moves(*FORWARD)), max_size=30))
def test_rule_21_two_processes_decide_as_one_does(kind: str, trace: list[Any]) -> None:
    """But for the word "busy": a process knows only its own holds. Nested calls are always of one process."""
    with patch("quotalimit.stores.charges._fits_without", return_value=False):
        expected = replay([MemoryStore()], trace)
        with patch("quotalimit.stores.redis.unused", return_value=()), made(kind, 2) as stores:
            assert replay(stores, trace) == expected


ON_ONE_LOG = st.tuples(
    st.sampled_from(["call", "call", "charge", "charge", "hold", "settle", "move"]),
    st.just("sliding"),
    st.just(0),
    st.integers(1, 2),
    st.sampled_from([0, 1, 999, 2_500]),
)


@pytest.mark.parametrize("count", [1, 3])
@settings(max_examples=25, deadline=None)
@given(trace=st.lists(ON_ONE_LOG, min_size=15, max_size=40))
def test_rule_21_processes_decide_as_one_does_on_a_window_in_a_journal(count: int, trace: list[Any]) -> None:
    """Its charges are few and come again and again: each journal begins, is read by others, and makes snapshots."""
    trace = [(kind, *rest, wait if kind in ("move", "settle") else 0) for kind, *rest, wait in trace]
    with patch("quotalimit.stores.charges._fits_without", return_value=False):
        expected = replay([MemoryStore()], trace)
        with (
            patch.multiple(journal, _SMALL=20, _CHUNK=3, _WORTH=8),
            patch("quotalimit.stores.rows.LARGE", 30),
            made("sqlite", count) as stores,
        ):
            assert replay(stores, trace) == expected
