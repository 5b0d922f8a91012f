"""What every store does: whole calls, sync and async, with waits, streams, resets and layers on several stores."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import time_machine

from quotalimit import (
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    Store,
    StoreFull,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    collect_decisions,
    rate_limited,
    token_budget,
)
from quotalimit.rate import MAX_AMOUNT
from quotalimit.stores.base import Answer, Claim

from ..conftest import Place
from ..helpers import reply, used


def budget(store: Store, limit: Any = "100/day") -> TokenBudget:
    return TokenBudget(limit, name="tokens", store=store)


async def test_peek_and_its_twin_tell_the_same(store: Store) -> None:
    tokens = TokenBudget("9/day", "5/hour", name="tokens", store=store)
    decision = tokens.peek("alice")
    assert (decision.unit, decision.policy) == ("tokens", "tokens 5/hour")
    twin = await tokens.peek_async("alice")
    assert (twin.unit, twin.policy, twin.remaining) == ("tokens", "tokens 5/hour", 5)


def test_rule_2_a_refused_call_charges_no_layer(store: Store) -> None:
    outer, inner = RateLimiter("9/day", name="outer", store=store), RateLimiter("2/day", name="inner", store=store)

    @rate_limited(outer, key="user")
    @rate_limited(inner, key="user")
    def call(user: str) -> None: ...

    call("alice")
    call("alice")
    with pytest.raises(RateLimitExceeded) as refused:
        call("alice")
    assert (refused.value.name, used(outer), used(inner)) == ("inner", 2, 2)


@pytest.mark.parametrize("first", ["memory", "other"])
async def test_rule_2_layers_on_different_stores_are_asked_as_one(store: Store, first: str) -> None:
    stores = (MemoryStore(), store) if first == "memory" else (store, MemoryStore())
    outer, inner = (RateLimiter("2/day", name=f"calls {n}", store=s) for n, s in enumerate(stores))
    tokens = budget(stores[0])

    @rate_limited(outer, key="user")
    @rate_limited(inner, key="user")
    @token_budget(tokens, key="user", reserve=20)
    async def call(user: str) -> Any:
        return reply(7)

    await call("alice")
    await inner.acquire_async("alice")
    with pytest.raises(RateLimitExceeded):
        await call("alice")
    peeked = [(await limiter.peek_async("alice")).used for limiter in (outer, inner, tokens)]
    assert peeked == [1, 2, 7]


def test_rules_7_to_9_a_hold_is_settled_to_what_the_call_used(store: Store) -> None:
    tokens = budget(store)

    @token_budget(tokens, key="user", reserve=40)
    def call(user: str, uses: int) -> Any:
        assert used(tokens) >= 40
        return reply(uses)

    call("alice", 10)
    assert used(tokens) == 10
    with collect_decisions() as seen:
        call("alice", 95)
    assert seen[0].settlement is not None
    assert (seen[0].settlement.charged, used(tokens)) == (95, 105)
    with pytest.raises(TokenBudgetExceeded):
        call("alice", 1)


def test_a_call_of_several_units_is_charged_them_all(store: Store) -> None:
    limiter = RateLimiter("5/day", name="calls", store=store)
    call = rate_limited(limiter, key="user", cost=2)(lambda user: user)
    call("alice"), call("alice")
    assert used(limiter) == 4
    with pytest.raises(RateLimitExceeded):
        call("alice")


def test_rule_21_whose_plan_changes_keeps_his_count(store: Store) -> None:
    plans = {"free": "2/day", "pro": "4/day"}

    @rate_limited(lambda plan: plans[plan], key="user", name="calls", store=store)
    def call(user: str, plan: str) -> None: ...

    for plan, admitted in (("free", True), ("free", True), ("free", False), ("pro", True), ("free", False)):
        with nullcontext() if admitted else pytest.raises(RateLimitExceeded):
            call("alice", plan)


def test_rule_7_a_budget_that_stands_twice_holds_what_the_inner_layer_reserves(store: Store) -> None:
    tokens = TokenBudget("100/day", "90/hour", name="tokens", store=store)

    @token_budget(tokens, key="user")
    @token_budget(tokens, key="user", reserve=50)
    def call(user: int) -> Any:
        held.append(tokens.peek(user).used)
        return reply(20)

    held: list[int] = []
    for user in range(20):
        call(user)
    assert held == [50] * 20
    assert [tokens.peek(user).used for user in range(20)] == [40] * 20


async def test_rules_7_to_9_for_coroutines_and_streams(store: Store) -> None:
    tokens = budget(store)

    @token_budget(tokens, key="user", reserve=40)
    async def call(user: str) -> Any:
        return reply(10)

    @token_budget(tokens, key="user", reserve=40)
    async def stream(user: str) -> AsyncIterator[Any]:
        yield "text"
        yield reply(15)

    await call("alice")
    assert (await tokens.peek_async("alice")).used == 10
    assert len([item async for item in stream("alice")]) == 2
    assert (await tokens.peek_async("alice")).used == 25


def test_rule_11_streams_that_are_dropped_are_settled(store: Store) -> None:
    tokens = budget(store)

    @token_budget(tokens, key="user", reserve=40)
    def stream(user: str) -> Iterator[Any]:
        yield reply(15)

    items = stream("alice")
    next(items)
    assert used(tokens) == 40
    items.close()
    assert used(tokens) == 15


def test_rule_12_a_nested_call_draws_on_the_enclosing_hold(store: Store) -> None:
    tokens = budget(store)

    @token_budget(tokens, key="user", reserve=100)
    def outer(user: str) -> None:
        inner(user)
        assert used(tokens) == 100

    @token_budget(tokens, key="user", reserve=60)
    def inner(user: str) -> Any:
        return reply(30)

    outer("alice")
    assert used(tokens) == 30


def test_rule_12_a_hold_that_outlives_its_outer_one_gives_back_what_it_drew_and_did_not_use(store: Store) -> None:
    tokens = budget(store)
    with tokens.reserve("alice", 60) as outer:
        inner = tokens.reserve("alice", 50)
        outer.settle(0)
    assert used(tokens) == 50
    inner.settle(20)
    assert used(tokens) == 20


def test_rule_12_a_nested_call_needs_room_only_for_what_the_enclosing_hold_does_not_have(store: Store) -> None:
    tokens = budget(store)
    other = tokens.reserve("alice", 40)
    with tokens.reserve("alice", 60):
        with pytest.raises(TokenBudgetExceeded):
            tokens.reserve("alice", 61)
        other.settle(150)
        with tokens.reserve("alice", 50) as inner:  # in debt, but all of it is held
            inner.settle(50)


def test_rule_12_a_nested_call_that_is_refused_leaves_the_enclosing_hold_as_it_was(store: Store) -> None:
    tokens = budget(store)

    @rate_limited("1/day", key="user", name="calls", store=store)
    @token_budget(tokens, key="user", reserve=50)
    def call(user: str) -> Any:
        return reply(0)

    call("alice")
    with tokens.reserve("alice", 60):
        with pytest.raises(RateLimitExceeded):
            call("alice")
        with tokens.reserve("alice", 60) as inner:
            assert used(tokens) == 60
            inner.settle(30)


@pytest.mark.usefixtures("time")
@pytest.mark.parametrize("units", [100_000, MAX_AMOUNT])
def test_rule_9_a_debt_of_any_size_is_told_alike_by_every_store(store: Store, units: int) -> None:
    told = []
    for each in (store, MemoryStore()):
        tokens = budget(each, TokenBucket("1/week"))
        tokens.reserve("alice", 1).settle(units)
        told.append(tokens.peek("alice"))
    assert told[0] == told[1]


def test_a_reset_forgets_and_closes_open_holds(store: Store) -> None:
    tokens = budget(store)
    hold = tokens.reserve("alice", 60)
    tokens.reset("alice")
    tokens.charge("alice", 10)
    with pytest.raises(TokenBudgetExceeded) as refusal:
        tokens.charge("alice", 100)
    assert refusal.value.reason == "exhausted"
    hold.settle(0)
    store.flush()
    assert used(tokens) == 10


def test_what_is_called_inside_a_hold_that_was_reset_takes_its_own(store: Store) -> None:
    tokens = budget(store)
    with tokens.reserve("alice", 60):
        tokens.reset("alice")
        with tokens.reserve("alice", 50) as inner:
            assert used(tokens) == 50
            inner.settle(20)
    assert used(tokens) == 20


def test_a_reset_by_another_process_does_so_too(place: Place) -> None:
    tokens, others = budget(place.make()), budget(place.make())
    hold = tokens.reserve("alice", 60)
    others.reset("alice")
    others.charge("alice", 10)
    hold.settle(0)
    tokens.bound().store.flush()
    assert (used(tokens), used(others)) == (10, 10)


def test_a_reset_by_another_process_closes_the_hold_of_a_call_under_way(place: Place) -> None:
    tokens, others = (budget(place.make(), SlidingWindow("100/day")) for _ in range(2))

    @token_budget(tokens, key="user", reserve=1)
    def call(user: str) -> Any:
        others.reset("alice")
        return reply(5)

    call("alice")
    assert used(others) == 0


def test_rule_6_a_thread_waits_for_room_that_a_settlement_makes(store: Store) -> None:
    tokens = budget(store)
    hold = tokens.reserve("alice", 80)
    admitted: list[int] = []
    thread = threading.Thread(target=lambda: admitted.append(tokens.charge("alice", 60, wait=math.inf).used))
    thread.start()
    while not store.lines:
        threading.Event().wait(0.001)
    hold.settle(20)
    thread.join()
    assert admitted == [80]


def test_rule_6_time_slept_counts_as_passed_under_a_frozen_clock(store: Store, time: time_machine.Traveller) -> None:
    limiter = RateLimiter(TokenBucket("100/second", burst=1), name="calls", store=store)
    limiter.acquire("alice")
    assert limiter.acquire("alice", wait=1).used == 1


async def test_rule_6_a_task_waits_for_room_that_a_reset_makes(store: Store) -> None:
    limiter = RateLimiter("1/day", name="calls", store=store)
    await limiter.acquire_async("alice")
    waiting = asyncio.create_task(limiter.acquire_async("alice", wait=math.inf))
    while not store.lines:
        await asyncio.sleep(0.001)
    await limiter.reset_async("alice")
    assert (await asyncio.wait_for(waiting, 10)).used == 1


@pytest.mark.parametrize("place", ["memory", "sqlite"], indirect=True)
async def test_rule_6_a_call_is_not_woken_by_what_it_gives_back_itself(store: Store) -> None:
    """It would ask again and again."""
    asked: list[int] = []

    class Second(MemoryStore):
        def acquire(self, claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
            asked.append(len(claims))
            return super().acquire(claims, not_before=not_before, report=report)

    free = RateLimiter("5/day", name="free", store=store)
    full = RateLimiter("1/day", name="full", store=Second())

    @rate_limited(free, key="user")
    @rate_limited(full, key="user", wait=math.inf)
    async def call(user: str) -> None: ...

    await call("alice")
    waiting = asyncio.ensure_future(call("alice"))
    while len(asked) < 3:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    assert asked == [1, 1, 1], "as it comes, and at the head of its line"
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


def test_rule_6_a_newcomer_that_fits_does_not_delay_who_waits(store: Store, time: time_machine.Traveller) -> None:
    """The first in line has room in 22 hours; for both there is room in 23."""
    tokens = budget(store, SlidingWindow("100/day"))
    for units in (10, 60, 10):
        tokens.charge("alice", units)
        time.shift(3_600)
    time.shift(-3_600)
    thread = threading.Thread(target=lambda: tokens.charge("alice", 30, wait=math.inf))
    thread.start()
    while not store.lines:
        threading.Event().wait(0.001)
    try:
        with pytest.raises(TokenBudgetExceeded) as refusal:
            tokens.charge("alice", 15)
        assert refusal.value.retry_after == 23 * 3_600
    finally:
        tokens.reset("alice")
        thread.join()


async def test_rule_6_tasks_wait_in_order_and_take_nothing_until_they_start(store: Store) -> None:
    limiter = RateLimiter(TokenBucket("50/second", burst=1), name="calls", store=store)
    await limiter.acquire_async("alice")
    order: list[int] = []

    async def call(number: int) -> None:
        await limiter.acquire_async("alice", wait=math.inf)
        order.append(number)

    tasks = []
    for number in range(4):
        tasks.append(asyncio.create_task(call(number)))
        await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3]


@pytest.mark.parametrize("place", ["memory", "sqlite"], indirect=True)
def test_rule_22_a_full_store_refuses_new_keys(place: Place) -> None:
    limiter = RateLimiter("5/day", name="calls", store=place.make(max_keys=2))
    limiter.acquire("alice")
    limiter.acquire("bob")
    with pytest.raises(StoreFull):
        limiter.acquire("carol")
    assert limiter.acquire("alice").used == 2
    assert limiter.peek("carol").used == 0
    assert limiter.allow("carol", 0)


@pytest.mark.parametrize("place", ["memory", "sqlite"], indirect=True)
def test_rule_22_a_call_that_makes_room_for_one_key_keeps_what_it_counts_for_another(
    place: Place, time: time_machine.Traveller
) -> None:
    store = place.make(max_keys=1)
    users, rooms = (RateLimiter("5/minute", name=name, store=store) for name in ("users", "rooms"))

    @rate_limited(users, key="user")
    @rate_limited(rooms, key="room")
    def enter(user: str, room: str) -> None: ...

    enter("alice", "one")
    time.shift(61)
    enter("alice", "two")
    assert (used(users), used(rooms, "two")) == (1, 1)


async def test_rule_5_threads_and_tasks_together_are_admitted_exactly_n_times(store: Store) -> None:
    limiter = RateLimiter("50/day", name="calls", store=store)

    async def tasks() -> int:
        return sum(await asyncio.gather(*(limiter.allow_async("alice") for _ in range(40))))

    threads = [asyncio.to_thread(lambda: sum(limiter.allow("alice") for _ in range(10))) for _ in range(4)]
    assert sum(await asyncio.gather(tasks(), *threads)) == 50


async def test_rule_12_what_one_layer_draws_from_the_parent_does_not_count_against_the_head_for_the_next(
    store: Store,
) -> None:
    """Of the 3 units of the child's outer layer 2 are the parent's. Tomorrow the head has room beside the other."""
    tokens = budget(store, SlidingWindow("10/day"))

    @token_budget(tokens, key="user", reserve=3)
    @token_budget(tokens, key="user")
    async def child(user: str) -> Any:
        return reply(3)

    @token_budget(tokens, key="user", reserve=2)
    async def parent(user: str) -> Any:
        head = asyncio.ensure_future(tokens.charge_async(user, 7, wait=math.inf))
        while not store.lines:
            await asyncio.sleep(0.001)
        try:
            return await child(user)
        finally:
            head.cancel()
            await asyncio.gather(head, return_exceptions=True)

    await tokens.charge_async("alice", 2)
    assert await parent("alice")
