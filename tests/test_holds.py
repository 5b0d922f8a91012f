"""Tokens held by hand: `TokenBudget.reserve`, `charge`, `peek` and `reset`, with their async twins (rules 7 to 14)."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from unittest import mock
from weakref import WeakSet, ref

import pytest
import time_machine

from quotalimit import (
    CalendarWindow,
    Event,
    Hold,
    InvalidKey,
    SlidingWindow,
    TokenBudget,
    TokenBudgetExceeded,
    Usage,
    on_event,
    record_usage,
    token_budget,
)

from .helpers import NOON, open_holds, reply, used

pytestmark = pytest.mark.usefixtures("time")


@pytest.fixture
def budget() -> TokenBudget:
    return TokenBudget("100/day", name="tokens")


def fail_in(hold: Hold, error: BaseException, *, recorded: int | None = None, settled: int | None = None) -> None:
    """Use a hold for a block that records or settles something, and raises."""
    with hold:
        if recorded is not None:
            record_usage(recorded)
        if settled is not None:
            hold.settle(settled)
        raise error


def refusal() -> TokenBudgetExceeded:
    """What another budget raises."""
    with pytest.raises(TokenBudgetExceeded) as refused:
        TokenBudget("1/day").charge("alice", 2)
    return refused.value


@pytest.mark.parametrize(
    ("used_by_the_call", "charged", "source"),
    [
        (reply(20, 5), 25, "reported"),
        (Usage(20, 5), 25, "reported"),
        (25, 25, "reported"),
        (24.5, 25, "reported"),
        (0, 0, "reported"),
        (250, 250, "reported"),
        ({"usage": {"input_tokens": 20, "output_tokens": 5}}, 25, "reported"),
        (None, 60, "reserved"),
        ("text", 60, "reserved"),
        (-1, 60, "reserved"),
        (True, 60, "reserved"),
        (math.nan, 60, "reserved"),
        (Usage(input_tokens=-5), 60, "reserved"),
        (reply(-5), 60, "reserved"),
    ],
)
@pytest.mark.parametrize("in_block", [True, False])
def test_rule_8_a_hold_is_settled_with_what_the_call_used(
    budget: TokenBudget, used_by_the_call: object, charged: int, source: str, in_block: bool
) -> None:
    if in_block:
        with budget.reserve("alice", 60) as hold:
            assert (used(budget), open_holds(budget), hold.settlement) == (60, 1, None)
            settlement = hold.settle(used_by_the_call)
            assert used(budget) == charged
    else:
        hold = budget.reserve("alice", 60)
        assert (used(budget), open_holds(budget)) == (60, 1)
        settlement = hold.settle(used_by_the_call)
    assert settlement is hold.settlement
    assert (settlement.charged, settlement.held, settlement.source) == (charged, 60, source)
    assert used(budget) == charged
    assert open_holds(budget) == 0


async def test_a_hold_can_be_entered_with_async_with_or_awaited(budget: TokenBudget) -> None:
    async with budget.reserve_async("alice", 60) as hold:
        assert isinstance(hold, Hold)
        assert used(budget) == 60
        hold.settle(reply(10))
    hold = await budget.reserve_async("alice", 60)
    assert used(budget) == 70
    hold.settle(15)
    with await budget.reserve_async("alice", 60):
        assert record_usage(5)
    assert used(budget) == 30
    assert open_holds(budget) == 0


async def test_an_async_hold_takes_nothing_before_it_is_awaited_and_gives_back_as_the_sync_one(
    budget: TokenBudget,
) -> None:
    later = budget.reserve_async("alice", 60)
    assert used(budget) == 0

    async def fail() -> None:
        async with later:
            assert used(budget) == 60
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await fail()
    assert used(budget) == 0
    with pytest.raises(TokenBudgetExceeded):
        await budget.reserve_async("alice", 101)
    assert open_holds(budget) == 0


def test_rule_7_a_hold_that_does_not_fit_is_refused_and_charges_nothing(budget: TokenBudget) -> None:
    with budget.reserve("alice", 60) as hold:
        assert (hold.decision.allowed, hold.decision.requested, hold.decision.remaining) == (True, 60, 40)
        other = budget.reserve("bob", 100)
    with pytest.raises(TokenBudgetExceeded) as refused:
        budget.reserve("alice", 41)
    assert (refused.value.requested, refused.value.used, refused.value.reason) == (41, 60, "exhausted")
    with pytest.raises(TokenBudgetExceeded) as refused:
        budget.reserve("bob", 1)
    assert refused.value.reason == "busy"
    other.settle(0)
    assert (used(budget), used(budget, "bob")) == (60, 0)


def test_rule_9_a_hold_settled_above_what_it_held_leaves_a_debt(budget: TokenBudget) -> None:
    with budget.reserve("alice", 10) as hold:
        assert hold.settle(130).overrun == 120
    assert (used(budget), budget.peek("alice").remaining) == (130, 0)
    with pytest.raises(TokenBudgetExceeded):
        budget.reserve("alice", 1)


def test_rule_11_a_second_settlement_does_nothing(budget: TokenBudget) -> None:
    with budget.reserve("alice", 60) as hold:
        first = hold.settle(10)
        assert first.overrun == 0
        assert hold.settle(50) is first
    assert hold.settle(70) is first
    assert used(budget) == 10
    with budget.reserve("alice", 60) as hold:
        pass
    assert hold.settle(5).charged == 60
    assert used(budget) == 70


@pytest.mark.parametrize(("used_by_the_call", "charged"), [(10, 60), (90, 90)])
def test_rule_11_an_interrupt_in_a_settlement_forgets_no_charge_and_leaves_no_hold(
    budget: TokenBudget, used_by_the_call: int, charged: int
) -> None:
    """What was used above the hold is charged by the next call; what would be given back may stay charged."""
    hold = budget.reserve("alice", 60)
    interrupted = mock.patch.object(CalendarWindow, "adjust", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        hold.settle(used_by_the_call)
    assert used(budget) == charged
    assert open_holds(budget) == 0


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_rule_11_an_interrupt_before_there_is_a_hold_leaves_nothing_held(budget: TokenBudget, mode: str) -> None:
    with mock.patch("quotalimit.holds.Hold", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt) as kept:
        budget.reserve("alice", 10) if mode == "sync" else await budget.reserve_async("alice", 10)
    assert (used(budget), open_holds(budget)) == (0, 0)
    del kept  # whose traceback kept the call alive


def test_rule_11_a_block_that_an_interrupt_keeps_from_beginning_leaves_nothing_held(budget: TokenBudget) -> None:
    hold = budget.reserve("alice", 10)
    with mock.patch("quotalimit.holds.begin", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt), hold:
        raise AssertionError("not reached")
    assert open_holds(budget) == 0


def test_what_an_algorithm_raises_in_a_settlement_is_raised_once(budget: TokenBudget) -> None:
    hold = budget.reserve("alice", 6)
    with mock.patch.object(CalendarWindow, "adjust", side_effect=ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            hold.settle(9)
        assert used(budget) == 6


@pytest.mark.parametrize(
    ("error", "charged", "source"),
    [
        (ValueError(), 0, "released"),
        (TimeoutError(), 60, "reserved"),
        (KeyboardInterrupt(), 60, "reserved"),
        (asyncio.CancelledError(), 60, "reserved"),
        (refusal(), 0, "released"),
    ],
)
def test_rule_13_an_exception_in_the_block_settles_as_one_of_a_call(
    budget: TokenBudget, error: BaseException, charged: int, source: str
) -> None:
    hold = budget.reserve("alice", 60)
    with pytest.raises(type(error)) as caught:
        fail_in(hold, error)
    assert caught.value is error
    assert hold.settlement is not None
    assert (hold.settlement.charged, hold.settlement.source) == (charged, source)
    assert used(budget) == charged
    assert open_holds(budget) == 0


def test_rule_13_what_was_recorded_or_settled_before_an_exception_is_charged(budget: TokenBudget) -> None:
    with pytest.raises(ValueError, match="mine"):
        fail_in(budget.reserve("alice", 60), ValueError("mine"), recorded=7)
    assert used(budget) == 7
    with pytest.raises(ValueError, match="mine"):
        fail_in(budget.reserve("alice", 60), ValueError("mine"), settled=8)
    assert used(budget) == 15


def test_rule_11_a_hold_that_is_entered_twice_is_settled_once_and_leaves_no_call_running(budget: TokenBudget) -> None:
    hold = budget.reserve("alice", 50)
    with hold:
        with hold:
            record_usage(7)
        assert record_usage(5) is False
    assert record_usage(5) is False
    hold.__exit__(None, None, None)
    with budget.reserve("alice", 50), budget.reserve("bob", 50) as other:
        with other:
            other.settle(3)
        record_usage(4)
    assert (used(budget), used(budget, "bob")) == (7 + 4 + 3, 3)


def test_rule_11_a_hold_that_is_dropped_keeps_what_it_holds_charged(budget: TokenBudget) -> None:
    hold = budget.reserve("alice", 60)
    del hold
    gc.collect()
    assert used(budget) == 60
    assert open_holds(budget) == 0


def test_usage_recorded_in_the_block_is_charged(budget: TokenBudget) -> None:
    with budget.reserve("alice", 60) as hold:
        assert record_usage(reply(20, 5))
        assert record_usage(4)
    assert hold.settlement is not None
    assert (hold.settlement.charged, hold.settlement.source) == (29, "recorded")
    assert used(budget) == 29
    assert record_usage(4) is False


def test_rule_8_a_response_recorded_in_the_block_and_settled_counts_once(budget: TokenBudget) -> None:
    with budget.reserve("alice", 60) as hold:
        response = reply(20, 5)
        record_usage(response)
        hold.settle(response)
    assert used(budget) == 25


def test_rule_8_a_settlement_that_knows_nothing_is_charged_what_was_recorded(budget: TokenBudget) -> None:
    with budget.reserve("alice", 60) as hold:
        record_usage(7)
        hold.settle("no usage")
    assert used(budget) == 7


class Response:
    """A response of a model, of which can be seen when it goes away."""

    def __init__(self) -> None:
        self.usage = Usage(10, 2)


def test_a_settled_hold_keeps_no_response_alive(budget: TokenBudget) -> None:
    with budget.reserve("alice", 60) as hold:
        response = Response()
        record_usage(response)
        seen = ref(response)
        del response
    gc.collect()
    assert seen() is None
    assert hold.settlement is not None
    assert used(budget) == 12


class Slotted:
    """A response that knows no weak references; when it goes away can be seen by what is in it."""

    __slots__ = ("inner", "usage")

    def __init__(self) -> None:
        self.usage = Usage(10, 2)
        self.inner = Response()


def test_a_settled_hold_keeps_nothing_alive_that_knows_no_weak_references(budget: TokenBudget) -> None:
    with budget.reserve("alice", 60) as hold:
        response = Slotted()
        seen = ref(response.inner)
        record_usage(response)
        del response
    assert seen() is None
    assert hold.settlement is not None
    assert used(budget) == 12


def test_a_stream_that_has_ended_keeps_no_item_alive(budget: TokenBudget) -> None:
    class Stream:
        """A stream of an SDK."""

        left = 1

        def __iter__(self) -> Iterator[Response]:
            return self

        def __next__(self) -> Response:
            self.left -= 1
            if self.left < 0:
                raise StopIteration
            return Response()

    @token_budget(budget, key="user", reserve=60)
    def chat(user: str) -> Stream:
        return Stream()

    stream = chat("alice")
    seen = [ref(item) for item in stream]
    gc.collect()
    assert [item() for item in seen] == [None]
    assert stream.left < 0
    assert used(budget) == 12


def test_a_stream_of_what_knows_no_weak_references_keeps_its_last_items_alive_alone() -> None:
    """Those that may be recorded after they were yielded."""
    made: WeakSet[Response] = WeakSet()

    @token_budget("1M/day", key="user")
    def chat(user: str) -> Iterator[Slotted]:
        for _ in range(2_500):
            item = Slotted()
            made.add(item.inner)
            yield item

    assert max(len(made) for _ in chat("alice")) < 2_100


def test_usage_recorded_after_the_settlement_belongs_to_nobody(budget: TokenBudget) -> None:
    with budget.reserve("alice", 60) as hold:
        hold.settle(10)
        assert record_usage(5) is False
    assert used(budget) == 10


@pytest.mark.parametrize("result", [5, 90])
def test_rule_14_a_hold_settles_in_the_window_in_which_it_was_taken(
    budget: TokenBudget, time: time_machine.Traveller, result: int
) -> None:
    with budget.reserve("alice", 60) as hold:
        time.shift(12 * 3600)
        hold.settle(result)
    assert used(budget) == 0
    time.move_to(NOON)
    sliding = TokenBudget(SlidingWindow("100/minute"))
    with sliding.reserve("alice", 60) as hold:
        time.shift(59)
        hold.settle(result)
    assert used(sliding) == result
    time.shift(1)
    assert used(sliding) == 0


@pytest.mark.parametrize("used_by_the_call", [10, 60, 90])
def test_rule_22_a_hold_is_settled_whole_also_where_its_state_has_just_been_retired(
    time: time_machine.Traveller, used_by_the_call: int
) -> None:
    """Once a period the store sets all states aside, to look at them a few at a time."""
    budget = TokenBudget(SlidingWindow("100/minute"))
    budget.charge("first", 1)
    time.shift(50)
    hold = budget.reserve("alice", 60)
    for number in range(50):
        budget.charge(number, 1)
    time.shift(11)
    budget.charge("last", 1)
    hold.settle(used_by_the_call)
    for number in range(50):
        budget.charge(number, 1)
    assert used(budget) == used_by_the_call
    assert open_holds(budget) == 0


def test_charge_checks_and_deducts(budget: TokenBudget) -> None:
    decision = budget.charge("alice", 60)
    assert (decision.allowed, decision.name, decision.requested) == (True, "tokens", 60)
    assert (decision.used, decision.remaining, decision.retry_after) == (60, 40, 0.0)
    with pytest.raises(TokenBudgetExceeded) as refused:
        budget.charge("alice", 41)
    assert refused.value.key == "alice"
    assert refused.value.reset_at == datetime(2026, 11, 24, tzinfo=UTC)
    assert used(budget) == 60
    budget.charge("alice", 39.5)
    budget.charge("alice", 0)
    assert used(budget) == 100
    assert used(budget, "bob") == 0


async def test_charge_peek_and_reset_have_async_twins(budget: TokenBudget) -> None:
    assert (await budget.charge_async("alice", 60)).remaining == 40
    with pytest.raises(TokenBudgetExceeded):
        await budget.charge_async("alice", 41)
    assert (await budget.peek_async("alice")).used == 60
    await budget.reset_async("alice")
    assert used(budget) == 0


@pytest.mark.parametrize("bad", [-1, True, math.nan, math.inf, None, "5"])
def test_tokens_that_are_no_amount_are_refused(budget: TokenBudget, bad: Any) -> None:
    for ask in (budget.charge, budget.reserve, budget.reserve_async):
        with pytest.raises(ValueError, match="tokens"):
            ask("alice", bad)
    with pytest.raises(InvalidKey):
        budget.charge(bad if isinstance(bad, bool) or bad is None else 1.5, 5)  # type: ignore[arg-type]
    assert used(budget) == 0


def test_a_peek_charges_nothing_and_says_whether_a_call_of_one_unit_would_fit(budget: TokenBudget) -> None:
    for _ in range(200):
        assert budget.peek("alice").allowed
    budget.charge("alice", 99)
    assert budget.peek("alice").remaining == 1
    assert budget.peek("alice").allowed
    hold = budget.reserve("alice", 1)
    decision = budget.peek("alice")
    assert (decision.allowed, decision.reason, decision.retry_after) == (False, "busy", 12 * 3600.0)
    hold.settle(1)
    assert budget.peek("alice").reason == "exhausted"


def test_a_reset_forgets_one_identity_and_closes_its_holds(budget: TokenBudget) -> None:
    budget.charge("bob", 10)
    with budget.reserve("alice", 60) as hold:
        budget.reset("alice")
        assert (used(budget), open_holds(budget)) == (0, 0)
        budget.charge("alice", 100)
        hold.settle(30)
    assert (used(budget), used(budget, "bob")) == (100, 10)


def test_rule_11_a_listener_that_interrupts_a_settlement_hides_nothing(budget: TokenBudget) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "settled":
            raise KeyboardInterrupt

    hold = budget.reserve("alice", 10)
    stop = on_event(interrupt)
    with pytest.raises(KeyboardInterrupt):
        hold.settle(4)
    stop()
    assert hold.settle(9).charged == 4
    assert used(budget) == 4
