"""Layers with `enforce=False`: what they tell is what enforcing them would have refused, and they stop nobody."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotalimit import (
    UNLIMITED,
    CalendarWindow,
    Event,
    InvalidKey,
    LimitExceeded,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    Store,
    TokenBucket,
    collect_decisions,
    limiters_of,
    on_event,
    rate_limited,
    record_usage,
    token_budget,
)
from quotalimit.stores.sqlite import SQLiteStore
from tests.helpers import open_holds, reply, used


def refusals(events: list[Event]) -> list[tuple[str, bool]]:
    return [(event.name, event.enforced) for event in events if event.kind == "refused"]


LIMITS = st.sampled_from([SlidingWindow("3/minute"), CalendarWindow("3/minute"), TokenBucket("3/minute", burst=2)])
STEPS = st.sampled_from([0, 0, 1, 5_000_000, 20_000_000, 59_999_999, 60_000_000, -7_000_000])
CALLS = st.lists(st.tuples(STEPS, st.sampled_from(["alice", "bob"]), st.integers(0, 9)), max_size=40)


@given(LIMITS, st.sampled_from([None, 0, 4]), CALLS)
@settings(deadline=None, max_examples=100)
def test_what_is_told_is_what_enforcing_would_have_refused(
    limit: Any, reserve: int | None, calls: list[tuple[int, str, int]]
) -> None:
    def decorated(enforce: bool) -> Any:
        @rate_limited(limit, key="user", enforce=enforce, store=store)
        @token_budget(SlidingWindow("12/minute"), key="user", reserve=reserve, enforce=enforce, store=store)
        def chat(user: str, tokens: int) -> Any:
            return reply(tokens)

        return chat

    store = MemoryStore()
    enforced, tried = decorated(True), decorated(False)
    heard: list[Event] = []
    now = [1_700_000_000_000_000]
    stop = on_event(heard.append)
    with mock.patch("quotalimit.clock.now", side_effect=lambda: now[0]):
        for step, user, tokens in calls:
            now[0] += step
            heard.clear()
            try:
                enforced(user, tokens)
                refused = []
            except LimitExceeded as refusal:
                refused = [(decision.limit, decision.reason, decision.retry_after) for decision in refusal.violations]
            heard.clear()
            assert tried(user, tokens).usage.total_tokens == tokens
            assert refused == [
                (event.decision.limit, event.decision.reason, event.decision.retry_after)
                for event in heard
                if event.kind == "refused" and event.decision is not None
            ]
            for one, other in zip(limiters_of(enforced), limiters_of(tried), strict=True):
                assert used(one, user) == used(other, user)
                assert open_holds(other, user) == 0
    stop()


def test_a_layer_that_is_not_enforced_stops_nobody_and_says_so(heard: list[Event], store: Store) -> None:
    @rate_limited("1/minute", key="user", name="calls", store=store, enforce=False)
    def chat(user: str) -> str:
        return f"hello {user}"

    assert [chat("alice") for _ in range(3)] == ["hello alice"] * 3
    assert [(event.kind, event.name, event.key, event.enforced) for event in heard] == [
        ("admitted", "calls", "alice", False),
        ("refused", "calls", "alice", False),
        ("refused", "calls", "alice", False),
    ]
    assert used(limiters_of(chat)[0]) == 1


def test_beside_it_the_others_are_enforced_and_charged(heard: list[Event], store: Store) -> None:
    @rate_limited("2/minute", key="user", name="enforced", store=store)
    @rate_limited("1/minute", key="user", name="tried", store=store, enforce=False)
    @token_budget("100/day", key="user", name="tokens", store=store, reserve=9)
    def chat(user: str) -> Any:
        return reply(7)

    chat("alice")
    chat("alice")
    assert refusals(heard) == [("tried", False)]
    heard.clear()
    with pytest.raises(RateLimitExceeded) as refusal:
        chat("alice")
    assert [decision.name for decision in refusal.value.violations] == ["enforced"]
    assert refusals(heard) == [("enforced", True)]  # what is refused anyway is not tried
    assert [used(limiter) for limiter in limiters_of(chat)] == [2, 1, 14]


@pytest.mark.parametrize("tried", ["calls", "tokens"])
def test_what_it_holds_is_settled_with_what_the_others_hold(tried: str, store: Store) -> None:
    @rate_limited("9/day", key="user", name="calls", store=store, refund_on=ValueError, enforce=tried != "calls")
    @token_budget("100/day", key="user", name="tokens", store=store, reserve=9, enforce=tried != "tokens")
    def chat(user: str, error: Exception | None = None) -> Any:
        assert record_usage(reply(3))
        if error:
            raise error
        return reply(4)

    chat("alice")
    with pytest.raises(ValueError, match="refunded"):
        chat("alice", ValueError("refunded"))
    assert [used(limiter) for limiter in limiters_of(chat)] == [1, 10]


def test_all_layers_that_are_tried_are_charged_or_none(heard: list[Event]) -> None:
    """Rule 2 holds among them, as it would if they were enforced."""

    @rate_limited("1/minute", key="user", name="narrow", enforce=False)
    @rate_limited("9/minute", key="user", name="wide", enforce=False)
    @token_budget("100/day", key="user", name="tokens", enforce=False)
    def chat(user: str) -> Any:
        assert record_usage(2) is (user in admitted)
        return reply(5)

    admitted = {"alice"}
    chat("alice")
    admitted.clear()
    chat("alice")
    assert refusals(heard) == [("narrow", False)]
    assert [used(limiter) for limiter in limiters_of(chat)] == [1, 1, 7]


async def test_coroutines_and_streams(heard: list[Event], store: Store) -> None:
    tried = rate_limited("1/minute", key="user", name="tried", store=store, enforce=False)
    budget = token_budget("100/day", key="user", name="tokens", store=store, reserve=9)

    @tried
    @budget
    async def ask(user: str) -> Any:
        return reply(1)

    @tried
    @budget
    def tell(user: str) -> Iterator[Any]:
        yield "once"
        yield reply(10)

    @tried
    @budget
    async def tell_async(user: str) -> AsyncIterator[Any]:
        yield "once"
        yield reply(20)

    for user in ("alice", "alice"):
        await ask(user)
    assert len(list(tell("alice"))) == 2
    assert len([item async for item in tell_async("alice")]) == 2
    assert refusals(heard) == [("tried", False)] * 3
    calls, tokens = limiters_of(ask)
    assert (used(calls), used(tokens)) == (1, 32)
    stream, async_stream = tell("bob"), tell_async("bob")
    del stream
    await async_stream.aclose()
    assert used(tokens, "bob") == 0


def test_it_delays_nobody(heard: list[Event]) -> None:
    """What would have had to wait is told as refused, with the time that it would have waited for."""

    @rate_limited("1/minute", key="user", wait=90, enforce=False)
    def chat(user: str) -> None: ...

    now = [1_700_000_000_000_000]
    with mock.patch("quotalimit.clock.now", side_effect=lambda: now[0]):
        chat("alice")
        now[0] += 20_000_000
        chat("alice")
    assert [event.kind for event in heard] == ["admitted", "refused"]
    assert heard[1].decision is not None
    assert heard[1].decision.retry_after == 40


def test_its_decisions_are_not_for_the_caller() -> None:
    """Headers must not promise or threaten what nobody enforces."""

    @rate_limited("9/minute", key="user", name="enforced")
    @rate_limited("1/minute", key="user", name="tried", enforce=False)
    def chat(user: str) -> None: ...

    with collect_decisions() as seen:
        chat("alice")
        chat("alice")
    assert [decision.name for decision in seen] == ["enforced", "enforced"]


async def test_its_store_may_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "counts.db"
    trial = rate_limited("5/minute", key="user", name="t", store=SQLiteStore(path, timeout=0.05), enforce=False)
    budget = token_budget("100/day", key="user")

    @trial
    @budget
    def chat(user: str) -> Any:
        return reply(3)

    @trial
    @budget
    async def chat_async(user: str) -> Any:
        return reply(3)

    @trial
    async def tell(user: str) -> AsyncIterator[str]:
        yield user

    locker = sqlite3.connect(path, isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    for _ in range(2):
        assert chat("alice").usage.total_tokens == 3
    assert (await chat_async("alice")).usage.total_tokens == 3
    assert [item async for item in tell("alice")] == ["alice"]
    locker.rollback()
    locker.close()
    assert used(limiters_of(chat)[1]) == 6
    said = [record.message for record in caplog.records if "not enforced" in record.message]
    assert len(said) == 3, "once for each function"


def test_what_is_wrong_with_the_caller_or_stops_the_program_is_not_hidden(default_store: MemoryStore) -> None:
    trial = MemoryStore()

    @rate_limited("5/minute", key="user", store=trial, enforce=False)
    @token_budget("100/day", key=lambda: "all", reserve=5)
    def chat(user: object) -> Any:
        return reply(3)

    with pytest.raises(InvalidKey):
        chat(None)
    chat("alice")
    (budget,) = limiters_of(chat)[1:]
    with mock.patch.object(trial, "acquire", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        chat("alice")
    assert (used(budget, "all"), open_holds(budget, "all")) == (3, 0)


def test_plans_and_shared_limiters(heard: list[Event]) -> None:
    team = RateLimiter("1/minute", name="team")

    @rate_limited(lambda plan: UNLIMITED if plan == "staff" else "1/minute", key="user", name="plan", enforce=False)
    @rate_limited(team, key="user", enforce=False)
    def chat(user: str, plan: str) -> None: ...

    chat("root", "staff")
    assert used(team, "root") == 1
    chat("alice", "free")
    chat("alice", "free")
    assert sorted(refusals(heard)) == [("plan", False), ("team", False)]
    assert not team.allow("alice")


@pytest.mark.parametrize("enforce", [0, None, "no"])
def test_enforce_is_true_or_false(enforce: Any) -> None:
    with pytest.raises(TypeError, match="enforce must be True or False"):
        rate_limited("5/minute", key="user", enforce=enforce)
