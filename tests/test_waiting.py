"""Rule 6: calls that wait stand in line, in order of arrival, and take nothing until they start."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

import pytest
import time_machine
from freezegun import freeze_time
from hypothesis import given, settings
from hypothesis import strategies as st

from quotalimit import (
    CalendarWindow,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    collect_decisions,
    everyone,
    rate_limited,
    token_budget,
)
from quotalimit._waiting import FOREVER, Ask, Flow, Line, Lines, Sleep, Waiter, wait_for_room
from quotalimit.algorithms.base import Algorithm
from quotalimit.limiters import patience_of
from quotalimit.stores.base import Answer, Claim
from tests.helpers import no_lock_is_taken, open_holds

T0 = datetime(2026, 1, 1, tzinfo=UTC)
SOON = 0.05
"""Seconds that a test really waits."""


class WatchedLines(Lines):
    """Lines that count who has ever joined them."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = 0

    def join(self, waiter: Waiter) -> None:
        super().join(waiter)
        self.joined += 1


class WatchedStore(MemoryStore):
    """A memory store that writes down the costs that it admitted, in order, and how often it was asked."""

    lines: WatchedLines

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        object.__setattr__(self, "lines", WatchedLines())
        self.admitted: list[int] = []
        self.asked = 0

    def acquire(self, claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        answer = super().acquire(claims, not_before=not_before, report=report)
        self.asked += 1
        if not answer.refusals:
            self.admitted.append(claims[0].cost)
        return answer


class Crowd:
    """Calls that arrive one after the other, as threads, as tasks, or as both in turn."""

    def __init__(self, kind: str) -> None:
        self.store = WatchedStore()
        self._turns: Iterator[bool] = iter({"threads": [True], "tasks": [False], "mixed": [True, False]}[kind] * 1_000)
        self._pool = ThreadPoolExecutor(32)

    async def arrive(
        self, call: Callable[[], Any], call_async: Callable[[], Awaitable[Any]], store: WatchedStore | None = None
    ) -> asyncio.Future[Any]:
        """Start a call, and come back when it stands in line or has ended."""
        lines = (store or self.store).lines
        before = lines.joined
        future: asyncio.Future[Any]
        if next(self._turns):
            future = asyncio.get_running_loop().run_in_executor(self._pool, call)
        else:
            future = asyncio.ensure_future(call_async())
        while lines.joined == before and not future.done():
            await asyncio.sleep(0)
        return future

    async def acquire(
        self, limiter: RateLimiter, key: str, cost: int = 1, wait: float = math.inf
    ) -> asyncio.Future[Any]:
        return await self.arrive(
            lambda: limiter.acquire(key, cost, wait=wait), lambda: limiter.acquire_async(key, cost, wait=wait)
        )

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture(params=["threads", "tasks", "mixed"])
def crowd(request: pytest.FixtureRequest) -> Iterator[Crowd]:
    crowd = Crowd(request.param)
    yield crowd
    crowd.close()
    assert not crowd.store.lines


@pytest.fixture
def clock() -> Iterator[Any]:
    """A clock that stands still until it is moved."""
    with time_machine.travel(T0, tick=False) as clock:
        yield clock


async def ended(future: asyncio.Future[Any]) -> Any:
    """The result of a call that must be over soon, though the clock of the library stands still."""
    return await asyncio.wait_for(future, 10)


async def stop(*futures: asyncio.Future[Any]) -> None:
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)


async def start(call: Awaitable[Any]) -> asyncio.Task[Any]:
    """Start a task that goes as far as it can, until it waits."""
    task = asyncio.ensure_future(call)
    for _ in range(3):
        await asyncio.sleep(0)
    return task  # type: ignore[return-value]


# In line


ALGORITHMS = [SlidingWindow("5/minute"), CalendarWindow("5/minute"), TokenBucket("5/minute")]
FULL_UNTIL = [60.0, 60.0, 12.0]
"""When the first unit fits again after five at T0."""
algorithms = pytest.mark.parametrize("limit", ALGORITHMS, ids=lambda limit: limit.kind)


@algorithms
async def test_rule_6_calls_on_one_key_start_in_order_of_arrival(crowd: Crowd, clock: Any, limit: Algorithm) -> None:
    limiter = RateLimiter(limit, store=crowd.store)
    limiter.acquire("alice", 5)
    crowd.store.admitted.clear()
    waiting = [await crowd.acquire(limiter, "alice", cost) for cost in (2, 1, 2)]
    clock.shift(60)
    crowd.store.lines.ring_all()
    for call in waiting:
        assert await ended(call)
    assert crowd.store.admitted == [2, 1, 2]


async def test_rule_6_decorated_functions_start_in_order_of_arrival(crowd: Crowd, clock: Any) -> None:
    limiter = RateLimiter(SlidingWindow("5/minute"), store=crowd.store)
    ran: list[int] = []

    @rate_limited(limiter, key="user", cost=lambda cost: cost, wait=math.inf)
    def chat(user: str, cost: int) -> None:
        ran.append(cost)

    @rate_limited(limiter, key="user", cost=lambda cost: cost, wait=math.inf)
    async def chat_async(user: str, cost: int) -> None:
        ran.append(cost)

    def ask(cost: int) -> Awaitable[asyncio.Future[Any]]:
        return crowd.arrive(lambda: chat("alice", cost), lambda: chat_async("alice", cost))

    limiter.acquire("alice", 5)
    crowd.store.admitted.clear()
    waiting = [await ask(cost) for cost in (3, 1)]
    clock.shift(60)
    crowd.store.lines.ring_all()
    for call in waiting:
        await ended(call)
    assert crowd.store.admitted == [3, 1]
    assert sorted(ran) == [1, 3]


async def test_rule_6_other_keys_do_not_wait_in_the_line(crowd: Crowd, clock: Any) -> None:
    limiter = RateLimiter("1/minute", store=crowd.store)
    limiter.acquire("alice")
    call = await crowd.acquire(limiter, "alice")
    assert limiter.allow("bob")
    limiter.reset("alice")
    await ended(call)


async def test_rule_6_a_call_stands_in_the_lines_of_all_its_keys_at_once(crowd: Crowd) -> None:
    by_ip = RateLimiter("1/minute", name="ip", store=crowd.store)
    by_user = RateLimiter("1/minute", name="user", store=crowd.store)
    ran: list[str] = []

    @rate_limited(by_ip, key="ip", wait=1)
    @rate_limited(by_user, key="user", wait=1)
    def chat(ip: str, user: str) -> None:
        ran.append(user)

    @rate_limited(by_ip, key="ip", wait=1)
    @rate_limited(by_user, key="user", wait=1)
    async def chat_async(ip: str, user: str) -> None:
        ran.append(user)

    with time_machine.travel(T0, tick=True) as clock:
        by_ip.acquire("1.2.3.4")
        clock.shift(SOON)
        by_user.acquire("alice")
        clock.shift(60 - 2 * SOON)  # the address is free before alice is
        first = await crowd.arrive(lambda: chat("1.2.3.4", "alice"), lambda: chat_async("1.2.3.4", "alice"))
        second = await crowd.arrive(lambda: chat("1.2.3.4", "bob"), lambda: chat_async("1.2.3.4", "bob"))
        await ended(first)
        with pytest.raises(RateLimitExceeded) as refused:
            await ended(second)
    assert ran == ["alice"]
    assert refused.value.name == "ip"
    assert by_user.peek("bob").used == 0


async def test_rule_6_a_waiting_call_takes_nothing_anywhere_until_it_starts(crowd: Crowd, clock: Any) -> None:
    full = RateLimiter("1/minute", name="full", store=crowd.store)
    free = RateLimiter("5/minute", name="free", store=crowd.store)
    tokens = TokenBudget("100/day", name="tokens", store=crowd.store)

    @token_budget(tokens, key="user", reserve=10, usage=lambda _: 7)
    @rate_limited(free, key="user")
    @rate_limited(full, key="user", wait=math.inf)
    def chat(user: str) -> str:
        return "hello"

    @token_budget(tokens, key="user", reserve=10, usage=lambda _: 7)
    @rate_limited(free, key="user")
    @rate_limited(full, key="user", wait=math.inf)
    async def chat_async(user: str) -> str:
        return "hello"

    full.acquire("alice")
    call = await crowd.arrive(lambda: chat("alice"), lambda: chat_async("alice"))
    assert (full.peek("alice").used, free.peek("alice").used, tokens.peek("alice").used) == (1, 0, 0)
    full.reset("alice")
    assert await ended(call) == "hello"
    assert (full.peek("alice").used, free.peek("alice").used, tokens.peek("alice").used) == (1, 1, 7)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("limit", "dated_until"),
    [
        (SlidingWindow("1/minute"), 120.0),
        (TokenBucket("1/minute"), 120.0),
        (CalendarWindow("1/minute"), 120.0),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
async def test_rule_6_a_call_that_waited_is_dated_when_it_started(
    limit: Algorithm, dated_until: float, asynchronous: bool, clock: Any
) -> None:
    """On a clock that stands still, what was slept has passed: the call of T0 + 59.95 starts at T0 + 60."""
    limiter = RateLimiter(limit, store=MemoryStore())
    limiter.acquire("alice")
    clock.shift(60 - SOON)
    assert await limiter.acquire_async("alice", wait=1) if asynchronous else limiter.acquire("alice", wait=1)
    clock.move_to(T0.timestamp() + dated_until - 0.000_010)
    assert not limiter.peek("alice")
    clock.move_to(T0.timestamp() + dated_until)
    assert limiter.peek("alice")


# At once


@algorithms
@pytest.mark.parametrize("wait", [0, 0.0, 0.5, 11.9])
async def test_rule_6_too_short_a_wait_is_refused_at_once_with_an_honest_retry_after(
    crowd: Crowd, clock: Any, limit: Algorithm, wait: float
) -> None:
    limiter = RateLimiter(limit, store=crowd.store)
    limiter.acquire("alice", 5)
    with pytest.raises(RateLimitExceeded) as refused:
        await ended(await crowd.acquire(limiter, "alice", wait=wait))
    assert refused.value.retry_after == FULL_UNTIL[ALGORITHMS.index(limit)]
    assert refused.value.reason == "exhausted"
    assert crowd.store.lines.joined == 0
    clock.shift(refused.value.retry_after - 0.000_010)
    assert not limiter.allow("alice")
    clock.shift(0.000_010)
    assert limiter.allow("alice")


async def test_rule_6_a_wait_of_exactly_retry_after_is_long_enough(crowd: Crowd, clock: Any) -> None:
    limiter = RateLimiter("1/minute", store=crowd.store)
    limiter.acquire("alice")
    clock.shift(60 - SOON)
    exact = limiter.peek("alice").retry_after
    assert exact == pytest.approx(SOON)
    assert await ended(await crowd.acquire(limiter, "alice", wait=exact))


@algorithms
async def test_too_large_raises_at_once_even_with_wait(crowd: Crowd, clock: Any, limit: Algorithm) -> None:
    limiter = RateLimiter(limit, store=crowd.store)
    with pytest.raises(RateLimitExceeded) as refused:
        await ended(await crowd.acquire(limiter, "alice", 6))
    assert refused.value.reason == "too_large"
    assert refused.value.retry_after is None
    assert crowd.store.lines.joined == 0


async def test_rule_6_behind_a_line_retry_after_counts_those_ahead(crowd: Crowd, clock: Any) -> None:
    """Two units a minute come back at T0 + 60 and T0 + 70; the first is spoken for."""
    limiter = RateLimiter("2/minute", store=crowd.store)
    limiter.acquire("alice")
    clock.shift(10)
    limiter.acquire("alice")
    first = await crowd.acquire(limiter, "alice")
    with pytest.raises(RateLimitExceeded) as refused:
        await ended(await crowd.acquire(limiter, "alice", wait=55))
    assert refused.value.retry_after == 60.0
    limiter.reset("alice")
    await ended(first)


@pytest.mark.parametrize("newcomer", [2, 4])
async def test_rule_6_behind_a_line_retry_after_is_when_there_is_room_for_all_in_it(clock: Any, newcomer: int) -> None:
    """Three units come back at T0 + 60, three at T0 + 70 and two at T0 + 80; the head starts with the first."""
    limiter = RateLimiter("10/minute")
    for units in (3, 3, 2):
        limiter.acquire("alice", units)
        clock.shift(10)
    head = await start(limiter.acquire_async("alice", 4, wait=math.inf))
    await stop(await start(limiter.acquire_async("alice", 5, wait=math.inf)))  # is in it no more
    with pytest.raises(RateLimitExceeded) as refused:
        limiter.acquire("alice", newcomer)
    assert refused.value.retry_after == 40.0
    await stop(head)


@pytest.mark.parametrize("wait", [-1, -(10**400), math.nan, True, "1", None])
def test_a_wait_that_is_no_time_is_refused(wait: Any) -> None:
    with pytest.raises(ValueError, match="wait"):
        RateLimiter("1/minute").acquire("alice", wait=wait)
    with pytest.raises(ValueError, match="wait"):
        rate_limited("1/minute", key=everyone, wait=wait)


@pytest.mark.parametrize("wait", [math.inf, 10**400, 1e300, FOREVER])
def test_a_wait_may_be_of_any_length(wait: float) -> None:
    assert patience_of(wait) == FOREVER


# Woken


@pytest.mark.parametrize("wait", [math.inf, 100])
async def test_rule_6_a_settlement_wakes_the_head(crowd: Crowd, clock: Any, wait: float) -> None:
    """The clock stands still: only the settlement lets it in. A busy limit is waited for with little patience too."""
    budget = TokenBudget("10/day", store=crowd.store)
    hold = budget.reserve("alice", 10)
    call = await crowd.arrive(
        lambda: budget.charge("alice", 8, wait=wait), lambda: budget.charge_async("alice", 8, wait=wait)
    )
    hold.settle(2)
    assert (await ended(call)).used == 10
    assert budget.peek("alice").remaining == 0


async def test_rule_6_a_call_that_raises_and_a_dropped_stream_wake_the_head(crowd: Crowd, clock: Any) -> None:
    budget = TokenBudget("10/day", store=crowd.store)

    @token_budget(budget, key=everyone, reserve=10)
    def stream() -> Generator[str]:
        yield "hello"

    dropped = stream()
    call = await crowd.arrive(
        lambda: budget.charge("everyone", 1, wait=math.inf), lambda: budget.charge_async("everyone", 1, wait=math.inf)
    )
    del dropped
    gc.collect()
    assert (await ended(call)).used == 1


async def test_rule_6_a_reset_wakes_the_head_and_it_the_next(crowd: Crowd, clock: Any) -> None:
    limiter = RateLimiter("3/day", store=crowd.store)
    limiter.acquire("alice", 3)
    calls = [await crowd.acquire(limiter, "alice", cost) for cost in (2, 1)]
    limiter.reset("alice")
    for call in calls:
        assert await ended(call)
    assert crowd.store.admitted == [3, 2, 1]


async def test_rule_6_the_cancellation_of_an_earlier_call_wakes_the_next(crowd: Crowd, clock: Any) -> None:
    """One unit is free, but the head needs all ten a minute from now, so a second call must not take it for long."""
    limiter = RateLimiter("10/minute", store=crowd.store)
    limiter.acquire("alice", 9)
    clock.shift(1)
    head = await start(limiter.acquire_async("alice", 10, wait=math.inf))
    second = await crowd.acquire(limiter, "alice", 1)
    assert not second.done()
    await stop(head)
    assert await ended(second)


async def test_rule_6_an_earlier_call_that_gives_up_wakes_the_next(crowd: Crowd, clock: Any) -> None:
    """A busy limit may be freed at any time, so a call with little patience waits all the same, and then gives up."""
    budget = TokenBudget(SlidingWindow("10/minute"), store=crowd.store)
    hold = budget.reserve("alice", 9)
    clock.shift(1)

    def ask(tokens: int, wait: float) -> Awaitable[asyncio.Future[Any]]:
        return crowd.arrive(
            lambda: budget.charge("alice", tokens, wait=wait), lambda: budget.charge_async("alice", tokens, wait=wait)
        )

    first, second = await ask(10, SOON), await ask(1, math.inf)
    with pytest.raises(TokenBudgetExceeded) as refused:
        await ended(first)
    assert refused.value.reason == "busy"
    assert await ended(second)
    hold.settle(9)


# Newcomers


@pytest.mark.parametrize(
    ("limit", "used", "head", "newcomer", "goes_first"),
    [
        (SlidingWindow("10/minute"), 8, 9, 1, True),
        (SlidingWindow("10/minute"), 8, 9, 2, False),
        (SlidingWindow("10/minute"), 8, 10, 1, False),
        (SlidingWindow("10/minute"), 8, 10, 0, True),
        (CalendarWindow("10/minute"), 8, 10, 2, True),
        (TokenBucket("10/minute"), 8, 5, 1, False),
        (TokenBucket("10/minute"), 8, 10, 2, False),
        (TokenBucket("10/minute"), 5, 6, 1, False),
        (TokenBucket("10/minute"), 8, 5, 0, True),
    ],
    ids=str,
)
async def test_rule_6_a_newcomer_goes_first_only_if_the_head_can_still_start_when_it_was_going_to(
    crowd: Crowd, clock: Any, limit: Algorithm, used: int, head: int, newcomer: int, goes_first: bool
) -> None:
    limiter = RateLimiter(limit, store=crowd.store)
    limiter.acquire("alice", used)
    clock.shift(1)
    waiting = await start(limiter.acquire_async("alice", head, wait=math.inf))
    before = limiter.peek("alice").used
    call = await crowd.acquire(limiter, "alice", newcomer, wait=0)
    if goes_first:
        assert await ended(call)
    else:
        with pytest.raises(RateLimitExceeded):
            await ended(call)
        assert limiter.peek("alice").used == before
    await stop(waiting)


@pytest.mark.parametrize(
    ("other_frees_in", "limit", "goes_first"),
    [
        (30, SlidingWindow("1/minute"), False),
        (61, SlidingWindow("1/minute"), True),
        (30, TokenBucket("1/minute"), False),
        (61, TokenBucket("1/minute"), True),
        (30, CalendarWindow("1/minute"), False),
        (61, CalendarWindow("1/minute"), True),
    ],
    ids=str,
)
async def test_rule_6_a_newcomer_goes_before_a_head_that_another_key_keeps_waiting(
    crowd: Crowd, clock: Any, other_frees_in: int, limit: Algorithm, goes_first: bool
) -> None:
    """The head has room by address but none by user; a newcomer of that address must be gone when the user is free."""
    by_ip = RateLimiter(limit, name="ip", store=crowd.store)
    by_user = RateLimiter(f"1/{other_frees_in} seconds", name="user", store=crowd.store)

    @rate_limited(by_ip, key="ip", wait=math.inf)
    @rate_limited(by_user, key="user", wait=math.inf)
    async def chat(ip: str, user: str) -> None: ...

    by_user.acquire("alice")
    head = await start(chat("1.2.3.4", "alice"))
    call = await crowd.acquire(by_ip, "1.2.3.4", wait=0)
    if goes_first:
        assert await ended(call)
    else:
        with pytest.raises(RateLimitExceeded):
            await ended(call)
    await stop(head)


TEN = [SlidingWindow("10/minute"), CalendarWindow("10/minute"), TokenBucket("10/minute")]


@pytest.mark.parametrize(("head", "newcomer", "goes_first"), [(5, 5, True), (6, 5, False)])
@pytest.mark.parametrize("limit", TEN, ids=lambda limit: limit.kind)
async def test_rule_6_a_newcomer_goes_before_a_head_that_is_late_if_there_is_room_for_both(
    clock: Any, limit: Algorithm, head: int, newcomer: int, goes_first: bool
) -> None:
    """The head sleeps on while the clock is moved far beyond its time: it starts at any moment."""
    limiter = RateLimiter(limit)
    for _ in range(2):
        limiter.acquire("alice", 5)
        clock.shift(10)
    waiting = await start(limiter.acquire_async("alice", head, wait=math.inf))
    clock.shift(60)
    if goes_first:
        assert limiter.acquire("alice", newcomer)
    else:
        with pytest.raises(RateLimitExceeded) as refused:
            limiter.acquire("alice", newcomer)
        assert refused.value.retry_after == 1e-6
    await stop(waiting)


@pytest.mark.parametrize(("second", "goes_first"), [(2, True), (3, False)])
async def test_rule_6_all_that_a_newcomer_takes_of_one_count_counts_for_the_head(
    clock: Any, second: int, goes_first: bool
) -> None:
    """When the 5 units come back, the head has room beside 4 others, and not beside 5."""
    limiter = RateLimiter("10/minute")
    limiter.acquire("alice", 5)
    clock.shift(1)
    head = await start(limiter.acquire_async("alice", 6, wait=math.inf))

    @rate_limited(limiter, key="user", cost=2)
    @rate_limited(limiter, key="user", cost=second)
    def call(user: str) -> None: ...

    if goes_first:
        call("alice")
    else:
        with pytest.raises(RateLimitExceeded):
            call("alice")
    await stop(head)


async def test_rule_6_a_call_that_has_just_come_to_the_head_is_not_thought_to_start_before_its_time(clock: Any) -> None:
    """The call behind the head was going to start at T0 + 60; it has not asked since the head left."""
    limiter = RateLimiter("10/minute")
    limiter.acquire("alice", 8)
    clock.shift(1)
    first = await start(limiter.acquire_async("alice", 10, wait=math.inf))
    second = await start(limiter.acquire_async("alice", 9, wait=math.inf))
    first.cancel()
    await asyncio.sleep(0)
    assert first.done()
    assert limiter.allow("alice")
    await stop(first, second)


COSTS = st.integers(0, 10)


@settings(deadline=None, max_examples=100)
@given(
    limit=st.sampled_from(
        [SlidingWindow("10/minute"), CalendarWindow("10/minute"), TokenBucket("10/minute", burst=10)]
    ),
    before=st.lists(st.tuples(st.sampled_from([0, 0.5, 6, 20, 45]), COSTS), max_size=4),
    head=st.integers(1, 10),
    newcomer=COSTS,
    other=st.sampled_from([None, 5, 50, 70]),
)
def test_rule_6_a_newcomer_is_admitted_if_and_only_if_trying_it_shows_the_head_undelayed(
    limit: Algorithm, before: list[tuple[float, int]], head: int, newcomer: int, other: int | None
) -> None:
    """The oracle lets the newcomer in on a store of its own and sees whether the head still starts when it was to."""

    class World:
        """A limiter that has been used, beside another one, and a call of both that waits or does not."""

        def __init__(self) -> None:
            self.store = MemoryStore()
            self.limiter = RateLimiter(limit, store=self.store)
            beside = RateLimiter(f"1/{other or 1} seconds", store=self.store)
            clock.move_to(T0)
            for delay, cost in before:
                clock.shift(delay)
                self.limiter.allow("alice", cost)
            if other is not None:
                beside.acquire("alice")

            @rate_limited(self.limiter, key=lambda user: user, cost=head, wait=math.inf)
            @rate_limited(beside, key=lambda user: user, cost=int(other is not None), wait=math.inf)
            async def patient(user: str) -> None: ...

            @rate_limited(self.limiter, key=lambda user: user, cost=head)
            @rate_limited(beside, key=lambda user: user, cost=int(other is not None))
            def impatient(user: str) -> None: ...

            self.patient, self.impatient = patient, impatient

    async def try_it() -> bool | None:
        world = World()
        waiting = await start(world.patient("alice"))
        if waiting.done():
            return None
        admitted = world.limiter.allow("alice", newcomer)
        await stop(waiting)
        assert not world.store.lines
        return admitted

    with time_machine.travel(T0, tick=False) as clock:
        admitted = asyncio.run(try_it())
        if admitted is None:
            return
        oracle = World()
        with pytest.raises(RateLimitExceeded) as refused:
            oracle.impatient("alice")
        assert refused.value.retry_after is not None
        harmless = oracle.limiter.allow("alice", newcomer)
        if harmless:
            clock.shift(refused.value.retry_after)
            try:
                oracle.impatient("alice")
            except RateLimitExceeded:
                harmless = False
    assert admitted == harmless


# Layers with patience of their own


@pytest.mark.parametrize(("outer", "inner"), [(0, math.inf), (math.inf, 0)])
async def test_rule_6_a_layer_without_patience_and_room_refuses_at_once(
    crowd: Crowd, clock: Any, outer: float, inner: float
) -> None:
    impatient = RateLimiter("1/minute", name="impatient", store=crowd.store)
    patient = RateLimiter("1/minute", name="patient", store=crowd.store)
    layers = {0: impatient, math.inf: patient}

    @rate_limited(layers[outer], key=everyone, wait=outer)
    @rate_limited(layers[inner], key=everyone, wait=inner)
    def chat() -> str:
        return "hello"

    @rate_limited(layers[outer], key=everyone, wait=outer)
    @rate_limited(layers[inner], key=everyone, wait=inner)
    async def chat_async() -> str:
        return "hello"

    patient.acquire("everyone")
    clock.shift(10)
    impatient.acquire("everyone")
    with pytest.raises(RateLimitExceeded) as refused:
        await ended(await crowd.arrive(chat, chat_async))
    assert refused.value.retry_after == 60.0
    assert crowd.store.lines.joined == 0

    impatient.reset("everyone")  # now only the patient layer is full: the call waits
    call = await crowd.arrive(chat, chat_async)
    assert crowd.store.lines.joined == 1
    patient.reset("everyone")
    assert await ended(call) == "hello"


async def test_rule_6_each_layer_delays_a_call_for_its_own_patience_at_most(crowd: Crowd, clock: Any) -> None:
    """Both layers are full for 30 s: the layer that would wait for 20 s decides."""
    longer = RateLimiter("1/30 seconds", name="longer", store=crowd.store)
    shorter = RateLimiter("1/30 seconds", name="shorter", store=crowd.store)

    @rate_limited(longer, key=everyone, wait=40)
    @rate_limited(shorter, key=everyone, wait=20)
    def chat() -> None: ...

    @rate_limited(longer, key=everyone, wait=40)
    @rate_limited(shorter, key=everyone, wait=20)
    async def chat_async() -> None: ...

    longer.acquire("everyone")
    shorter.acquire("everyone")
    with pytest.raises(RateLimitExceeded):
        await ended(await crowd.arrive(chat, chat_async))
    assert crowd.store.lines.joined == 0
    shorter.reset("everyone")
    call = await crowd.arrive(chat, chat_async)
    assert crowd.store.lines.joined == 1
    longer.reset("everyone")
    await ended(call)


async def test_rule_6_a_layer_that_fills_while_the_call_waits_refuses_it_and_nothing_is_taken(
    crowd: Crowd, clock: Any
) -> None:
    limiter = RateLimiter("1/minute", name="calls", store=crowd.store)
    budget = TokenBudget("10/day", name="tokens", store=crowd.store)

    @rate_limited(limiter, key=everyone, wait=math.inf)
    @token_budget(budget, key=everyone, reserve=5)
    def chat() -> None: ...

    @rate_limited(limiter, key=everyone, wait=math.inf)
    @token_budget(budget, key=everyone, reserve=5)
    async def chat_async() -> None: ...

    limiter.acquire("everyone")
    hold = budget.reserve("everyone", 1)
    call = await crowd.arrive(chat, chat_async)
    assert crowd.store.lines
    hold.settle(8)  # the paid-for call used more than it held
    with pytest.raises(TokenBudgetExceeded) as refused:
        await ended(call)
    assert refused.value.name == "tokens"
    assert limiter.peek("everyone").used == 1
    assert budget.peek("everyone").used == 8


async def test_rule_6_the_room_that_a_waiting_call_needs_elsewhere_is_kept_for_it(crowd: Crowd, clock: Any) -> None:
    """`allow` on the other limit would delay the head, and is refused."""
    full = RateLimiter("1/minute", store=crowd.store)
    other = RateLimiter("1/hour", store=crowd.store)

    @rate_limited(full, key=everyone, wait=math.inf)
    @rate_limited(other, key=everyone)
    def chat() -> None: ...

    @rate_limited(full, key=everyone, wait=math.inf)
    @rate_limited(other, key=everyone)
    async def chat_async() -> None: ...

    full.acquire("everyone")
    call = await crowd.arrive(chat, chat_async)
    assert not other.allow("everyone")
    full.reset("everyone")
    await ended(call)
    assert other.peek("everyone").used == 1


# No trace


@pytest.mark.parametrize("place", ["head", "behind"])
@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_rule_6_a_cancelled_task_leaves_no_trace(clock: Any, place: str, how: str) -> None:
    store = WatchedStore()
    limiter = RateLimiter("1/minute", store=store)
    tokens = TokenBudget("10/day", store=store)

    @rate_limited(limiter, key=everyone, wait=math.inf)
    @token_budget(tokens, key=everyone, reserve=5)
    async def chat() -> None: ...

    limiter.acquire("everyone")
    others = [await start(chat())] if place == "behind" else []
    if how == "cancel":
        waiting = await start(chat())
        await stop(waiting)
        assert waiting.cancelled()
    else:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(chat(), SOON)
    await stop(*others)
    assert store.lines.joined == 1 + len(others)
    assert not store.lines
    assert limiter.peek("everyone").used == 1
    assert tokens.peek("everyone").used == 0
    assert tokens.bound().places[0][0].open == {}


def test_rule_6_an_event_loop_that_is_closed_takes_its_waiting_tasks_along(clock: Any) -> None:
    store = WatchedStore()
    limiter = RateLimiter("1/day", store=store)
    limiter.acquire("alice")

    async def leave_it_behind() -> None:
        await start(limiter.acquire_async("alice", wait=math.inf))

    asyncio.run(leave_it_behind())
    assert store.lines.joined == 1
    assert not store.lines


@pytest.mark.parametrize("through", ["limiter", "function"])
def test_rule_6_a_keyboard_interrupt_leaves_no_trace(clock: Any, through: str) -> None:
    store = WatchedStore()
    limiter = RateLimiter("1/day", store=store)
    chat = rate_limited(limiter, key="user", wait=math.inf)(lambda user: user)

    def interrupt() -> None:
        while not store.lines:
            time.sleep(0.001)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    limiter.acquire("alice")
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt) as interrupted:
        limiter.acquire("alice", wait=math.inf) if through == "limiter" else chat("alice")
    thread.join()
    assert interrupted.traceback  # keeps all that the call had in hand
    assert not store.lines
    assert limiter.peek("alice").used == 1
    limiter.reset("alice")
    assert limiter.allow("alice")


class Interrupted(SlidingWindow):
    """A sliding window in whose settlements a Ctrl-C arrives, once."""

    armed = True

    def adjust(self, state: Any, mark: int, delta: int, now: int) -> Any:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        return super().adjust(state, mark, delta, now)


def test_a_keyboard_interrupt_in_a_late_settlement_leaves_no_lock_taken(clock: Any) -> None:
    """Rule 11: what could not be settled at once is settled by the next call; where that is interrupted, notebooks
    go on."""
    store = MemoryStore()
    budget = TokenBudget(Interrupted("10/minute"), store=store)
    hold = budget.reserve("alice", 5)
    with store._stripe("alice").lock:
        hold.settle(2)
    with pytest.raises(KeyboardInterrupt):
        budget.charge("alice", 1)
    assert no_lock_is_taken(store)


@pytest.mark.parametrize("how", ["cancelled", "refused"])
async def test_rule_2_a_call_that_does_not_start_on_one_store_gives_back_what_another_admitted(
    clock: Any, how: str
) -> None:
    first, second = WatchedStore(), WatchedStore()
    admits = RateLimiter("5/day", store=first)
    tokens = TokenBudget("10/day", store=first)
    refuses = RateLimiter("1/day", store=second)

    @rate_limited(admits, key=everyone)
    @token_budget(tokens, key=everyone, reserve=5)
    @rate_limited(refuses, key=everyone, wait=math.inf if how == "cancelled" else 0)
    async def chat() -> None: ...

    refuses.acquire("everyone")
    call = await start(chat())
    await stop(call)
    assert admits.peek("everyone").used == 0
    assert tokens.peek("everyone").used == 0
    assert tokens.bound().places[0][0].open == {}
    assert admits.bound().places[0][0].open == {}


# Generators


async def test_rule_6_an_async_generator_waits_at_its_first_item(clock: Any) -> None:
    store = WatchedStore()
    limiter = RateLimiter("1/minute", store=store)
    asked: list[str] = []

    def key(user: str) -> str:
        asked.append(user)
        return user

    @rate_limited(limiter, key=key, wait=math.inf)
    async def stream(user: str) -> AsyncGenerator[str]:
        for word in ("hello", "world"):
            yield word

    async def read() -> list[str]:
        return [word async for word in stream("alice")]

    assert await read() == ["hello", "world"]
    reading = await start(read())
    assert store.lines
    limiter.reset("alice")
    assert await ended(reading) == ["hello", "world"]
    assert limiter.peek("alice").used == 1
    assert not store.lines


async def test_an_async_generator_that_waits_is_one_call_with_one_question_and_one_decision(clock: Any) -> None:
    """All keys and costs are computed before any store is asked, once; a decision is gathered for each call."""
    limiter = RateLimiter("1/minute", store=MemoryStore())
    asked: list[str] = []

    @rate_limited(limiter, key=lambda user: asked.append(user) or user, wait=math.inf)
    async def stream(user: str) -> AsyncGenerator[str]:
        yield "hello"

    limiter.acquire("alice")
    with collect_decisions() as seen:
        reading = await start(stream("alice").__anext__())
        limiter.reset("alice")
        assert await ended(reading) == "hello"
    assert asked == ["alice"]
    assert [decision.allowed for decision in seen] == [True]


@pytest.mark.parametrize(("cost", "wait"), [(1, 0), (1, 30), (2, math.inf)], ids=["no wait", "too short", "too large"])
async def test_rule_16_an_async_generator_that_waiting_cannot_help_is_refused_when_called(
    clock: Any, cost: int, wait: float
) -> None:
    limiter = RateLimiter("1/minute", store=MemoryStore())

    @rate_limited(limiter, key=everyone, cost=cost, wait=wait)
    async def stream() -> AsyncGenerator[str]:
        yield "hello"

    limiter.acquire("everyone")
    with pytest.raises(RateLimitExceeded):
        stream()


async def test_rule_16_an_async_generator_is_refused_when_called_by_a_layer_without_patience(clock: Any) -> None:
    impatient, patient = RateLimiter("1/minute", store=MemoryStore()), RateLimiter("1/minute", store=MemoryStore())

    @rate_limited(impatient, key=everyone)
    @rate_limited(patient, key=everyone, wait=math.inf)
    async def stream() -> AsyncGenerator[str]:
        yield "hello"

    impatient.acquire("everyone")
    with pytest.raises(RateLimitExceeded):
        stream()


def test_rule_6_a_generator_waits_when_called() -> None:
    limiter = RateLimiter("1/minute", store=MemoryStore())

    @rate_limited(limiter, key=everyone, wait=1)
    def stream() -> Generator[str]:
        yield "hello"

    with time_machine.travel(T0, tick=True) as clock:
        assert list(stream()) == ["hello"]
        clock.shift(60 - SOON)
        second = stream()
        assert limiter.peek("everyone").used == 1
        assert list(second) == ["hello"]


# Clocks that stand still


FROZEN: list[Callable[[], Any]] = [
    lambda: freeze_time(T0, real_asyncio=True),
    lambda: freeze_time(T0, tick=True, real_asyncio=True),
    lambda: freeze_time(T0, auto_tick_seconds=0.01, real_asyncio=True),
    lambda: time_machine.travel(T0, tick=False),
    lambda: time_machine.travel(T0, tick=True),
]
frozen = pytest.mark.parametrize(
    "freeze", FROZEN, ids=["freezegun", "freezegun tick", "freezegun auto_tick", "time-machine", "time-machine tick"]
)


@frozen
@pytest.mark.parametrize("asynchronous", [False, True])
@algorithms
async def test_rule_6_time_slept_counts_as_passed_under_a_frozen_clock(
    freeze: Callable[[], Any], asynchronous: bool, limit: Algorithm
) -> None:
    """freezegun stops the event loop's clock too, and so every wait in it, unless it is given `real_asyncio=True`."""
    limiter = RateLimiter(limit, store=MemoryStore())
    with freeze() as clock:
        limiter.acquire("alice", 5)
        clock.move_to(datetime.fromtimestamp(T0.timestamp() + FULL_UNTIL[ALGORITHMS.index(limit)] - SOON, UTC))
        waited = await limiter.acquire_async("alice", wait=1) if asynchronous else limiter.acquire("alice", wait=1)
        assert waited


@pytest.mark.parametrize("freeze", [FROZEN[0], *FROZEN[3:]], ids=["freezegun", "time-machine", "time-machine tick"])
async def test_rule_6_a_whole_line_gets_through_under_a_frozen_clock(freeze: Callable[[], Any]) -> None:
    store = WatchedStore()
    limiter = RateLimiter(TokenBucket("100/second", burst=5), store=store)
    with freeze():
        limiter.acquire("alice", 5)
        waiting = [await start(limiter.acquire_async("alice", cost, wait=math.inf)) for cost in (3, 1, 2)]
        for call in waiting:
            assert await ended(call)
    assert store.admitted == [5, 3, 1, 2]


@frozen
async def test_rule_6_patience_ends_under_a_frozen_clock(freeze: Callable[[], Any]) -> None:
    budget = TokenBudget("5/day", store=MemoryStore())
    with freeze():
        hold = budget.reserve("alice", 5)
        with pytest.raises(TokenBudgetExceeded):
            await budget.charge_async("alice", 1, wait=SOON)
        with pytest.raises(TokenBudgetExceeded):
            budget.charge("alice", 1, wait=SOON)
        hold.settle(5)


# Many


async def test_rule_6_five_hundred_waiting_tasks_all_start_and_ask_the_store_only_at_the_head() -> None:
    store = WatchedStore()
    limiter = RateLimiter(SlidingWindow("500/minute"), store=store)
    with time_machine.travel(T0, tick=True) as clock:
        limiter.acquire("alice", 500)
        waiting = [await start(limiter.acquire_async("alice", wait=math.inf)) for _ in range(500)]
        assert store.lines.joined == 500
        clock.shift(60 - SOON)
        limiter.reset("alice")
        await asyncio.wait_for(asyncio.gather(*waiting), 60)
        assert limiter.peek("alice").remaining == 0
    assert not store.lines
    assert store.asked < 1 + 500 + 500 + 100, "once when it arrives, once when it stands at the head"


def test_rule_6_the_work_of_a_line_grows_with_its_length_and_not_with_its_square() -> None:
    async def crowd(size: int) -> None:
        limiter = RateLimiter(CalendarWindow(f"{size}/minute"), store=MemoryStore())
        limiter.acquire("alice", size)
        waiting = [asyncio.ensure_future(limiter.acquire_async("alice", wait=math.inf)) for _ in range(size)]
        await asyncio.sleep(0)
        limiter.reset("alice")
        await asyncio.gather(*waiting)

    def work(size: int) -> int:
        begun = 0

        def profile(frame: Any, event: str, _: object) -> None:
            nonlocal begun
            if event == "call" and "/quotalimit/" in frame.f_code.co_filename:
                begun += 1

        sys.setprofile(profile)
        try:
            asyncio.run(crowd(size))
        finally:
            sys.setprofile(None)
        return begun

    with time_machine.travel(T0, tick=False):
        work(10)
        assert work(400) < 6 * work(100)


# Nested calls


@pytest.mark.parametrize("inner", [5, 8, 10])
async def test_rule_12_a_nested_call_does_not_wait_for_its_own_parent(clock: Any, inner: int) -> None:
    budget = TokenBudget("10/day", store=MemoryStore())

    @token_budget(budget, key=everyone, reserve=inner, usage=lambda _: 1, wait=math.inf)
    def child() -> str:
        return "done"

    @token_budget(budget, key=everyone, reserve=8, usage=lambda _: 2, wait=math.inf)
    def parent() -> str:
        return child()

    @token_budget(budget, key=everyone, reserve=inner, usage=lambda _: 1, wait=math.inf)
    async def child_async() -> str:
        return "done"

    @token_budget(budget, key=everyone, reserve=8, usage=lambda _: 2, wait=math.inf)
    async def parent_async() -> str:
        return await child_async()

    assert parent() == "done"
    budget.reset("everyone")
    assert await asyncio.wait_for(parent_async(), 10) == "done"
    assert budget.peek("everyone").used == 3
    assert budget.bound().places[0][0].open == {}


async def test_rule_12_a_nested_call_within_its_parents_hold_does_not_queue_behind_a_call_that_waits_for_the_parent(
    clock: Any,
) -> None:
    store = WatchedStore()
    budget = TokenBudget(SlidingWindow("10/day"), store=store)
    strangers: list[asyncio.Task[Any]] = []

    @token_budget(budget, key=everyone, reserve=8, usage=lambda _: 1, wait=math.inf)
    async def child() -> None: ...

    @token_budget(budget, key=everyone, reserve=8, usage=lambda _: 2, wait=math.inf)
    async def parent() -> None:
        strangers.append(await start(budget.charge_async("everyone", 7, wait=math.inf)))
        assert store.lines
        clock.shift(1)  # a charge of now would still count when the stranger's time comes
        await child()

    await asyncio.wait_for(parent(), 10)
    assert await ended(strangers[0])
    assert not store.lines


async def test_rule_12_only_the_rest_that_a_nested_call_asks_for_can_delay_the_head(clock: Any) -> None:
    """The child borrows 8 of its 9; the one that it takes leaves room for the 9 of the stranger, a day from then."""
    budget = TokenBudget(SlidingWindow("10/day"), store=MemoryStore())

    @token_budget(budget, key=everyone, reserve=9, usage=lambda _: 1)
    async def child() -> str:
        return "done"

    @token_budget(budget, key=everyone, reserve=8, usage=lambda _: 2)
    async def parent() -> str:
        stranger = await start(budget.charge_async("everyone", 9, wait=math.inf))
        assert not stranger.done()
        clock.shift(1)
        try:
            return await child()
        finally:
            await stop(stranger)

    assert await parent() == "done"


async def test_rule_6_a_call_that_waits_for_one_store_takes_nothing_on_another(clock: Any) -> None:
    first, second = MemoryStore(), MemoryStore()
    free = RateLimiter("5/day", store=first)
    full = RateLimiter("1/day", store=second)

    @rate_limited(free, key=everyone)
    @rate_limited(full, key=everyone, wait=math.inf)
    async def chat() -> str:
        return "done"

    full.acquire("everyone")
    call = await start(chat())
    assert free.peek("everyone").used == 0
    full.reset("everyone")
    assert await call == "done"
    assert (free.peek("everyone").used, full.peek("everyone").used) == (1, 1)
    assert open_holds(free, "everyone") == 0


async def test_rule_6_two_calls_that_ask_two_stores_in_different_orders_do_not_wait_for_each_other(clock: Any) -> None:
    one = RateLimiter("1/day", store=MemoryStore())
    other = RateLimiter("1/day", store=MemoryStore())

    @rate_limited(one, key=everyone, wait=math.inf)
    @rate_limited(other, key=everyone, wait=math.inf)
    async def there() -> str:
        return "there"

    @rate_limited(other, key=everyone, wait=math.inf)
    @rate_limited(one, key=everyone, wait=math.inf)
    async def back() -> str:
        return "back"

    one.acquire("everyone")
    other.acquire("everyone")
    first, second = await start(there()), await start(back())
    one.reset("everyone"), other.reset("everyone")
    assert await first == "there"
    one.reset("everyone"), other.reset("everyone")
    assert await second == "back"


def test_rule_6_a_call_that_is_interrupted_as_it_joins_its_line_leaves_it(clock: Any) -> None:
    limiter = RateLimiter("1/minute")
    limiter.acquire("alice")
    really_join = Lines.join

    def join(lines: Lines, waiter: Waiter) -> None:
        really_join(lines, waiter)
        raise KeyboardInterrupt

    with patch.object(Lines, "join", join), pytest.raises(KeyboardInterrupt):
        limiter.acquire("alice", wait=90)
    clock.shift(60)
    assert not limiter.bound().store.lines
    assert limiter.allow("alice")


def test_rule_11_a_call_that_waited_on_a_closed_loop_may_be_collected_in_another_ones_turn() -> None:
    """It was taken out of its line as dead; its own end, wherever it comes, has nothing left to take a lock for."""
    limiter = RateLimiter("1/hour")
    limiter.acquire("alice")
    loop = asyncio.new_event_loop()
    task = loop.create_task(limiter.acquire_async("alice", wait=math.inf))
    loop.run_until_complete(asyncio.sleep(0.001))
    lines = limiter.bound().store.lines
    ((_, line),) = lines.standing.items()
    (waiter,) = line.waiters
    loop.close()
    limiter.allow("alice")
    assert not lines
    left = threading.Thread(target=lines.leave, args=(waiter,), daemon=True)
    with lines._lock:
        left.start()
        left.join(5)
        assert not left.is_alive(), "it waits for the lock"
    task.get_coro().close()  # type: ignore[union-attr]
    task._log_destroy_pending = False  # type: ignore[attr-defined]


# Loops that block, or come to rest


async def test_rule_6_a_call_that_blocks_the_loop_does_not_wait_for_its_tasks() -> None:
    limiter = RateLimiter("1/second")
    limiter.acquire("alice")
    task = await start(limiter.acquire_async("alice", wait=math.inf))
    began = time.monotonic()
    limiter.acquire("alice", wait=30)
    assert time.monotonic() - began < 10
    flow, _, _ = flow_of(limiter, FOREVER)
    assert isinstance(next(flow), Sleep)  # behind the task, which can start again
    flow.close()
    await ended(task)


async def test_rule_6_nobody_waits_for_tasks_of_a_loop_that_a_call_blocks() -> None:
    """Not even those that stand between the two: the first of them would wait for the last, and that for them."""
    limiter = RateLimiter("1/second")
    limiter.acquire("alice")
    task = await start(limiter.acquire_async("alice", wait=math.inf))
    with ThreadPoolExecutor() as threads:
        between = threads.submit(limiter.acquire, "alice", 1, 30)
        while len(line_of(limiter).waiters) < 2:
            await asyncio.sleep(0)
        began = time.monotonic()
        limiter.acquire("alice", wait=30)
        assert time.monotonic() - began < 10
        await ended(asyncio.wrap_future(between))
    await ended(task)
    assert not limiter.bound().store.lines


def test_rule_6_a_task_whose_loop_rests_keeps_its_place_and_holds_up_nobody(clock: Any) -> None:
    limiter = RateLimiter("1/minute")
    limiter.acquire("alice")
    loop = asyncio.new_event_loop()
    task = loop.create_task(limiter.acquire_async("alice", wait=math.inf))
    loop.run_until_complete(asyncio.sleep(0.001))
    clock.shift(60)
    assert limiter.peek("alice")
    assert limiter.allow("alice")
    flow, _, _ = flow_of(limiter, FOREVER)
    assert isinstance(next(flow), Ask)  # as the head that it is while nobody before it can start
    with patch.object(Alarm, "ring") as ring:
        limiter.reset("alice")
    assert ring.called
    flow.close()
    clock.shift(60)
    assert loop.run_until_complete(asyncio.wait_for(task, 10))
    assert not limiter.bound().store.lines
    loop.close()


@pytest.mark.parametrize(("patience", "looks_in"), [(FOREVER, 1_000_000), (600_000, 600_000)])
async def test_rule_6_a_call_behind_a_task_of_another_loop_looks_whether_that_still_runs(
    clock: Any, patience: int, looks_in: int
) -> None:
    limiter = RateLimiter("1/hour")
    limiter.acquire("alice")
    task = await start(limiter.acquire_async("alice", wait=math.inf))
    clock.shift(3_599.5)
    flow, _, _ = flow_of(limiter, patience)
    slept = next(flow)
    assert isinstance(slept, Sleep)
    assert slept.microseconds == looks_in
    flow.close()
    task.cancel()


# The flow by itself, driven by hand: what it asks, and for how long it sleeps


class Alarm:
    """A bell that nobody hears."""

    loop = blocks = None

    def ring(self) -> None: ...


def line_of(limiter: RateLimiter) -> Line:
    """The only line."""
    (line,) = limiter.bound().store.lines.standing.values()
    return line


def flow_of(limiter: RateLimiter, patience: int) -> tuple[Flow, MemoryStore, list[Claim]]:
    """The flow of a refused call, its store and what it asks for."""
    store = limiter.bound().store
    assert isinstance(store, MemoryStore)
    counts, limit = limiter.bound().places[0]
    claims = [Claim(counts, "alice", limit, 1, 1, False)]
    claims[0].patience = patience
    store.lines.announce(claims)
    return wait_for_room(store.lines, claims, store.acquire(claims), Alarm()), store, claims


def test_rule_19_what_was_slept_under_a_frozen_clock_is_forgotten_when_it_steps_back(clock: Any) -> None:
    limiter = RateLimiter("1/minute")
    limiter.acquire("alice")
    flow, store, claims = flow_of(limiter, FOREVER)
    asked = next(flow)
    for expected in (0, 60_000_000):
        assert isinstance(asked, Ask)
        assert asked.not_before == (expected and round(T0.timestamp() * 1e6) + expected)
        slept = flow.send(store.acquire(claims))
        assert isinstance(slept, Sleep)
        assert slept.microseconds == 60_000_000
        if expected:
            clock.shift(-10)
        asked = flow.send(False)
    assert isinstance(asked, Ask)
    assert asked.not_before == 0
    flow.close()
    assert not store.lines


def test_a_step_back_of_the_clock_that_is_shorter_than_the_sleep_gives_a_call_no_more_patience(clock: Any) -> None:
    limiter = RateLimiter("1/minute")
    limiter.acquire("alice")
    flow, store, claims = flow_of(limiter, 61_000_000)
    assert isinstance(next(flow), Ask)
    slept = flow.send(store.acquire(claims))
    assert isinstance(slept, Sleep)
    clock.shift(slept.microseconds / 1e6 - 40)  # the whole sleep has passed, and somebody put the clock back meanwhile
    assert isinstance(flow.send(False), Ask)
    with pytest.raises(StopIteration) as ended:  # 40 seconds more than it would wait
        flow.send(store.acquire(claims))
    assert ended.value.value.refusals
    assert claims[0].waited == 60_000_000


def test_peek_stands_in_line_as_a_call_would(clock: Any) -> None:
    limiter = RateLimiter("2/minute")
    limiter.acquire("alice")
    clock.shift(1)
    store = limiter.bound().store
    ((counts, limit),) = limiter.bound().places
    claim = Claim(counts, "alice", limit, 2, 2, False)
    claim.patience = FOREVER
    head = wait_for_room(store.lines, [claim], store.acquire([claim]), Alarm())
    next(head)
    clock.shift(30)
    assert not limiter.peek("alice")
    assert not limiter.allow("alice")
    head.close()
    assert limiter.peek("alice")
    assert limiter.allow("alice")


def test_rule_6_a_call_that_is_not_the_first_asks_once_when_its_patience_ends(clock: Any) -> None:
    limiter = RateLimiter("1/minute")
    limiter.acquire("alice")
    head, store, _ = flow_of(limiter, FOREVER)
    next(head)
    flow, _, claims = flow_of(limiter, 70_000_000)
    for shift, rest in ((20, 70), (30, 50), (20, 20)):
        slept = next(flow) if rest == 70 else flow.send(True)
        assert isinstance(slept, Sleep)
        assert slept.microseconds == rest * 1_000_000
        clock.shift(shift)
    assert isinstance(flow.send(True), Ask)
    with pytest.raises(StopIteration) as ended:
        flow.send(store.acquire(claims))
    assert claims[0].waited == 70_000_000
    assert list(ended.value.value.refusals) == [0]
    head.close()


def test_rule_6_a_call_that_comes_to_the_head_sleeps_until_its_own_time(clock: Any) -> None:
    """The unit of T0 + 70 is the head's no longer."""
    limiter = RateLimiter("2/minute")
    limiter.acquire("alice")
    clock.shift(10)
    limiter.acquire("alice")
    head, store, _ = flow_of(limiter, FOREVER)
    next(head)
    flow, _, claims = flow_of(limiter, FOREVER)
    assert isinstance(next(flow), Sleep)
    head.close()
    assert isinstance(flow.send(True), Ask)
    slept = flow.send(store.acquire(claims))
    assert isinstance(slept, Sleep)
    assert slept.microseconds == 50_000_000
    flow.close()


def test_the_time_that_a_store_takes_to_answer_is_time_waited(clock: Any) -> None:
    limiter = RateLimiter("1/minute")
    limiter.acquire("alice")
    flow, store, claims = flow_of(limiter, 60_000_000)
    assert isinstance(next(flow), Ask)
    clock.shift(20)
    slept = flow.send(store.acquire(claims))
    assert isinstance(slept, Sleep)
    assert slept.microseconds == 40_000_000
    clock.shift(40)
    assert isinstance(flow.send(False), Ask)
    with pytest.raises(StopIteration) as ended:
        flow.send(store.acquire(claims))
    assert not ended.value.value.refusals
    assert claims[0].waited == 60_000_000


def test_rule_6_a_call_whose_patience_ends_in_line_is_told_when_there_is_room_for_those_ahead_and_itself(
    clock: Any,
) -> None:
    """Four units were to come back at T0 + 60, 70, 80 and 90, but another process took the first of them."""
    limiter = RateLimiter("4/minute")
    for _ in range(4):
        limiter.acquire("alice")
        clock.shift(10)
    head, store, others = flow_of(limiter, FOREVER)
    next(head)
    flow, _, claims = flow_of(limiter, 30_000_000)
    assert isinstance(next(flow), Sleep)
    clock.shift(20)
    assert not store.acquire(others).refusals
    clock.shift(10)
    assert isinstance(flow.send(False), Ask)
    with pytest.raises(StopIteration) as ended:
        flow.send(store.acquire(claims))
    assert ended.value.value.refusals[0].retry_after == 10
    head.close()
