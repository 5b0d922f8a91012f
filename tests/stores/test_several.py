"""Rule 2 for a function whose layers are on several stores: in order, giving back what was taken."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import time_machine

from quotalimit import (
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    SQLiteStore,
    StoreUnavailable,
    TokenBudget,
    collect_decisions,
    on_event,
    rate_limited,
    token_budget,
)
from quotalimit.stores.base import Answer, Claim
from quotalimit.stores.several import Several
from tests.helpers import open_holds, reply, used

pytestmark = pytest.mark.usefixtures("time")


class Down(MemoryStore):
    """A store that cannot answer."""

    def acquire(self, claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        raise StoreUnavailable("down")


def limiters(*limits: str) -> list[RateLimiter]:
    """Limiters on a store each, the outermost first."""
    return [RateLimiter(limit, name=f"{limit} {n}", store=MemoryStore()) for n, limit in enumerate(limits)]


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Make a function with these layers, sync or async, and call it."""

    def one(*layers: Any) -> Any:
        def chat(user: str) -> Any:
            return reply(7)

        async def chat_async(user: str) -> Any:
            return reply(7)

        function: Any = chat if request.param == "sync" else chat_async
        for layer in reversed(layers):
            budget = isinstance(layer, TokenBudget)
            decorate = token_budget(layer, key="user", reserve=20) if budget else rate_limited(layer, key="user")
            function = decorate(function)
        answer = function("alice")
        return asyncio.run(wait_for(answer)) if inspect.isawaitable(answer) else answer

    return one


async def wait_for(answer: Any) -> Any:
    return await answer


def test_rule_2_stores_that_admit_are_all_charged_and_those_before_a_refusal_are_not(call: Callable[..., Any]) -> None:
    layers = limiters("2/day", "9/day", "1/day")
    budget = TokenBudget("90/day", store=layers[1].bound().store)
    call(*layers, budget)
    assert [used(layer) for layer in layers] == [1, 1, 1]
    assert used(budget) == 7
    with pytest.raises(RateLimitExceeded) as refused:
        call(*layers, budget)
    assert refused.value.name == "1/day 2"
    assert [used(layer) for layer in layers] == [1, 1, 1]
    assert (used(budget), open_holds(budget)) == (7, 0)
    assert [open_holds(layer) for layer in layers] == [0, 0, 0]


def test_rule_2_stores_after_a_refusal_are_not_asked(call: Callable[..., Any]) -> None:
    first, second = limiters("1/day", "9/day")
    first.acquire("alice")
    with pytest.raises(RateLimitExceeded) as refused:
        call(first, second)
    assert refused.value.name == first.name
    assert (used(first), used(second)) == (1, 0)


def test_rule_4_the_refusal_of_a_later_store_is_that_of_its_layer(call: Callable[..., Any]) -> None:
    outer, inner = limiters("9/day", "9/day")
    budget = TokenBudget("90/day", store=outer.bound().store)
    last = RateLimiter("1/hour", name="last", store=inner.bound().store)
    last.acquire("alice")
    with pytest.raises(RateLimitExceeded) as refused:
        call(budget, inner, last)
    assert refused.value.name == "last"


def test_rule_2_what_was_taken_is_given_back_if_a_later_store_cannot_answer(call: Callable[..., Any]) -> None:
    (first,) = limiters("9/day")
    budget = TokenBudget("90/day", store=first.bound().store)
    with pytest.raises(StoreUnavailable):
        call(first, budget, RateLimiter("9/day", store=Down()))
    assert (used(first), used(budget), open_holds(first), open_holds(budget)) == (0, 0, 0, 0)


def test_decisions_are_those_of_all_stores(call: Callable[..., Any]) -> None:
    layers = limiters("9/day", "8/day", "7/day")
    with collect_decisions() as seen:
        call(*layers)
    assert [decision.limit.amount for decision in seen] == [9, 8, 7]


def test_rule_11_a_listener_that_interrupts_an_admission_leaves_no_hold(call: Callable[..., Any]) -> None:
    first, last = limiters("9/day", "9/day")
    budgets = [TokenBudget("90/day", store=layer.bound().store) for layer in (first, last)]

    def interrupt(event: object) -> None:
        raise KeyboardInterrupt

    stop = on_event(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            call(first, *budgets, last)
    finally:
        stop()
    assert [used(budget) for budget in budgets] == [0, 0]
    assert [open_holds(budget) for budget in budgets] == [0, 0]


def claims_on(*limiters: RateLimiter) -> Several:
    """A call of these limiters, each of which holds what it takes."""
    turns = []
    for limiter in limiters:
        binding = limiter.bound()
        counts, limit = binding.places[0]
        turns.append((binding.store, [Claim(counts, "alice", limit, 1, 1, True)]))
    return Several(turns)


def test_a_refusal_has_neither_charges_nor_decisions() -> None:
    first, last = limiters("9/day", "1/day")
    last.acquire("alice")
    answer = claims_on(first, last).acquire([], report=True)
    assert (list(answer.refusals), answer.charges, answer.decisions) == ([1], [], [])


async def test_rule_2_the_claims_themselves_give_back_what_was_taken_if_a_later_store_cannot_answer() -> None:
    (first,) = limiters("9/day")
    several = claims_on(first, RateLimiter("9/day", store=Down()))
    with pytest.raises(StoreUnavailable):
        several.acquire([])
    assert used(first) == 0
    with pytest.raises(StoreUnavailable):
        await several.acquire_async([])
    assert (used(first), open_holds(first)) == (0, 0)


def test_each_store_settles_its_own_charges(tmp_path: Path) -> None:
    (first,) = limiters("9/day")
    store = SQLiteStore(tmp_path / "counts.db")
    second = RateLimiter("9/day", name="second", store=store)
    several = claims_on(first, second)
    answer = several.acquire([])
    assert (used(first), used(second)) == (1, 1)
    several.settle([(charge, 0) for charge in answer.charges])
    assert (used(first), used(second)) == (0, 0)
    store.close()


async def test_rule_6_a_newcomer_goes_before_a_head_that_another_store_keeps_waiting(
    time: time_machine.Traveller,
) -> None:
    """The head starts in 61 seconds, when the newcomer's unit has come back; in 59 it would not have."""
    for period, goes_first in ((61, True), (59, False)):
        by_ip, by_user = limiters("1/minute", f"1/{period} seconds")

        @rate_limited(by_ip, key="user", wait=math.inf)
        @rate_limited(by_user, key="user", wait=math.inf)
        async def chat(user: str) -> None: ...

        by_user.acquire("alice")
        head = asyncio.ensure_future(chat("alice"))
        while not by_ip.bound().store.lines:
            await asyncio.sleep(0)
        assert by_ip.allow("alice") == goes_first
        head.cancel()
        await asyncio.gather(head, return_exceptions=True)


@pytest.mark.parametrize("blocking", [False, True], ids=["memory", "and a file"])
async def test_rule_16_an_async_generator_is_refused_when_called_unless_a_store_waits_for_files(
    blocking: bool, tmp_path: Path
) -> None:
    store = SQLiteStore(tmp_path / "counts.db") if blocking else MemoryStore()
    (outer,) = limiters("1/day")

    @rate_limited(outer, key="user")
    @rate_limited("9/day", key="user", store=store, name="inner")
    async def stream(user: str) -> AsyncIterator[str]:
        yield user

    outer.acquire("alice")
    if blocking:
        items = stream("alice")
        with pytest.raises(RateLimitExceeded):
            await anext(items)
    else:
        with pytest.raises(RateLimitExceeded):
            stream("alice")
    if isinstance(store, SQLiteStore):
        store.close()
