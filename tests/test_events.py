"""What listeners are told of limits, and that it costs and breaks nothing."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from quotalimit import (
    Event,
    LimitExceeded,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    Store,
    StoreUnavailable,
    TokenBudget,
    collect_decisions,
    limiters_of,
    log_event,
    on_event,
    rate_limited,
    token_budget,
)
from quotalimit import events as module
from quotalimit.events import listeners
from quotalimit.stores.sqlite import SQLiteStore
from tests.helpers import reply, used

SECRET = "alice@example.org"


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


def test_a_call_is_admitted_then_refused(heard: list[Event], store: Store) -> None:
    @rate_limited("1/minute", key="user", name="calls", store=store)
    def chat(user: str) -> str:
        return user

    chat(SECRET)
    with pytest.raises(RateLimitExceeded) as refusal:
        chat(SECRET)
    admitted, refused = heard
    assert (admitted.kind, admitted.name, admitted.key, admitted.enforced) == ("admitted", "calls", SECRET, True)
    assert admitted.decision is not None
    assert (admitted.decision.requested, admitted.decision.remaining) == (1, 0)
    assert (refused.kind, refused.decision) == ("refused", refusal.value.decision)
    assert str(refused) == str(refusal.value)


def test_every_limiter_of_a_call_tells_its_own_answer(heard: list[Event], store: Store) -> None:
    """One event for each limiter, whose name and key it has, however many limits the limiter holds."""

    @rate_limited("9/minute", key="ip", name="by-ip", store=store)
    @rate_limited("2/minute", "5/day", key="user", name="by-user", store=store)
    def chat(ip: str, user: str) -> None: ...

    chat("192.0.2.1", "alice")
    assert [(event.kind, event.name, event.key) for event in heard] == [
        ("admitted", "by-ip", "192.0.2.1"),
        ("admitted", "by-user", "alice"),
    ]
    assert heard[1].decision is not None
    assert heard[1].decision.remaining == 1  # of the limit that has the least left
    chat("192.0.2.1", "alice")
    heard.clear()
    with pytest.raises(RateLimitExceeded):
        chat("192.0.2.1", "alice")
    assert [(event.kind, event.name) for event in heard] == [("refused", "by-user")]


async def test_coroutines_and_bare_limiters_tell_too(heard: list[Event], store: Store) -> None:
    limiter = RateLimiter("1/minute", name="calls", store=store)

    @rate_limited(limiter, key="user")
    async def chat(user: str) -> None: ...

    await chat("alice")
    assert not await limiter.allow_async("alice")
    assert not limiter.allow("alice")
    limiter.acquire(("a", 1))
    await limiter.acquire_async(("b", 1))
    assert kinds(heard) == ["admitted", "refused", "refused", "admitted", "admitted"]
    assert [event.key for event in heard[3:]] == [("a", 1), ("b", 1)]
    budget = TokenBudget("9/day", name="tokens", store=store)
    heard.clear()
    budget.charge("alice", 3)
    with budget.reserve("alice", 4) as hold:
        hold.settle(2)
    async with budget.reserve_async("alice", 4):
        pass
    assert kinds(heard) == ["admitted", "admitted", "settled", "admitted", "settled"]
    heard.clear()
    budget.peek("alice")
    budget.reset("alice")
    assert not heard


def test_a_budget_tells_what_was_charged_and_by_how_much_it_was_overrun(heard: list[Event], store: Store) -> None:
    @token_budget("100/day", key="user", reserve=10, name="tokens", store=store)
    def ask(user: str, tokens: int) -> Any:
        return reply(tokens)

    ask("alice", 7)
    assert kinds(heard) == ["admitted", "settled"]
    settled = heard[1]
    assert settled.settlement is not None
    assert (settled.key, settled.settlement.charged, settled.settlement.source) == ("alice", 7, "reported")
    assert settled.decision is heard[0].decision
    heard.clear()
    ask("alice", 15)
    assert kinds(heard) == ["admitted", "settled", "overrun"]
    assert heard[2].settlement is not None
    assert heard[2].settlement.overrun == 5


def test_without_a_reserve_nothing_is_overrun(heard: list[Event]) -> None:
    ask = token_budget("100/day", key="user")(lambda user: reply(15))
    ask("alice")
    assert kinds(heard) == ["admitted", "settled"]


def test_a_call_that_waited_tells_for_how_long(heard: list[Event]) -> None:
    limiter = RateLimiter("1/second", name="calls")
    now = [1_700_000_000_000_000]

    def sleep(_bell: object, seconds: float) -> bool:
        now[0] += round(seconds * 1e6)
        return False

    ask = rate_limited(limiter, key="user", wait=5)(lambda user: user)
    with (
        mock.patch("quotalimit.clock.now", side_effect=lambda: now[0]),
        mock.patch("quotalimit._waiting.ThreadBell.wait", sleep),
    ):
        ask("alice")
        now[0] += 400_000
        ask("alice")
        limiter.acquire("alice", wait=2)
        limiter.acquire("bob", wait=2)
    assert kinds(heard) == ["admitted", "waited", "admitted", "waited", "admitted", "admitted"]
    assert [event.waited for event in heard] == [0, 0.6, 0.6, 1, 1, 0]
    assert {event.key for event in heard[:5]} == {"alice"}


def test_a_store_that_fails_is_told_once_for_each_outage(heard: list[Event], tmp_path: Path) -> None:
    path = tmp_path / "counts.db"
    limiter = RateLimiter("5/minute", name="calls", store=SQLiteStore(path, timeout=0.05))
    limiter.acquire("alice")
    heard.clear()
    locker = sqlite3.connect(path, isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            limiter.acquire("alice")
    locker.rollback()
    locker.close()
    assert kinds(heard) == ["store_failed"]
    assert isinstance(heard[0].error, StoreUnavailable)
    assert str(path) in str(heard[0])


# Streams


@token_budget("100/day", key="user", name="streams", reserve=5)
def tell(user: str) -> Iterator[Any]:
    yield "once"
    yield reply(7)


@token_budget("100/day", key="user", name="async streams", reserve=5)
async def tell_async(user: str) -> AsyncIterator[Any]:
    yield "once"
    yield reply(7)


async def test_streams_are_settled_at_their_end(heard: list[Event]) -> None:
    assert len(list(tell("alice"))) == 2
    assert kinds(heard) == ["admitted", "settled", "overrun"]
    heard.clear()
    assert len([item async for item in tell_async("alice")]) == 2
    assert kinds(heard) == ["admitted", "settled", "overrun"]


@pytest.mark.parametrize("end", ["never begun", "left"])
def test_rule_11_no_listener_is_called_in_a_finalizer(heard: list[Event], end: str) -> None:
    """A finalizer runs anywhere, also where this thread holds a lock that the listener wants."""
    lock = threading.Lock()

    def listener(event: Event) -> None:
        assert lock.acquire(blocking=False), "called while the lock is taken"
        lock.release()

    failures = mock.Mock()
    stop = on_event(listener)
    stream = tell("alice")
    if end == "left":
        next(stream)
    with lock, mock.patch.object(module.log, "exception", failures):
        del stream
        gc.collect()
    assert kinds(heard) == ["admitted"]
    assert used(limiters_of(tell)[0]) == (5 if end == "left" else 0)  # settled, but not told yet
    RateLimiter("1/minute").allow("alice")
    stop()
    assert kinds(heard) == ["admitted", "settled", "admitted"]
    assert not failures.called


def test_a_hold_that_is_dropped_is_told_later_too(heard: list[Event]) -> None:
    budget = TokenBudget("100/day")
    hold = budget.reserve("alice", 5)
    heard.clear()
    del hold
    gc.collect()
    assert not heard
    budget.charge("alice", 1)
    assert kinds(heard) == ["settled", "admitted"]
    assert heard[0].settlement is not None
    assert (heard[0].settlement.charged, heard[0].settlement.source) == (5, "reserved")


# Listeners


def test_a_listener_that_raises_breaks_no_call_and_is_logged_once(
    heard: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    stop = on_event(lambda event: 1 / 0)
    ask = token_budget("100/day", key="user")(lambda user: reply(3))
    assert ask("alice").usage.total_tokens == 3
    assert ask("alice").usage.total_tokens == 3
    stop()
    assert kinds(heard) == ["admitted", "settled"] * 2
    assert used(limiters_of(ask)[0]) == 6
    assert [record.message.partition("(")[2] for record in caplog.records] == ["said once for each listener)"]
    assert "ZeroDivisionError" in caplog.text


def test_what_a_listener_asks_itself_is_not_told() -> None:
    alarm = RateLimiter("1/minute", name="alarms")
    budget = TokenBudget("100/day", name="tokens")
    rung: list[str] = []

    def listener(event: Event) -> None:
        with budget.reserve("ops", 1):
            pass
        if alarm.allow("ops"):
            rung.append(event.name)

    stop = on_event(listener)
    limiter = RateLimiter("1/minute", name="calls")
    assert limiter.allow("alice")
    assert not limiter.allow("alice")
    stop()
    assert rung == ["calls"]
    assert used(budget, "ops") == 2


def test_who_stops_listening_hears_no_more(heard: list[Event]) -> None:
    other: list[Event] = []
    stop = on_event(other.append)
    limiter = RateLimiter("5/minute")
    limiter.allow("alice")
    stop()
    stop()
    limiter.allow("alice")
    assert (len(heard), len(other)) == (2, 1)


def test_what_nobody_heard_is_not_told_to_who_comes_later() -> None:
    stop = on_event(lambda event: None)
    stream = tell("alice")
    del stream
    stop()
    with_late: list[Event] = []
    stop = on_event(with_late.append)
    RateLimiter("5/minute").allow("alice")
    stop()
    assert kinds(with_late) == ["admitted"]


async def heard_async(event: Event) -> None: ...


class AsyncListener:
    async def __call__(self, event: Event) -> None: ...


@pytest.mark.parametrize("listener", [heard_async, AsyncListener(), "print", None])
def test_what_cannot_be_called_at_once_is_no_listener(listener: Any) -> None:
    with pytest.raises(TypeError, match="a listener must be a plain function"):
        on_event(listener)
    assert not listeners


def test_calls_take_their_fast_paths_only_while_nobody_listens(default_store: MemoryStore) -> None:
    one = rate_limited("9/minute", key="user")(lambda user: user)
    several = rate_limited("9/minute", key="user")(token_budget("90/day", key="user")(lambda user: reply(3)))
    for ask in (one, several):
        ask("alice")
        with mock.patch.object(default_store, "acquire", wraps=default_store.acquire) as acquire:
            ask("alice")
            assert not acquire.called
            stop = on_event(lambda event: None)
            ask("alice")
            stop()
            assert acquire.call_count == 1
            ask("alice")
            assert acquire.call_count == 1
    assert [used(limiter) for ask in (one, several) for limiter in limiters_of(ask)] == [4, 4, 12]


def test_a_call_that_began_before_anybody_listened_has_no_key() -> None:
    events: list[Event] = []

    @token_budget("90/day", key="user", name="tokens")
    def ask(user: str) -> Any:
        stops.append(on_event(events.append))
        return reply(3)

    stops: list[Callable[[], None]] = []
    ask("alice")
    stops.pop()()
    assert [(event.kind, event.name, event.key) for event in events] == [("settled", "tokens", None)]


# What events show


def every_event() -> list[Event]:
    """One event of each kind, all of a call by somebody whose name must not be shown."""
    heard: list[Event] = []
    stop = on_event(heard.append)
    ask = token_budget("20/day", key="user", name="tokens", reserve=5)(lambda user: reply(18))
    ask(SECRET)
    with pytest.raises(LimitExceeded):
        ask(SECRET)
    stop()
    heard.append(Event("waited", "tokens", SECRET, heard[0].decision, waited=1.5))
    heard.append(Event("store_failed", error=StoreUnavailable("the disk is full")))
    heard.append(Event("refused", "tokens", SECRET, heard[3].decision, enforced=False))
    assert set(kinds(heard)) == set(module.LEVELS)
    return heard


def test_the_key_is_in_no_text_of_an_event() -> None:
    for event in every_event():
        for text in (str(event), repr(event), f"{event}", "%s" % event):  # noqa: UP031
            assert SECRET not in text
            assert event.name in text


def test_events_are_logged_at_their_levels_and_without_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "quotalimit.events")
    for event in every_event():
        log_event(event)
    assert SECRET not in caplog.text
    assert [(record.levelname, record.getMessage().partition("; retry")[0]) for record in caplog.records] == [
        ("DEBUG", "tokens: admitted: 5 requested, 15 remaining"),
        ("DEBUG", "tokens: settled: 18 charged, 5 held (reported)"),
        ("WARNING", "tokens: overrun: 18 charged, 5 held (reported)"),
        ("WARNING", "tokens: 20/day exceeded: 5 requested, 2 remaining"),
        ("INFO", "tokens: waited 1.500 s"),
        ("ERROR", "the store cannot answer: the disk is full"),
        ("WARNING", "tokens: 20/day exceeded: 5 requested, 2 remaining"),
    ]
    assert caplog.records[-1].getMessage().endswith("(not enforced)")
    assert {record.name for record in caplog.records} == {"quotalimit.events"}


def test_events_never_change_and_may_be_sent_elsewhere() -> None:
    for event in every_event()[:5]:
        with pytest.raises(AttributeError):
            event.kind = "settled"  # type: ignore[misc]
        assert pickle.loads(pickle.dumps(event)) == copy.copy(event) == event


def test_collected_decisions_are_those_that_are_told(heard: list[Event]) -> None:
    ask = token_budget("20/day", key="user", reserve=5)(lambda user: reply(3))
    with collect_decisions() as seen:
        ask("alice")
    assert [event.decision for event in heard] == [*seen, *seen]
