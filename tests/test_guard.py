"""The guard of one function: layers on several stores, interrupts, and whose the decisions are."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from time_machine import Traveller

from quotalimit import (
    UNLIMITED,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    SQLiteStore,
    TokenBudget,
    collect_decisions,
    rate_limited,
    token_budget,
)

from .helpers import open_holds, reply, used


def test_rule_4_the_layer_that_refuses_is_named_and_delays_by_its_own_patience_on_whichever_store_it_is() -> None:
    one, other = MemoryStore(), MemoryStore()

    @rate_limited("9/minute", key="user", name="outer", store=one)
    @rate_limited("9/minute", key="user", name="patient", store=other, wait=9)
    @rate_limited("1/second", key="user", name="inner", store=one)
    def ask(user: str) -> None: ...

    with mock.patch("quotalimit.clock.now", return_value=1_900_000_000_000_000):
        ask("alice")
        with pytest.raises(RateLimitExceeded) as refusal:
            ask("alice")
    assert refusal.value.name == "inner"


@pytest.mark.parametrize("kind", ["function", "coroutine", "async generator"])
async def test_rule_11_an_interrupt_between_the_answer_and_the_call_leaves_nothing_held(kind: str) -> None:
    budget = TokenBudget("100/day")
    guarded = token_budget(budget, key="user", reserve=9)

    @guarded
    async def ask(user: str) -> Any: ...

    @guarded
    async def tell(user: str) -> AsyncIterator[Any]:
        yield user

    async def call() -> None:
        if kind == "function":
            guarded(lambda user: reply(3))("alice")
        elif kind == "coroutine":
            await ask("alice")
        else:
            tell("alice")

    interrupted = mock.patch("quotalimit._guard.Asked.admitted", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        await call()
    assert open_holds(budget) == used(budget) == 0


async def test_rule_6_a_new_async_generator_does_not_delay_the_head_of_the_line(time: Traveller) -> None:
    limiter = RateLimiter("10/minute")
    limiter.acquire("alice", cost=4)

    @rate_limited(limiter, key="user", cost=6)
    async def tell(user: str) -> AsyncIterator[str]:
        yield user

    head = asyncio.create_task(limiter.acquire_async("alice", cost=7, wait=math.inf))
    while not limiter.bound().store.lines:
        await asyncio.sleep(0)
    time.shift(30)
    with pytest.raises(RateLimitExceeded):  # it would fit, but then the head could not start in a minute
        tell("alice")
    head.cancel()
    await asyncio.wait([head])
    assert [item async for item in tell("alice")] == ["alice"]


def test_rule_12_nested_calls_of_a_rate_limiter_that_may_refund_count_each() -> None:
    limiter = RateLimiter("2/minute")

    @rate_limited(limiter, key="user", refund_on=ConnectionError)
    @token_budget("100/day", key="user")
    def ask(user: str, depth: int) -> Any:
        return ask(user, depth - 1) if depth else reply(3)

    with pytest.raises(RateLimitExceeded):
        ask("alice", 2)
    assert used(limiter) == 2


async def test_an_async_generator_of_a_caller_without_a_limit_is_not_limited() -> None:
    @rate_limited(lambda user: UNLIMITED, key="user")
    async def tell(user: str) -> AsyncIterator[str]:
        yield user

    assert [item async for item in tell("alice")] == ["alice"]


async def test_rule_16_an_async_generator_asks_a_store_that_does_io_at_its_first_item(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "counts.db")

    @rate_limited("1/day", key="user", name="calls", store=store)
    async def tell(user: str) -> AsyncIterator[str]:
        yield user

    assert [item async for item in tell("alice")] == ["alice"]
    second = tell("alice")
    with pytest.raises(RateLimitExceeded):
        await anext(second)
    store.close()


def test_decisions_say_what_their_layer_counts_and_by_which_of_its_limits() -> None:
    @rate_limited("9/minute", "90/day", key="user", name="calls")
    @token_budget("100/day", key="user", name="tokens")
    def chat(user: str) -> Any:
        return reply(3)

    with collect_decisions() as seen:
        chat("alice")
    assert [(decision.unit, decision.policy) for decision in seen] == [
        ("requests", "calls 9/minute"),
        ("requests", "calls 90/day"),
        ("tokens", "tokens"),
    ]
