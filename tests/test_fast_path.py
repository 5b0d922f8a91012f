"""The fast path of the common call decides as the general path does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotalimit import (
    CalendarWindow,
    InvalidKey,
    LimitExceeded,
    MemoryStore,
    RateLimitExceeded,
    SlidingWindow,
    TokenBucket,
    collect_decisions,
    configure,
    limiters_of,
    rate_limited,
    record_usage,
    token_budget,
)
from quotalimit._waiting import Line
from quotalimit.recording import running
from tests.helpers import reply

LIMITS = [SlidingWindow("4/minute"), CalendarWindow("4/minute"), TokenBucket("4/minute", burst=2)]
STEPS = st.sampled_from(
    [0, 0, 1, 5_000_000, 20_000_000, 59_999_999, 60_000_000, 130_000_000, -1, -7_000_000, -3_600_000_000]
)
TRACES = st.lists(st.tuples(STEPS, st.sampled_from(["alice", "bob", 7])), max_size=60)


@contextmanager
def at(clock: list[int]) -> Iterator[None]:
    with mock.patch("quotalimit.clock.now", side_effect=lambda: clock[0]):
        yield


def outcome(ask: Callable[[Any], Any], key: object) -> tuple[Any, ...]:
    try:
        ask(key)
    except RateLimitExceeded as refusal:
        return (refusal.reason, refusal.retry_after, refusal.used, refusal.reset_at)
    return ("admitted",)


@given(st.sampled_from(LIMITS), TRACES)
@settings(deadline=None, max_examples=100)
def test_the_fast_path_decides_as_the_general_path(limit: Any, trace: list[tuple[int, Any]]) -> None:
    configure(store=MemoryStore())
    fast, general = (rate_limited(limit, key="user")(lambda user: user) for _ in range(2))
    clock = [1_700_000_000_000_000]
    with at(clock):
        for step, key in trace:
            clock[0] += step
            one = outcome(fast, key)
            with collect_decisions():
                other = outcome(general, key)
            assert one == other
            assert limiters_of(fast)[0].peek(key).used == limiters_of(general)[0].peek(key).used


@pytest.mark.parametrize("special", ["collected", "waiting", "uncommon key"])
def test_what_is_special_is_left_to_the_general_path(special: str, default_store: MemoryStore) -> None:
    """A call that reports, that may overtake a waiting one, or whose key must be checked, is not the common call."""
    ask = rate_limited("4/minute", key="user")(lambda user: user)
    ask("alice")
    with mock.patch.object(default_store, "acquire", wraps=default_store.acquire) as acquire:
        ask("alice")
        assert not acquire.called
        if special == "collected":
            with collect_decisions() as seen:
                ask("alice")
            assert len(seen) == 1
        elif special == "waiting":
            (limiter,) = limiters_of(ask)
            place = (limiter.bound().places[0][0], "alice")
            with mock.patch.dict(default_store.lines.standing, {place: Line()}):
                ask("alice")
        else:
            ask(("alice", 1))
        assert acquire.called


LAYERS = st.tuples(
    st.sampled_from(LIMITS),
    st.sampled_from(LIMITS),
    st.sampled_from([(), ConnectionError]),
    st.sampled_from([None, 0, 3]),
)
USES = st.none() | st.integers(-1, 6)
CALLS = st.lists(
    st.tuples(STEPS, st.sampled_from(["1.1.1.1", "2.2.2.2"]), st.sampled_from(["alice", 7]), USES, USES),
    max_size=40,
)


@given(LAYERS, CALLS)
@settings(deadline=None, max_examples=80)
def test_several_layers_are_decided_and_settled_as_by_the_general_path(
    layers: tuple[Any, Any, Any, int | None], calls: list[tuple[int, str, Any, int | None, int | None]]
) -> None:
    """A call that used -1 fails; the others report or record what they used, both, or neither."""
    by_ip, by_user, refund_on, reserve = layers
    configure(store=MemoryStore())

    def decorated() -> Callable[..., Any]:
        @rate_limited(by_ip, key="ip")
        @rate_limited(by_user, key="user", refund_on=refund_on)
        @token_budget(SlidingWindow("12/minute"), key="user", reserve=reserve)
        def chat(ip: str, user: object, tokens: int | None, recorded: int | None) -> Any:
            if recorded is not None:
                record_usage(abs(recorded))
            if tokens == -1:
                raise ConnectionError
            return None if tokens is None else reply(tokens)

        return chat

    fast, general = decorated(), decorated()
    clock = [1_700_000_000_000_000]
    with at(clock):
        for step, ip, user, *used in calls:
            clock[0] += step
            one = end_of(lambda: fast(ip, user, *used))  # noqa: B023 - called at once
            with collect_decisions():
                other = end_of(lambda: general(ip, user, *used))  # noqa: B023
            assert one == other
            for mine, its, key in zip(limiters_of(fast), limiters_of(general), (ip, user, user), strict=True):
                assert mine.peek(key).used == its.peek(key).used


def end_of(call: Callable[[], Any]) -> tuple[Any, ...]:
    try:
        call()
    except LimitExceeded as refusal:
        return (type(refusal), refusal.limit, refusal.reason, refusal.retry_after, refusal.used, refusal.reset_at)
    except ConnectionError:
        return ("failed",)
    return ("admitted",)


def test_a_key_that_is_none_is_refused_as_such_also_while_others_wait(default_store: MemoryStore) -> None:
    chat = rate_limited("9/minute", key="user")(token_budget("90/minute", key="user")(lambda user: reply(3)))
    chat("alice")
    with mock.patch.dict(default_store.lines.standing, {"somewhere": Line()}), pytest.raises(InvalidKey):
        chat(["alice"])


def test_rule_8_what_a_thread_records_while_the_result_is_read_counts() -> None:
    """The thread has found the running call just before its end."""

    def read(result: Any) -> int:
        result.record(1_000, (read,))  # once, however often it is read
        return 30

    @token_budget("10_000/minute", key="user", usage=read)
    def chat(user: str) -> Any:
        return running()

    for calls in (1, 2):  # the first goes the way of all others
        chat("alice")
        assert limiters_of(chat)[0].peek("alice").used == calls * 1_030


@pytest.mark.parametrize("moment", ["before", "after"])
def test_rule_8_an_interrupt_of_the_settlement_forgets_no_usage(default_store: MemoryStore, moment: str) -> None:
    settle = default_store.settle
    interrupts = iter([KeyboardInterrupt])

    def interrupted(*arguments: Any) -> None:
        error = next(interrupts, None)
        if error is not None and moment == "before":
            raise error
        settle(*arguments)
        if error is not None:
            raise error

    chat = token_budget("10_000/minute", key="user")(lambda user: reply(1_000))
    chat("alice")
    with mock.patch.object(default_store, "settle", interrupted), pytest.raises(KeyboardInterrupt):
        chat("alice")
    gc.collect()
    assert limiters_of(chat)[0].peek("alice").used == 2_000


def test_common_calls_of_several_layers_do_not_ask_the_general_way(default_store: MemoryStore) -> None:
    @rate_limited("9/minute", key="user")
    @token_budget("90/minute", key="user")
    def chat(user: str) -> Any:
        return reply(3)

    chat("alice")
    with mock.patch.object(default_store, "acquire", wraps=default_store.acquire) as acquire:
        chat("alice")
        assert not acquire.called
        configure(store=MemoryStore())
        chat("alice")
    assert [limiter.peek("alice").used for limiter in limiters_of(chat)] == [1, 3]
