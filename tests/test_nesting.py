"""Rule 12: nested calls draw from the enclosing hold, and what they used is charged once."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from weakref import WeakSet, ref

import pytest
import time_machine
from hypothesis import given, settings
from hypothesis import strategies as st

from quotalimit import (
    RateLimitExceeded,
    Settlement,
    SlidingWindow,
    SQLiteStore,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    Usage,
    collect_decisions,
    rate_limited,
    record_usage,
    token_budget,
)
from quotalimit._calls import Call

from .helpers import open_holds, reply, used


@pytest.fixture(autouse=True)
def time() -> Iterator[time_machine.Traveller]:
    """A clock that stands still until it is moved."""
    with time_machine.travel(datetime(2026, 11, 23, 12, tzinfo=UTC), tick=False) as traveller:
        yield traveller


@pytest.fixture
def budget() -> TokenBudget:
    return TokenBudget("100/day", name="tokens")


def call(
    budget: TokenBudget, body: Callable[[], object], *, reserve: int | None = None, key: str = "alice", **options: Any
) -> Any:
    """Call a function that is guarded by a budget."""

    @token_budget(budget, key="user", reserve=reserve, **options)
    def guarded(user: str) -> object:
        return body()

    return guarded(key)


# Drawing from the enclosing hold.


@pytest.mark.parametrize("limit", ["100/day", SlidingWindow("100/hour"), TokenBucket("100/hour")])
def test_rule_12_a_nested_call_takes_its_need_from_the_enclosing_hold(limit: Any) -> None:
    budget = TokenBudget(limit)
    seen = []

    def inner() -> object:
        seen.append(used(budget))
        return reply(30)

    def outer() -> object:
        call(budget, inner, reserve=100)
        seen.append(used(budget))
        return None

    call(budget, outer, reserve=100)
    assert seen == [100, 100]
    assert used(budget) == 30
    assert open_holds(budget) == 0


def test_rule_12_a_nested_call_asks_only_for_what_the_enclosing_hold_lacks(budget: TokenBudget) -> None:
    seen = []

    def inner() -> object:
        seen.append(used(budget))
        with pytest.raises(TokenBudgetExceeded):
            budget.charge("alice", 21)
        return reply(70)

    def outer() -> object:
        with pytest.raises(TokenBudgetExceeded) as refused:
            call(budget, inner, reserve=101)
        assert refused.value.requested == 101
        call(budget, inner, reserve=80)
        seen.append(used(budget))

    call(budget, outer, reserve=60)
    # 60 held outside and 20 more asked for inside, of which 70 are used; the other 10 may go back to either
    assert seen[0] == 80
    assert 70 <= seen[1] <= 80
    assert used(budget) == 70


def test_rule_12_what_a_nested_call_does_not_use_goes_back_to_the_enclosing_hold(budget: TokenBudget) -> None:
    seen = []

    def outer() -> None:
        for tokens in (30, 30, 30):
            call(budget, lambda tokens=tokens: reply(tokens), reserve=40)
            seen.append(used(budget))

    call(budget, outer, reserve=100)
    assert seen == [100, 100, 100]  # 30 used, 70 held; 60 used, 40 held; 90 used, 10 held
    assert used(budget) == 90


def test_rule_12_a_nested_call_without_a_reserve_needs_one_unit_of_the_enclosing_hold(budget: TokenBudget) -> None:
    call(budget, lambda: call(budget, lambda: reply(30)), reserve=100)
    assert used(budget) == 30
    budget.charge("alice", 70)
    with pytest.raises(TokenBudgetExceeded):
        call(budget, lambda: call(budget, lambda: reply(30)), reserve=0)


def test_rule_12_units_of_the_hold_that_are_lent_out_are_not_lent_twice(budget: TokenBudget) -> None:
    def outer() -> None:
        in_flight = budget.reserve("alice", 60)
        with pytest.raises(TokenBudgetExceeded) as refused:
            budget.reserve("alice", 41)
        assert refused.value.reason == "busy"
        in_flight.settle(10)
        budget.reserve("alice", 90).settle(15)

    call(budget, outer, reserve=100)
    assert used(budget) == 25
    assert open_holds(budget) == 0


@pytest.mark.parametrize("reserve", [30, 60])
def test_rule_12_a_nested_call_within_its_parents_hold_is_admitted_though_the_budget_is_in_debt(
    budget: TokenBudget, reserve: int
) -> None:
    other = budget.reserve("alice", 40)

    def outer() -> None:
        other.settle(150)
        with pytest.raises(TokenBudgetExceeded):
            call(budget, lambda: None, reserve=61)
        assert call(budget, lambda: reply(25), reserve=reserve) is not None
        assert used(budget) == 210

    call(budget, outer, reserve=60)
    assert used(budget) == 175


def test_rule_9_what_a_nested_call_uses_above_its_hold_is_charged_beside_its_parents_hold(budget: TokenBudget) -> None:
    def outer() -> None:
        call(budget, lambda: reply(60), reserve=40)
        assert used(budget) == 120
        call(budget, lambda: reply(5), reserve=60)
        assert used(budget) == 120

    call(budget, outer, reserve=100)
    assert used(budget) == 65


def test_rule_9_a_single_unit_above_what_a_nested_call_drew_is_charged_when_it_ends(budget: TokenBudget) -> None:
    def outer() -> None:
        call(budget, lambda: reply(41), reserve=40)
        assert used(budget) == 101

    call(budget, outer, reserve=100)
    assert used(budget) == 41


def test_rule_12_a_hold_that_outlives_the_one_it_was_drawn_from_still_makes_the_budget_busy(
    budget: TokenBudget,
) -> None:
    with budget.reserve("alice", 100) as outer:
        drawn = budget.reserve("alice", 60)
        outer.settle(0)
    assert used(budget) == 60
    with pytest.raises(TokenBudgetExceeded) as refused:
        budget.reserve("alice", 41)
    assert refused.value.reason == "busy"
    drawn.settle(60)
    with pytest.raises(TokenBudgetExceeded) as refused:
        budget.reserve("alice", 41)
    assert refused.value.reason == "exhausted"


def test_rule_12_units_come_back_to_each_lender_once_whoever_ends_first(budget: TokenBudget) -> None:
    with budget.reserve("alice", 40) as outer:
        with budget.reserve("alice", 60) as middle:  # 40 of the outer hold, and 20 more
            inner = budget.reserve("alice", 50)
            assert used(budget) == 60
            middle.settle(0)
        assert used(budget) == 60
        inner.settle(0)
        assert used(budget) == 40
        outer.settle(7)
    assert used(budget) == 7
    assert open_holds(budget) == 0


def test_rule_12_what_a_lender_has_got_back_does_not_come_back_to_it_again(budget: TokenBudget) -> None:
    with budget.reserve("alice", 5) as outer:
        with budget.reserve("alice", 7) as middle:  # the 5 of the outer hold, and 2 more
            inner = budget.reserve("alice", 1)
            middle.settle(0)
        assert used(budget) == 6
        inner.settle(0)
        assert used(budget) == 5
        outer.settle(0)
    assert used(budget) == 0


@pytest.mark.parametrize("ends", ["settled", "reset"])
def test_rule_12_a_nested_call_that_waited_while_its_parent_ended_draws_nothing_from_it(
    budget: TokenBudget, ends: str
) -> None:
    lines, holds = budget.bound().store.lines, []
    other = budget.reserve("alice", 50)
    with budget.reserve("alice", 10) as outermost, budget.reserve("alice", 50) as outer:
        waits = contextvars.copy_context()
        thread = threading.Thread(
            target=waits.run, args=(lambda: holds.append(budget.reserve("alice", 80, wait=math.inf)),)
        )
        thread.start()
        while not lines:
            threading.Event().wait(0.001)
        if ends == "settled":
            outer.settle(0)
            other.settle(0)
        else:
            budget.reset("alice")
        thread.join()
        assert used(budget) == 80  # 10 of them drawn from the outermost hold, if that is still open
        outermost.settle(0)
        holds[0].settle(0)
    assert used(budget) == 0


def test_rule_12_one_call_with_two_claims_on_the_same_count_does_not_draw_the_same_units_twice(
    budget: TokenBudget,
) -> None:
    @token_budget(budget, key="user", reserve=60)
    @token_budget(budget, key="team", reserve=60)
    def twice(user: str, team: str) -> object:
        return reply(0)

    def outer() -> None:
        with pytest.raises(TokenBudgetExceeded):
            twice("alice", "alice")
        assert used(budget) == 60

    call(budget, outer, reserve=60)
    twice("bob", "red")


# What travels up, and what does not.


def test_rule_12_what_a_nested_call_used_is_charged_once(budget: TokenBudget) -> None:
    response = reply(30)
    assert call(budget, lambda: call(budget, lambda: response)) is response
    assert used(budget) == 30


def test_rule_12_the_outer_call_is_charged_what_it_used_beside_its_nested_calls(budget: TokenBudget) -> None:
    def outer() -> object:
        call(budget, lambda: reply(20))
        record_usage(4)
        return reply(5)

    with collect_decisions() as seen:
        call(budget, outer)
    assert used(budget) == 29
    assert [decision.settlement for decision in seen] == [
        Settlement("tokens", 29, 9, 0, "reported"),
        Settlement("tokens", 20, 20, 0, "reported"),
    ]


def test_rule_12_a_nested_call_of_unknown_usage_travels_up_as_it_was_charged(budget: TokenBudget) -> None:
    call(budget, lambda: call(budget, lambda: None, reserve=15), reserve=50)
    assert used(budget) == 15
    call(budget, lambda: call(budget, lambda: "abcd" * 2, key="alice"))
    assert used(budget) == 15 + 4  # estimated: "alice" and eight bytes are 13 bytes


def test_rule_12_a_nested_call_that_used_nothing_makes_the_outer_usage_known(budget: TokenBudget) -> None:
    call(budget, lambda: call(budget, lambda: Usage(), reserve=15) and None, reserve=50)
    assert used(budget) == 0


def test_rule_11_a_stream_that_is_read_again_after_it_failed_is_told_to_the_outer_call_once() -> None:
    one, other = TokenBudget("100/day", name="one"), TokenBudget("100/day", name="other")

    class Broken:
        """A stream of an SDK whose connection breaks after an item."""

        items = iter([reply(20)])

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            for item in self.items:
                return item
            raise ConnectionError

    def outer() -> None:
        stream = call(other, Broken)
        assert next(stream) is not None
        for _ in range(3):
            with pytest.raises(ConnectionError):
                next(stream)
            assert used(other) == 20

    call(one, outer)
    assert (used(one), used(other)) == (20, 20)


def test_rule_12_another_key_or_another_budget_is_charged_in_full_on_both_sides() -> None:
    one, other = TokenBudget("100/day", name="one"), TokenBudget("100/day", name="other")
    call(one, lambda: call(one, lambda: reply(30), key="bob", reserve=100), key="alice", reserve=100)
    assert (used(one, "alice"), used(one, "bob")) == (30, 30)
    call(one, lambda: call(other, lambda: reply(30), reserve=100), key="carol", reserve=100)
    assert (used(one, "carol"), used(other, "alice")) == (30, 30)
    assert open_holds(one, "alice", "bob", "carol") == open_holds(other) == 0


def test_rule_12_another_key_or_budget_does_not_draw_from_the_enclosing_hold() -> None:
    one, other = TokenBudget("100/day"), TokenBudget("100/day")
    one.charge("bob", 50)
    other.charge("alice", 50)

    def outer() -> None:
        with pytest.raises(TokenBudgetExceeded):
            call(one, lambda: None, key="bob", reserve=51)
        with pytest.raises(TokenBudgetExceeded):
            call(other, lambda: None, reserve=51)

    call(one, outer, reserve=100)


def test_rule_12_usage_travels_up_through_levels_that_know_other_budgets() -> None:
    one, other = TokenBudget("100/day"), TokenBudget("100/day")

    def middle() -> None:
        call(one, lambda: reply(10), reserve=20)
        record_usage(3)

    call(one, partial(call, other, middle, reserve=30), reserve=50)
    assert (used(one), used(other)) == (13, 13)
    assert open_holds(one) == open_holds(other) == 0


def test_rule_12_a_nested_call_draws_through_levels_in_between(budget: TokenBudget) -> None:
    other = TokenBudget("100/day")
    call(budget, partial(call, other, partial(call, budget, lambda: reply(90), reserve=95)), reserve=100)
    assert (used(budget), used(other)) == (90, 90)


def test_rule_12_each_budget_applies_its_own_weigh() -> None:
    tokens, cents = TokenBudget("1000/day"), TokenBudget("1000/day")
    call(
        cents,
        partial(call, tokens, lambda: reply(20, 5)),
        weigh=lambda usage: usage.input_tokens + 8 * usage.output_tokens,
    )
    assert (used(tokens), used(cents)) == (25, 60)


def test_rule_12_the_inside_is_counted_in_the_units_in_which_it_was_charged(budget: TokenBudget) -> None:
    double = partial(call, budget, weigh=lambda usage: 2 * usage.total_tokens)
    double(lambda: call(budget, lambda: reply(10)))  # 20 in all, of which 10 are charged inside
    assert used(budget) == 20
    call(budget, lambda: double(lambda: reply(10)), key="alice")  # 10 in all, 20 charged inside: never a credit
    assert used(budget) == 40


def test_rule_12_two_budgets_on_both_functions_are_each_charged_once() -> None:
    per_user, per_team = TokenBudget("100/day"), TokenBudget("100/day")

    @token_budget(per_user, key="user", reserve=50)
    @token_budget(per_team, key="team", reserve=50)
    def chat(user: str, team: str, depth: int) -> object:
        if depth:
            chat(user, team, depth - 1)
        return reply(10)

    chat("alice", "red", 3)
    assert (used(per_user), used(per_team, "red")) == (40, 40)
    assert open_holds(per_user) == open_holds(per_team, "red") == 0


def test_rule_12_a_debt_made_inside_is_charged_once(budget: TokenBudget) -> None:
    response = reply(250)
    call(budget, partial(call, budget, lambda: response, reserve=10), reserve=50)
    assert used(budget) == 250


def test_rule_12_usage_of_a_nested_call_that_ends_after_the_outer_is_charged_to_itself(budget: TokenBudget) -> None:
    async def main() -> None:
        release = asyncio.Event()

        @token_budget(budget, key="user", reserve=20)
        async def inner(user: str) -> object:
            await release.wait()
            return reply(15)

        @token_budget(budget, key="user", reserve=50)
        async def outer(user: str) -> tuple[object, asyncio.Task[object]]:
            task = asyncio.create_task(inner(user))
            await asyncio.sleep(0)
            assert record_usage(5)
            return None, task

        _, task = await outer("alice")
        assert used(budget) == 25  # 5 used outside, 20 held inside
        release.set()
        await task

    asyncio.run(main())
    assert used(budget) == 20
    assert open_holds(budget) == 0


# Failures and refusals.


def test_rule_12_a_nested_refusal_releases_the_outer_hold(budget: TokenBudget) -> None:
    other = TokenBudget("10/day")
    with pytest.raises(TokenBudgetExceeded) as refused:
        call(budget, partial(call, other, lambda: None, reserve=11), reserve=50)
    assert refused.value.limit.amount == 10
    assert (used(budget), used(other)) == (0, 0)
    assert open_holds(budget) == open_holds(other) == 0


def test_rule_13_what_was_used_before_a_nested_refusal_stays_charged(budget: TokenBudget) -> None:
    def outer() -> None:
        call(budget, lambda: reply(30), reserve=30)
        call(budget, lambda: None, reserve=71)

    with pytest.raises(TokenBudgetExceeded):
        call(budget, outer, reserve=50)
    assert used(budget) == 30
    assert open_holds(budget) == 0


def test_rule_12_what_a_nested_call_held_goes_back_when_it_raises(budget: TokenBudget) -> None:
    seen = []

    def raising() -> object:
        raise ValueError

    def outer() -> object:
        for _ in range(3):
            with pytest.raises(ValueError):  # noqa: PT011
                call(budget, raising, reserve=100)
            seen.append(used(budget))
        call(budget, lambda: reply(7), reserve=100)
        return None

    call(budget, outer, reserve=100)
    assert seen == [100] * 3
    assert used(budget) == 7


def test_rule_12_an_exception_that_reports_usage_and_passes_two_levels_is_charged_once(budget: TokenBudget) -> None:
    error = RuntimeError()
    error.completion = reply(30)  # type: ignore[attr-defined]

    def failing() -> object:
        raise error

    with pytest.raises(RuntimeError):
        call(budget, partial(call, budget, failing, reserve=40), reserve=50)
    assert used(budget) == 30


def test_a_reset_inside_a_nested_call_closes_all_open_holds_of_the_key(budget: TokenBudget) -> None:
    def inner() -> object:
        budget.reset("alice")
        return reply(30)

    call(budget, partial(call, budget, inner, reserve=40), reserve=50)
    assert (used(budget), open_holds(budget)) == (0, 0)


# record_usage, holds by hand, rate limits.


def test_record_usage_outside_of_any_budget_does_nothing_and_says_so(budget: TokenBudget) -> None:
    assert record_usage(5) is False
    assert record_usage(reply(5)) is False
    call(budget, lambda: reply(1))
    assert record_usage(5) is False
    assert rate_limited("5/day", key="user")(lambda user: record_usage(5))("alice") is False
    assert rate_limited("5/day", key="user", refund_on=ValueError)(lambda user: record_usage(5))("alice") is False


def test_record_usage_inside_a_rate_limited_call_reports_to_the_budget_around_it(budget: TokenBudget) -> None:
    plain = rate_limited("5/day", key="user")(lambda user: record_usage(5))
    refunding = rate_limited("5/day", key="user", refund_on=ValueError)(lambda user: record_usage(6))
    assert call(budget, lambda: plain("alice")) is True
    assert call(budget, lambda: refunding("alice")) is True
    assert used(budget) == 11


@pytest.mark.parametrize("refund_on", [(), ValueError])
def test_a_nested_call_of_a_rate_limit_is_a_call_of_its_own(refund_on: Any) -> None:
    depths = []

    @rate_limited("3/minute", key="user", refund_on=refund_on)
    def recurse(user: str) -> None:
        depths.append(len(depths) + 1)
        recurse(user)

    with pytest.raises(RateLimitExceeded):
        recurse("alice")
    assert depths == [1, 2, 3]


def test_rule_12_a_decorated_call_inside_a_hold_draws_from_it(budget: TokenBudget) -> None:
    with budget.reserve("alice", 100) as hold:
        call(budget, lambda: reply(30), reserve=80)
        assert used(budget) == 100
        with budget.reserve("alice", 70):
            assert record_usage(10)
        assert used(budget) == 100
    assert used(budget) == 40
    assert hold.settlement == Settlement("tokens", 40, 0, 100, "recorded")


def test_rule_12_a_hold_inside_a_decorated_call_draws_from_it(budget: TokenBudget) -> None:
    def outer() -> None:
        with budget.reserve("alice", 100) as hold:
            hold.settle(reply(30))
        assert used(budget) == 100

    call(budget, outer, reserve=100)
    assert used(budget) == 30


async def test_rule_12_an_async_hold_inside_a_hold_draws_from_it(budget: TokenBudget) -> None:
    async with budget.reserve_async("alice", 100), budget.reserve_async("alice", 90) as inner:
        inner.settle(20)
    assert used(budget) == 20
    assert open_holds(budget) == 0


# Recursion.


def test_rule_12_recursion_neither_asks_for_more_than_it_holds_nor_charges_twice(budget: TokenBudget) -> None:
    @token_budget(budget, key="user", reserve=lambda depth: 10 * (depth + 1))
    def think(user: str, depth: int) -> object:
        assert used(budget) == 100
        return [think(user, depth - 1), record_usage(10)] if depth else reply(10)

    think("alice", 9)
    assert used(budget) == 100
    assert open_holds(budget) == 0


def test_rule_12_an_agent_with_a_tool_loop_is_charged_what_its_model_calls_used(budget: TokenBudget) -> None:
    model = token_budget(budget, key="user", reserve=20)(lambda user, step: reply(5 + step))

    @token_budget(budget, key="user", reserve=30)
    def tool(user: str, step: int) -> str:
        return str(model(user, step))

    @token_budget(budget, key="user", reserve=90)
    def agent(user: str) -> object:
        for step in range(4):
            model(user, step)
            tool(user, step)
        return model(user, 4)

    assert agent("alice").usage.total_tokens == 9
    assert used(budget) == 2 * (5 + 6 + 7 + 8) + 9
    assert open_holds(budget) == 0


# Tasks and threads.


async def test_rule_12_nested_tasks_share_the_enclosing_hold(budget: TokenBudget) -> None:
    all_in = asyncio.Barrier(5)

    @token_budget(budget, key="user", reserve=20)
    async def inner(user: str, tokens: int) -> object:
        await all_in.wait()
        assert used(budget) == 100
        return reply(tokens)

    @token_budget(budget, key="user", reserve=100)
    async def outer(user: str) -> None:
        await asyncio.gather(*(inner(user, tokens) for tokens in (11, 12, 13, 14, 20)))

    await outer("alice")
    assert used(budget) == 70
    assert open_holds(budget) == 0


async def test_rule_12_a_task_beyond_the_enclosing_hold_and_the_limit_is_refused(budget: TokenBudget) -> None:
    @token_budget(budget, key="user", reserve=30)
    async def inner(user: str) -> object:
        await asyncio.sleep(0)
        return reply(30)

    @token_budget(budget, key="user", reserve=80)
    async def outer(user: str) -> list[object]:
        return await asyncio.gather(*(inner(user) for _ in range(5)), return_exceptions=True)

    results = await outer("alice")
    assert [isinstance(result, TokenBudgetExceeded) for result in results] == [False, False, False, True, True]
    assert used(budget) == 90


async def test_rule_12_to_thread_carries_the_enclosing_hold_along(budget: TokenBudget) -> None:
    model = token_budget(budget, key="user", reserve=90)(lambda user: reply(25))

    @token_budget(budget, key="user", reserve=100)
    async def outer(user: str) -> None:
        await asyncio.to_thread(model, user)

    await outer("alice")
    assert used(budget) == 25


def test_rule_12_threads_that_copy_the_context_share_the_enclosing_hold_and_lose_nothing(wide_races: None) -> None:
    budget = TokenBudget("8016/day")
    model = token_budget(budget, key="user", reserve=2)(lambda user: Usage(1))
    all_in = threading.Barrier(8, timeout=30)

    @token_budget(budget, key="user", reserve=8016)  # each of 8 threads asks for 2 and uses 1
    def outer(user: str) -> None:
        def many() -> None:
            all_in.wait()
            for _ in range(1000):
                model(user)

        with ThreadPoolExecutor(8) as pool:
            for thread in [pool.submit(contextvars.copy_context().run, many) for _ in range(8)]:
                thread.result()
        assert used(budget) == 8016

    outer("alice")
    assert used(budget) == 8000
    assert open_holds(budget) == 0


def test_rule_12_a_thread_without_the_context_is_a_call_of_its_own(budget: TokenBudget) -> None:
    model = token_budget(budget, key="user", reserve=50)(lambda user: reply(25))

    def outer() -> None:
        with ThreadPoolExecutor(1) as pool, pytest.raises(TokenBudgetExceeded):
            pool.submit(model, "alice").result()

    call(budget, outer, reserve=60)


# Streams inside and outside.


def test_rule_12_a_generator_outside_lends_to_calls_in_its_body_and_not_to_its_consumer(budget: TokenBudget) -> None:
    @token_budget(budget, key="user", reserve=100)
    def stream(user: str) -> Generator[int]:
        call(budget, lambda: reply(30), reserve=90)
        yield 1
        call(budget, lambda: reply(20), reserve=70)

    for _ in stream("alice"):
        with pytest.raises(TokenBudgetExceeded):
            call(budget, lambda: None, reserve=1)
        call(budget, lambda: reply(5), key="bob")
    assert (used(budget), used(budget, "bob")) == (50, 5)
    assert open_holds(budget) == 0


def test_rule_12_a_generator_inside_draws_from_the_call_that_made_it(budget: TokenBudget) -> None:
    @token_budget(budget, key="user", reserve=90)
    def stream(user: str) -> Generator[object]:
        yield "text"
        yield reply(30)

    call(budget, lambda: len(list(stream("alice"))), reserve=100)
    assert used(budget) == 30
    assert open_holds(budget) == 0


def test_rule_12_a_stream_passed_through_another_is_charged_once(budget: TokenBudget) -> None:
    @token_budget(budget, key="user", reserve=30)
    def inner(user: str) -> Generator[object]:
        yield "text"
        yield reply(20)

    @token_budget(budget, key="user", reserve=50)
    def outer(user: str) -> Generator[object]:
        yield from inner(user)

    assert len(list(outer("alice"))) == 2
    assert used(budget) == 20
    assert open_holds(budget) == 0


def test_rule_12_a_function_that_returns_the_last_chunk_of_a_nested_stream_is_charged_once(budget: TokenBudget) -> None:
    @token_budget(budget, key="user", reserve=30)
    def inner(user: str) -> Generator[object]:
        yield "text"
        yield reply(20)

    call(budget, lambda: list(inner("alice"))[-1], reserve=50)
    assert used(budget) == 20


async def test_rule_12_an_async_stream_passed_through_another_is_charged_once(budget: TokenBudget) -> None:
    @token_budget(budget, key="user", reserve=30)
    async def inner(user: str) -> AsyncGenerator[object]:
        yield "text"
        yield reply(20)

    @token_budget(budget, key="user", reserve=50)
    async def outer(user: str) -> AsyncGenerator[object]:
        async for chunk in inner(user):
            yield chunk

    assert len([chunk async for chunk in outer("alice")]) == 2
    assert used(budget) == 20
    assert open_holds(budget) == 0


async def test_rule_12_async_generators_lend_and_draw(budget: TokenBudget) -> None:
    @token_budget(budget, key="user", reserve=90)
    async def inner(user: str) -> AsyncGenerator[object]:
        yield "text"
        record_usage(30)

    @token_budget(budget, key="user", reserve=100)
    async def outer(user: str) -> AsyncGenerator[object]:
        async for chunk in inner(user):
            yield chunk
        assert used(budget) == 100

    async for _ in outer("alice"):
        with pytest.raises(TokenBudgetExceeded):
            budget.charge("alice", 1)
    assert used(budget) == 30
    assert open_holds(budget) == 0


def test_rule_12_a_generator_that_outlives_the_call_that_made_it_is_charged_by_itself(budget: TokenBudget) -> None:
    @token_budget(budget, key="user", reserve=40)
    def stream(user: str) -> Generator[object]:
        yield "text"
        yield reply(30)

    items = call(budget, lambda: [stream("alice"), record_usage(5)], reserve=50)[0]
    assert used(budget) == 45
    assert len(list(items)) == 2
    assert used(budget) == 35
    assert open_holds(budget) == 0


# Random trees of calls, against a plain model.


@dataclass
class Node:
    """A call: what it uses itself, whose call it is, which shape it has, and the calls that it makes."""

    own: tuple[int, int]
    place: int = 0
    style: int = 0
    raises: bool = False
    slack: int = 0
    children: list[Node] = field(default_factory=list)

    @property
    def subtree(self) -> list[Node]:
        return [self, *(node for child in self.children for node in child.subtree)]


def trees(places: int = 1) -> st.SearchStrategy[Node]:
    tokens = st.tuples(st.integers(0, 9), st.integers(0, 9))

    def node(children: st.SearchStrategy[list[Node]]) -> st.SearchStrategy[Node]:
        return st.builds(
            Node,
            own=tokens,
            place=st.integers(0, places - 1),
            style=st.integers(0, 3),
            raises=st.booleans(),
            slack=st.integers(0, 20),
            children=children,
        )

    return st.recursive(node(st.just([])), lambda nodes: node(st.lists(nodes, max_size=4)), max_leaves=12)


class Failed(Exception):
    """What a call of a tree raises."""


PLACES = [(budget, user) for budget in range(2) for user in ("alice", "bob")]
WEIGHTS: list[Callable[[Usage], int]] = [
    lambda usage: usage.input_tokens + usage.output_tokens,
    lambda usage: usage.input_tokens + 5 * usage.output_tokens,
]


class Runner:
    """Makes the calls of a tree, one after the other or at the same time, and notes which ones ran."""

    def __init__(self, budgets: list[TokenBudget], reserve: Callable[[Node], int | None], check: Callable[[], None]):
        self.ran: list[Node] = []
        self._budgets, self._reserve, self._check = budgets, reserve, check

    def _decorate(self, node: Node, function: Any) -> Any:
        budget = PLACES[node.place][0]
        return token_budget(self._budgets[budget], key="user", reserve=self._reserve(node), weigh=WEIGHTS[budget])(
            function
        )

    def _usage(self, node: Node) -> object:
        """Report what a node used itself, by one of the ways there are."""
        self.ran.append(node)
        self._check()
        response = reply(*node.own)
        if node.style % 2 or node.raises:
            record_usage(response)
        if node.raises:
            raise Failed
        return response

    def run(self, node: Node) -> None:
        """Make the calls one after the other."""
        user = PLACES[node.place][1]

        def function(user: str) -> object:
            for child in node.children:
                self.run(child)
            return self._usage(node)

        def stream(user: str) -> Generator[object]:
            for child in node.children:
                yield "text"
                self.run(child)
            yield self._usage(node)

        try:
            if node.style < 2:
                self._decorate(node, function)(user)
            else:
                list(self._decorate(node, stream)(user))
        except (Failed, TokenBudgetExceeded):
            pass
        self._check()

    async def run_async(self, node: Node) -> None:
        """Make the calls of each node at the same time."""
        user = PLACES[node.place][1]

        async def children() -> None:
            await asyncio.sleep(0)
            await asyncio.gather(*map(self.run_async, node.children))

        async def function(user: str) -> object:
            await children()
            return self._usage(node)

        async def stream(user: str) -> AsyncGenerator[object]:
            yield "text"
            await children()
            yield self._usage(node)

        try:
            if node.style < 2:
                await self._decorate(node, function)(user)
            else:
                async for _ in self._decorate(node, stream)(user):
                    await asyncio.sleep(0)
        except (Failed, TokenBudgetExceeded):
            pass
        self._check()

    def run_whole(self, tree: Node, concurrently: bool) -> None:
        if concurrently:
            asyncio.run(self.run_async(tree))
        else:
            self.run(tree)


@given(tree=trees(), reserves=st.booleans(), concurrently=st.booleans())
@settings(deadline=None, max_examples=150)
def test_rule_12_one_budget_and_key_everywhere_shows_the_sum_of_what_was_used(
    tree: Node, reserves: bool, concurrently: bool
) -> None:
    budget = TokenBudget("1_000_000/day")
    runner = Runner([budget], lambda node: node.slack if reserves else None, lambda: None)
    runner.run_whole(tree, concurrently)
    assert used(budget) == sum(sum(node.own) for node in tree.subtree)
    assert open_holds(budget) == 0


def charges_of(node: Node, totals: dict[int, int]) -> tuple[list[Usage], dict[int, int]]:
    """Rule 12 in plain words: each call is charged what it and its nested calls used, less what they were charged."""
    usages = [Usage(*node.own)]
    inside: dict[int, int] = {}
    for child in node.children:
        below, charged = charges_of(child, totals)
        usages += below
        for place, units in charged.items():
            inside[place] = inside.get(place, 0) + units
    here = max(0, sum(map(WEIGHTS[PLACES[node.place][0]], usages)) - inside.get(node.place, 0))
    inside[node.place] = inside.get(node.place, 0) + here
    totals[node.place] = totals.get(node.place, 0) + here
    return usages, inside


@given(tree=trees(len(PLACES)), reserves=st.booleans(), concurrently=st.booleans())
@settings(deadline=None, max_examples=150)
def test_rule_12_several_budgets_and_keys_are_charged_as_the_plain_model_says(
    tree: Node, reserves: bool, concurrently: bool
) -> None:
    budgets = [TokenBudget("1_000_000/day"), TokenBudget("1_000_000/day")]
    runner = Runner(budgets, lambda node: node.slack if reserves else None, lambda: None)
    runner.run_whole(tree, concurrently)
    totals: dict[int, int] = {}
    charges_of(tree, totals)
    shown = [used(budgets[budget], user) for budget, user in PLACES]
    assert shown == [totals.get(place, 0) for place in range(len(PLACES))]
    assert all(open_holds(budget, "alice", "bob") == 0 for budget in budgets)


@given(forest=st.lists(trees(), min_size=1, max_size=3), limit=st.integers(1, 120), concurrently=st.booleans())
@settings(deadline=None, max_examples=100)
def test_rule_7_if_every_call_uses_at_most_what_it_reserved_the_limit_is_never_passed(
    forest: list[Node], limit: int, concurrently: bool
) -> None:
    budget = TokenBudget(f"{limit}/day")

    def honest(node: Node) -> int:
        return sum(sum(each.own) for each in node.subtree) + node.slack

    def check() -> None:
        assert used(budget) <= limit

    runner = Runner([budget], honest, check)
    for tree in forest:
        runner.run_whole(tree, concurrently)
    assert used(budget) == sum(sum(node.own) for node in runner.ran)
    assert open_holds(budget) == 0


async def test_rule_12_an_async_generator_that_holds_nothing_hides_no_enclosing_call(tmp_path: Path) -> None:
    """On a shared store it is admitted at its first item, and is then no call that usage is recorded for."""
    store = SQLiteStore(tmp_path / "counts.db")
    budget = TokenBudget("1000/day")

    @rate_limited("9/day", key="user", name="inner", store=store)
    async def inner(user: str) -> AsyncGenerator[bool]:
        yield record_usage(10)

    @token_budget(budget, key="user", reserve=500)
    async def outer(user: str) -> list[bool]:
        return [recorded async for recorded in inner(user)]

    assert await outer("alice") == [True]
    assert used(budget) == 10
    store.close()


def test_rule_12_an_end_that_comes_late_and_is_interrupted_is_told_to_the_enclosing_call_once() -> None:
    inner_budget, outer_budget = TokenBudget("1000/day"), TokenBudget("1000/day")

    class Stream:
        def __init__(self) -> None:
            self.items = iter([reply(10)])

        def __iter__(self) -> Stream:
            return self

        def __next__(self) -> Any:
            return next(self.items)

        def close(self) -> None: ...

    @token_budget(inner_budget, key="user", reserve=100)
    def inner(user: str) -> Stream:
        return Stream()

    @token_budget(outer_budget, key="user", reserve=100)
    def outer(user: str) -> None:
        stream = inner(user)
        assert len(list(stream)) == 1
        with patch("quotalimit._calls.Call._end", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            stream.close()
        stream.close()

    outer("alice")
    assert (used(inner_budget), used(outer_budget)) == (10, 10)


# Many calls, nested or one after the other.


async def test_rule_12_calls_nest_as_deep_as_the_functions_do(budget: TokenBudget) -> None:
    @token_budget(budget, key="user", reserve=1)
    async def step(user: str, left: int) -> object:
        if left:
            await asyncio.create_task(step(user, left - 1))
        return Usage()

    await step("alice", 900)
    assert (used(budget), open_holds(budget)) == (0, 0)


@pytest.mark.parametrize("tokens", [0, 5, 10, 15])
async def test_rule_12_calls_that_begin_one_another_lend_on_without_end(tokens: int) -> None:
    budget = TokenBudget("1M/day")
    tasks: list[asyncio.Task[object]] = []

    @token_budget(budget, key="user", reserve=10)
    async def step(user: str, left: int) -> object:
        if left:
            tasks.append(asyncio.create_task(step(user, left - 1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return Usage(tokens)

    tasks.append(asyncio.create_task(step("alice", 1_100)))
    while tasks:
        await tasks.pop(0)
    assert (used(budget), open_holds(budget)) == (1_101 * tokens, 0)


async def test_a_call_that_begins_the_next_one_does_not_outlive_it(budget: TokenBudget) -> None:
    tasks: list[asyncio.Task[object]] = []

    @token_budget(budget, key="user")
    async def step(user: str, left: int) -> object:
        if left:
            tasks.append(asyncio.create_task(step(user, left - 1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return Usage()

    def live_calls() -> int:
        gc.collect()
        return sum(issubclass(type(each), Call) for each in gc.get_objects())

    before, begun = live_calls(), 0
    tasks.append(asyncio.create_task(step("alice", 100)))
    while tasks:
        await tasks.pop(0)
        begun += 1
        if begun % 30 == 0:
            assert live_calls() < before + 10


class Response:
    def __init__(self) -> None:
        self.usage = reply(5).usage


def test_rule_8_an_outer_call_knows_the_responses_of_nested_ones_and_keeps_none_alive(budget: TokenBudget) -> None:
    ask = token_budget(budget, key="user", reserve=10)(lambda user: Response())
    made: list[ref[Response]] = []

    @token_budget(budget, key="user", reserve=100)
    def agent(user: str) -> Any:
        made.extend(ref(ask(user)) for _ in range(10))
        assert [response() for response in made] == [None] * 10
        last = ask(user)
        record_usage(last)
        return last

    agent("alice")
    assert (open_holds(budget), used(budget)) == (0, 55)


# Streams of which an outer call hands only some items on, and budgets that read in their own way.


def gemini(text: str, written: int, **more: str) -> dict[str, Any]:
    usage = {"promptTokenCount": 10, "candidatesTokenCount": written}
    return {"candidates": [{"content": {"parts": [{"text": text}]}}], "usageMetadata": usage, **more}


def langchain(text: str, tokens_in: int, tokens_out: int) -> Any:
    counts = {"input_tokens": tokens_in, "output_tokens": tokens_out, "input_token_details": {}}
    return SimpleNamespace(content=text, usage_metadata=counts)


GEMINI = [gemini("a", 1), gemini("b", 2), gemini("", 500)]
LANGCHAIN = [langchain("a", 100, 0), langchain("b", 0, 20), langchain("", 0, 30)]
ANTHROPIC = [
    {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 100, "output_tokens": 1}}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello there"}},
    {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 500}},
]
NUMBERS = [SimpleNamespace(tokens=3), "a", SimpleNamespace(tokens=4), SimpleNamespace(tokens=5)]


@pytest.mark.parametrize("handed_on", [*range(8), "late", "all at once"], ids=str)
@pytest.mark.parametrize(
    ("items", "tokens"),
    [(GEMINI, 510), (LANGCHAIN, 150), (ANTHROPIC, 600), (NUMBERS, 12)],
    ids=["running totals", "added", "beside", "numbers"],
)
def test_rule_12_of_a_nested_stream_that_is_handed_on_in_part_all_is_charged_once(
    items: list[Any], tokens: int, handed_on: Any
) -> None:
    one, other = TokenBudget("1M/day"), TokenBudget("1M/day")

    options: dict[str, Any] = {"usage": lambda item: getattr(item, "tokens", None)} if items is NUMBERS else {}

    @token_budget(other, key="user", **options)
    def inner(user: str) -> Iterator[Any]:
        yield from items

    @token_budget(one, key="user", **options)
    def outer(user: str) -> Iterator[Any]:
        if handed_on == "late":
            before = None
            for item in inner(user):
                if before is not None:
                    yield before
                before = item
            yield before
        elif handed_on == "all at once":
            yield from list(inner(user))
        else:
            for place, item in enumerate(inner(user)):
                if handed_on >> place & 1:
                    yield item

    list(outer("alice"))
    assert (used(one), used(other)) == (tokens, tokens)


@pytest.mark.parametrize("step", [1, 2, 7])
def test_rule_12_of_a_long_nested_stream_every_item_counts_once_be_it_handed_on_or_not(step: int) -> None:
    one, other = TokenBudget("1M/day"), TokenBudget("1M/day")

    @token_budget(other, key="user")
    def inner(user: str) -> Iterator[Any]:
        for _ in range(1_500):
            yield langchain("a", 0, 1)

    @token_budget(one, key="user")
    def outer(user: str) -> Iterator[Any]:
        for place, item in enumerate(inner(user)):
            if place % step == 0:
                yield item

    for _ in outer("alice"):
        pass
    assert (used(one), used(other)) == (1_500, 1_500)


def test_rule_8_a_response_that_two_nested_calls_recorded_counts_once(budget: TokenBudget) -> None:
    shared = reply(30)
    inside = TokenBudget("100/day")
    ask = token_budget(inside, key="user")(lambda user: record_usage(shared))
    call(budget, lambda: [ask("alice"), ask("alice")])
    assert (used(inside), used(budget)) == (60, 30)


@pytest.mark.parametrize("recorded", [True, False])
def test_rule_8_responses_that_settled_a_hold_inside_count_once(budget: TokenBudget, recorded: bool) -> None:
    inside = TokenBudget("100/day")

    def body() -> object:
        responses = [reply(20), reply(10)]
        hold = inside.reserve("alice", 50)
        if recorded:
            record_usage(responses)
        hold.settle(responses)
        return None if recorded else responses

    call(budget, body)
    assert (used(inside), used(budget)) == (30, 30)


def test_a_long_nested_stream_keeps_few_of_its_items_alive(budget: TokenBudget) -> None:
    made: WeakSet[Response] = WeakSet()

    @token_budget(budget, key="user")
    def inner(user: str) -> Iterator[Response]:
        for _ in range(300):
            item = Response()
            made.add(item)
            yield item

    outer = token_budget(budget, key="user")(lambda user: max(len(made) for _ in inner(user)))
    assert outer("alice") < 100


def test_rule_10_a_nested_call_whose_weigh_makes_no_sense_is_charged_its_hold(budget: TokenBudget) -> None:
    inside = TokenBudget("100/day")
    call(budget, lambda: call(inside, lambda: reply(30), reserve=20, weigh=lambda usage: -5), reserve=50)
    assert (used(inside), used(budget)) == (20, 30)


def test_rule_12_of_numbers_alone_the_outermost_budgets_travels_up() -> None:
    one, other, outside = (TokenBudget("100/day", name=name) for name in ("one", "other", "outside"))

    @token_budget(one, key="user", usage=lambda result: 5)
    @token_budget(other, key="user", usage=lambda result: 7)
    def inner(user: str) -> object:
        return reply(30)

    call(outside, lambda: inner("alice"))
    assert (used(one), used(other), used(outside)) == (5, 7, 5)


def test_rule_12_a_budget_on_the_outer_call_gets_the_usage_and_not_another_ones_number() -> None:
    calls, inside, outside = (TokenBudget("1M/day", name=name) for name in ("calls", "inside", "outside"))

    @token_budget(calls, key="user", usage=lambda result: 1)
    @token_budget(inside, key="user")
    def inner(user: str) -> object:
        return reply(100)

    @token_budget(outside, key="user", weigh=lambda usage: 2 * usage.total_tokens)
    @token_budget(calls, key="user")
    def outer(user: str) -> None:
        inner(user)
        inner(user)

    outer("alice")
    assert (used(calls), used(inside), used(outside)) == (2, 200, 400)  # each as it reads for itself


def test_rule_12_a_budget_of_unknown_usage_travels_up_to_itself_as_it_was_charged() -> None:
    calls, tokens = TokenBudget("1M/day", name="calls"), TokenBudget("1M/day", name="tokens")

    @token_budget(calls, key="user", usage=lambda result: 1)
    @token_budget(tokens, key="user", reserve=50)
    def inner(user: str) -> None:
        pass

    outer = token_budget(tokens, key="user", reserve=80)(lambda user: inner(user))
    with collect_decisions() as seen:
        outer("alice")
    assert seen[0].settlement == Settlement("tokens", 50, 0, 80, "recorded")
    assert (used(calls), used(tokens)) == (1, 50)
