"""Rule 24: what happens while a store cannot answer. A store that another connection has locked stands for all."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from quotalimit import (
    Hold,
    InvalidLimit,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    Store,
    StoreUnavailable,
    TokenBudget,
    TokenBudgetExceeded,
    collect_decisions,
    on_event,
    rate_limited,
    token_budget,
)
from quotalimit.stores.sqlite import SQLiteStore
from quotalimit.stores.writer import Writer

from ..helpers import used


class Outage:
    """A file that can be locked, and the time by which stores decide when to try again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = 1_000.0
        self.tries = 0
        self._stores: list[SQLiteStore] = []

    def make(self, **options: Any) -> SQLiteStore:
        store = SQLiteStore(self.path, timeout=0.01, **options)
        really_begin = store._database.begin

        def begin(deadline: float) -> None:
            self.tries += 1
            really_begin(deadline)

        store._database.begin = begin  # type: ignore[method-assign]
        self._stores.append(store)
        return store

    @contextmanager
    def lasting(self) -> Iterator[None]:
        locker = sqlite3.connect(self.path, isolation_level=None)
        locker.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            locker.close()

    def close(self) -> None:
        for store in self._stores:
            store.close()


@pytest.fixture
def outage(tmp_path: Path) -> Iterator[Outage]:
    """Nothing is written but by the calls of the test itself: the writer's thread would try at any moment."""
    outage = Outage(tmp_path / "counts.db")
    outage.make().close()
    with (
        patch("quotalimit.clock.monotonic", lambda: outage.seconds),
        patch("quotalimit.stores.writer.Writer.watch", lambda _writer, _store: None),
    ):
        yield outage
        outage.close()


def eventually(happens: Callable[[], bool]) -> None:
    """Wait for what the writer's thread does in its own time."""
    for _ in range(1_000):
        if happens():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen in ten seconds")


def later(outage: Outage) -> None:
    """The pause after a failure is over."""
    outage.seconds += 1.5


# The options


@pytest.mark.parametrize("wrong", ["block", None, True, 1, MemoryStore])
def test_another_answer_to_an_outage_is_refused_at_once(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match='on_unavailable must be "raise", "allow" or another store'):
        SQLiteStore(tmp_path / "counts.db", on_unavailable=wrong)


@pytest.mark.parametrize("wrong", [0, -1, True, None, "1", float("nan"), float("inf")])
def test_a_timeout_that_is_no_time_is_refused_at_once(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be"):
        SQLiteStore(tmp_path / "counts.db", timeout=wrong)


@pytest.mark.parametrize("wrong", [0, -1, True, None, 1.5])
def test_a_bound_that_is_no_number_is_refused_at_once(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match="max_keys must be"):
        SQLiteStore(tmp_path / "counts.db", max_keys=wrong)


# Raise


def test_rule_24_a_store_that_cannot_answer_raises_and_the_function_is_not_called(outage: Outage) -> None:
    called = []

    @rate_limited("2/day", key="user", name="calls", store=outage.make())
    def call(user: str) -> None:
        called.append(user)

    with outage.lasting(), pytest.raises(StoreUnavailable, match="counts"):
        call("alice")
    assert called == []
    later(outage)
    call("alice")
    assert called == ["alice"]


def test_rule_24_after_a_failure_the_next_calls_fail_at_once_and_one_a_second_tries(outage: Outage) -> None:
    limiter = RateLimiter("9/day", name="calls", store=outage.make())

    def fails() -> None:
        with pytest.raises(StoreUnavailable, match="counts"):
            limiter.allow("alice")

    with outage.lasting():
        outage.tries = 0
        for _ in range(5):
            fails()
        assert outage.tries == 1
        later(outage)
        for _ in range(5):
            fails()
        assert outage.tries == 2
    fails()
    assert outage.tries == 2
    later(outage)
    assert limiter.allow("alice")
    assert limiter.allow("alice")
    assert used(limiter) == 2


async def test_rule_24_the_async_twins_raise_too(outage: Outage) -> None:
    limiter = RateLimiter("9/day", name="calls", store=outage.make())
    with outage.lasting():
        for ask in (limiter.allow_async, limiter.acquire_async, limiter.peek_async, limiter.reset_async):
            later(outage)
            with pytest.raises(StoreUnavailable, match="counts"):
                await ask("alice")
    later(outage)
    assert await limiter.allow_async("alice")
    await limiter.reset_async("alice")
    assert (await limiter.peek_async("alice")).used == 0


# Allow


def test_rule_24_a_store_that_allows_admits_uncharged_and_says_so_once(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    store = outage.make(on_unavailable="allow")
    limiter = RateLimiter("2/day", name="calls", store=store)
    budget = TokenBudget("10/day", name="tokens", store=store)
    with outage.lasting():
        for _ in range(5):
            admitted = limiter.acquire("alice")
            assert (admitted.allowed, admitted.retry_after) == (True, 0)
            with budget.reserve("alice", 8) as hold:
                assert (hold.settle(8).used, hold.settle(8).charged) == (8, 0)
        assert limiter.peek("alice").used == 0
        with pytest.raises(StoreUnavailable):
            limiter.reset("alice")
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "counts.db" in caplog.text
        assert "calls are admitted uncharged" in caplog.text
    later(outage)
    assert limiter.acquire("alice").used == 1
    assert used(budget) == 0
    assert "answers again" in caplog.records[-1].message


def test_rule_24_layers_of_a_function_are_all_admitted(outage: Outage) -> None:
    store = outage.make(on_unavailable="allow")

    @rate_limited("1/day", key="user", name="calls", store=store)
    @token_budget("10/day", key="user", reserve=9, name="tokens", store=store)
    def call(user: str) -> int:
        return 7

    with outage.lasting(), collect_decisions() as seen:
        assert [call("alice") for _ in range(3)] == [7] * 3
    assert len(seen) == 6
    assert all(seen)


@pytest.mark.parametrize("first", ["down", "up"])
def test_rule_24_of_the_stores_of_a_call_those_that_answer_are_charged(outage: Outage, first: str) -> None:
    down, up = outage.make(on_unavailable="allow"), MemoryStore()
    outer, inner = (RateLimiter("9/day", name=f"calls {n}", store=store) for n, store in enumerate((down, up)))
    budget = TokenBudget("100/day", name="tokens", store=up)
    layers = [rate_limited(inner, key="user"), token_budget(budget, key="user", reserve=40, usage=lambda text: 9)]
    layers.insert(0 if first == "down" else 2, rate_limited(outer, key="user"))

    def call(user: str) -> str:
        return "an answer"

    for layer in reversed(layers):
        call = layer(call)
    with outage.lasting():
        assert call("alice") == "an answer"
    assert (used(inner), used(budget)) == (1, 9)
    later(outage)
    assert used(outer) == 0


def test_rule_24_a_call_that_was_admitted_uncharged_has_nothing_to_give_back(outage: Outage) -> None:
    limiter = RateLimiter("2/day", name="calls", store=outage.make(on_unavailable="allow"))

    @rate_limited(limiter, key="user", refund_on=ConnectionError)
    def call(user: str) -> None:
        raise ConnectionError

    with outage.lasting(), pytest.raises(ConnectionError):
        call("alice")
    later(outage)
    assert limiter.acquire("alice").used == 1


async def test_rule_24_the_async_twins_admit_uncharged_too(outage: Outage) -> None:
    limiter = RateLimiter("1/day", name="calls", store=outage.make(on_unavailable="allow"))
    with outage.lasting():
        assert [await limiter.allow_async("alice") for _ in range(2)] == [True, True]
        assert (await limiter.peek_async("alice")).used == 0
    later(outage)
    assert (await limiter.peek_async("alice")).used == 0


def test_a_directory_that_is_missing_is_an_outage_for_a_store_that_allows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SQLiteStore(tmp_path / "missing" / "counts.db", on_unavailable="allow")
    assert RateLimiter("1/day", name="calls", store=store).allow("alice")
    assert "make its directory" in caplog.text
    store.close()


# Another store


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_rule_24_another_store_is_asked_meanwhile_with_counts_of_its_own(
    outage: Outage, tmp_path: Path, kind: str
) -> None:
    spare = MemoryStore() if kind == "memory" else SQLiteStore(tmp_path / "spare.db")
    store = outage.make(on_unavailable=spare)
    limiter = RateLimiter("3/day", name="calls", store=store)
    budget = TokenBudget("10/day", name="tokens", store=store)
    assert limiter.acquire("alice").used == 1
    before = budget.reserve("alice", 5)
    with outage.lasting():
        assert [limiter.allow("alice") for _ in range(4)] == [True] * 3 + [False]
        assert limiter.peek("alice").used == 3
        with budget.reserve("alice", 8) as outer:
            with budget.reserve("alice", 6) as inner:
                inner.settle(4)
            assert not isinstance(spare, SQLiteStore) or not spare.behind
            with pytest.raises(TokenBudgetExceeded):
                budget.reserve("alice", 9)
            outer.settle(7)
        assert used(budget) == 4 + 7
        with pytest.raises(StoreUnavailable):
            budget.reset("alice")
        assert used(budget) == 0
        before.settle(3)
    later(outage)
    assert limiter.acquire("alice").used == 2
    assert used(budget) == 3
    if isinstance(spare, SQLiteStore):
        spare.close()


def test_rule_21_a_name_that_is_taken_on_the_other_store_is_refused(outage: Outage) -> None:
    spare = MemoryStore()
    assert RateLimiter("2/day", name="calls", store=spare).allow("alice")
    with pytest.raises(InvalidLimit, match="'calls' is taken"):
        RateLimiter("3/day", name="calls", store=outage.make(on_unavailable=spare)).allow("alice")


def test_rule_2_all_that_a_call_takes_of_one_count_must_fit_on_the_other_store(outage: Outage) -> None:
    limiter = RateLimiter("3/day", name="calls", store=outage.make(on_unavailable=MemoryStore()))

    @rate_limited(limiter, key="user", cost=2)
    @rate_limited(limiter, key="user", cost=2)
    def call(user: str) -> None: ...

    with outage.lasting():
        with pytest.raises(RateLimitExceeded):
            call("alice")
        assert limiter.acquire("alice").used == 1


async def test_rule_24_the_async_twins_ask_the_other_store(
    outage: Outage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spare = SQLiteStore(tmp_path / "spare.db")
    store = outage.make(on_unavailable=spare)
    limiter = RateLimiter("2/day", name="calls", store=store)
    budget = TokenBudget("10/day", name="tokens", store=store)
    with outage.lasting():
        assert [await limiter.allow_async("alice") for _ in range(3)] == [True, True, False]
        assert f"{spare!r} is asked instead" in caplog.text
        async with budget.reserve_async("alice", 8) as hold:
            hold.settle(6)
        assert not spare.behind
        assert (await budget.peek_async("alice")).used == 6
        with pytest.raises(StoreUnavailable):
            await budget.reset_async("alice")
        assert (await budget.peek_async("alice")).used == 0
    spare.close()


def test_rule_11_an_interrupt_as_the_other_store_admits_leaves_no_hold(outage: Outage) -> None:
    budget, hold = held_on_the_other(outage, MemoryStore())

    def interrupt(event: object) -> None:
        raise KeyboardInterrupt

    with outage.lasting():
        stop = on_event(interrupt)
        with pytest.raises(KeyboardInterrupt):
            budget.reserve("alice", 300)
        stop()
        assert used(budget) == 500
    hold.settle(0)


# What was settled


def test_a_settlement_that_changes_nothing_does_not_end_an_outage(
    outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    store = outage.make(on_unavailable="allow")
    limiter = RateLimiter("9/day", name="calls", store=store)
    hold = TokenBudget("100/day", name="tokens", store=store).reserve("alice", 10)
    with outage.lasting():
        limiter.allow("alice")
        hold.settle(10)
        later(outage)
        store.flush()
        limiter.allow("alice")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rule_11_what_is_settled_in_an_outage_is_written_after_it(
    outage: Outage, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    store = outage.make()
    budget = TokenBudget("100/day", name="tokens", store=store)
    outer = budget.reserve("alice", 10)
    assert store.busy
    with outage.lasting():
        outer.settle(30)
        for _ in range(2):
            store.flush() if mode == "sync" else asyncio.run(store.flush_async())
            assert "is kept in memory, and written when the store answers again" in caplog.text
    assert len(caplog.records) == 1
    assert store.behind
    later(outage)
    assert used(budget) == 30
    assert not store.busy


def test_rule_11_what_is_settled_in_an_outage_is_not_for_the_child_of_a_fork_to_write(outage: Outage) -> None:
    """Which knows nothing of the outage either, and asks the store."""
    store = outage.make()
    budget = TokenBudget("100/day", name="tokens", store=store)
    hold = budget.reserve("alice", 10)
    with outage.lasting():
        hold.settle(30)
        store.flush()
    store.before_fork()
    store.after_fork(in_child=True)
    assert used(budget) == 10
    assert not store.busy


def test_the_result_of_a_call_that_has_been_paid_for_is_returned_though_its_settlement_must_wait(
    outage: Outage,
) -> None:
    budget = TokenBudget("100/day", name="tokens", store=outage.make())
    locks = []

    @token_budget(budget, key="user", reserve=40, usage=lambda text: len(text))
    def call(user: str) -> str:
        locks.append(outage.lasting())
        locks[-1].__enter__()
        return "an answer"

    assert call("alice") == "an answer"
    locks.pop().__exit__(None, None, None)
    later(outage)
    assert used(budget) == 9


async def test_rule_11_a_settlement_of_a_cancelled_task_is_not_lost(outage: Outage) -> None:
    store = outage.make()
    budget = TokenBudget("100/day", name="tokens", store=store)
    started = asyncio.Event()

    @token_budget(budget, key="user", reserve=40, usage=lambda text: len(text))
    async def call(user: str) -> str:
        started.set()
        return "an answer"

    with outage.lasting():
        later(outage)
        task = asyncio.ensure_future(budget.reserve_async("bob", 1)._take())  # somebody who waits for the lock
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    later(outage)
    task = asyncio.ensure_future(call("alice"))
    await started.wait()
    task.cancel()  # while the settlement is flushed
    await asyncio.gather(task, return_exceptions=True)
    assert (await budget.peek_async("alice")).used == 9
    assert (await budget.peek_async("bob")).used == 0


# What is written by nobody's call


@pytest.fixture
def two_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SQLiteStore, SQLiteStore]]:
    """Two stores on one file, as two processes have them, and a writer that does not look up by itself."""
    writer = Writer()
    monkeypatch.setattr("quotalimit.stores.writer._LINGER", 100.0)
    monkeypatch.setattr("quotalimit.stores.shared.WRITER", writer)
    one, other = (SQLiteStore(tmp_path / "counts.db") for _ in range(2))
    yield one, other
    one.close()
    other.close()
    monkeypatch.setattr("quotalimit.stores.writer._LINGER", 0.0)
    writer.ring()


def test_what_a_finalizer_settles_is_written_soon_though_nobody_asks(
    two_stores: tuple[SQLiteStore, SQLiteStore],
) -> None:
    one, other = two_stores
    budget, same = (TokenBudget("100/day", name="tokens", store=store) for store in (one, other))

    @token_budget(budget, key="user", reserve=40)
    def stream(user: str) -> Iterator[dict[str, Any]]:
        yield {"usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}}

    items = stream("alice")
    next(items)
    assert used(same) == 40
    del items
    gc.collect()
    eventually(lambda: used(same) == 5)


@pytest.mark.parametrize("waits", [False, True], ids=["nobody", "somebody waits"])
async def test_rule_2_what_a_call_that_is_cancelled_took_all_the_same_is_given_back_soon(
    two_stores: tuple[SQLiteStore, SQLiteStore], waits: bool
) -> None:
    """Written though nobody asks, or told to who waits."""
    one, other = two_stores
    limiter, same = (RateLimiter("1/30 seconds", name="calls", store=store) for store in (one, other))
    really_ask, taken, cancelled = one._ask, threading.Event(), threading.Event()

    def ask(question: Any) -> Any:
        one._ask = really_ask  # type: ignore[method-assign]
        answer = really_ask(question)
        taken.set()
        cancelled.wait(20)
        return answer

    one._ask = ask  # type: ignore[method-assign]
    call = asyncio.ensure_future(limiter.acquire_async("alice"))
    await asyncio.to_thread(taken.wait, 20)
    assert used(same) == 1
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(limiter.acquire, "alice", 1, math.inf) if waits else None
        while waits and not one.lines:
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        cancelled.set()
        if waiting is None:
            eventually(lambda: used(same) == 0)
        else:
            assert waiting.result(15).used == 1


def test_a_store_that_nobody_holds_is_kept_until_it_has_written(tmp_path: Path) -> None:
    budget = TokenBudget("100/day", name="tokens", store=SQLiteStore(tmp_path / "counts.db"))
    hold = budget.reserve("alice", 40)
    store = SQLiteStore(tmp_path / "counts.db")
    same = TokenBudget("100/day", name="tokens", store=store)
    hold.settle(3)
    del budget, hold
    gc.collect()
    eventually(lambda: used(same) == 3)
    store.close()


# Refusals are no failures


def test_a_refusal_is_a_refusal_whatever_an_outage_does(outage: Outage) -> None:
    limiter = RateLimiter("1/day", name="calls", store=outage.make(on_unavailable="allow"))
    assert limiter.allow("alice")
    with pytest.raises(RateLimitExceeded):
        limiter.acquire("alice")


def test_the_log_names_no_identity(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    limiter = RateLimiter("1/day", name="calls", store=outage.make(on_unavailable="allow"))
    with outage.lasting():
        limiter.allow("alice@example.com")
    assert "alice" not in caplog.text


def held_on_the_other(outage: Outage, spare: Store) -> tuple[TokenBudget, Hold]:
    """A budget whose store is back, and a hold of 500 that the other store took meanwhile."""
    budget = TokenBudget("10_000/day", name="tokens", store=outage.make(on_unavailable=spare))
    budget.peek("alice")
    with outage.lasting():
        hold = budget.reserve("alice", 500)
    outage.seconds += 10
    return budget, hold


def test_rule_24_a_nested_call_does_not_draw_on_a_store_that_is_back_what_the_other_holds(outage: Outage) -> None:
    spare = MemoryStore()
    budget, outer = held_on_the_other(outage, spare)
    with outer:
        inner = budget.reserve("alice", 300)
        inner.settle(300)
    assert used(budget) == 300
    there = TokenBudget("10_000/day", name="tokens", store=spare)
    assert used(there) == 0  # all that it used was used inside


def test_rule_24_a_hold_that_outlives_its_outer_one_settles_on_the_store_that_took_it(outage: Outage) -> None:
    budget, outer = held_on_the_other(outage, MemoryStore())
    with outer:
        inner = budget.reserve("alice", 300)
    inner.settle(10)
    assert used(budget) == 10
