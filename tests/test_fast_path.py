"""The fast path of the common call decides as the general path does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import Context, copy_context
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import ref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotalimit import (
    CalendarWindow,
    InvalidKey,
    LimitExceeded,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    SQLiteStore,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    collect_decisions,
    configure,
    limiters_of,
    rate_limited,
    record_usage,
    token_budget,
)
from quotalimit._waiting import Line
from quotalimit.recording import running
from tests.helpers import open_holds, reply, used

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
        return (refusal.reason, refusal.retry_after, refusal.requested, refusal.used, refusal.reset_at)
    return ("admitted",)


@given(st.sampled_from(LIMITS), TRACES)
@settings(deadline=None, max_examples=100)
def test_the_fast_path_decides_as_the_general_path(limit: Any, trace: list[tuple[int, Any]]) -> None:
    """Each on a store of its own: a step back that one has seen is still new to the other."""
    fast, general = (rate_limited(limit, key="user", store=MemoryStore())(lambda user: user) for _ in range(2))
    clock = [1_700_000_000_000_000]
    with at(clock):
        for step, key in trace:
            clock[0] += step
            one = outcome(fast, key)
            with collect_decisions():
                other = outcome(general, key)
            assert one == other
            assert limiters_of(fast)[0].peek(key).used == limiters_of(general)[0].peek(key).used


def limited(layers: int) -> Callable[[Any, Any], Any]:
    """A function with one layer, or with two that have each a key."""

    def ask(user: object, agent: object) -> Any:
        return reply(3)

    limit = rate_limited("4/minute", key="user")
    return limit(ask if layers == 1 else token_budget(SlidingWindow("12/minute"), key="agent", reserve=3)(ask))


keys_of_layers = pytest.mark.parametrize(("layers", "agent"), [(1, "bob"), (2, "bob"), (2, "alice")])


@keys_of_layers
@pytest.mark.parametrize("special", ["collected", "waiting", "uncommon key"])
def test_what_is_special_is_left_to_the_general_path(
    special: str, layers: int, agent: str, default_store: MemoryStore
) -> None:
    """A call that reports, that may overtake a waiting one, or whose key must be checked, is not the common call."""
    ask = limited(layers)
    ask("alice", agent)
    with mock.patch.object(default_store, "acquire", wraps=default_store.acquire) as acquire:
        ask("alice", agent)
        assert not acquire.called
        if special == "collected":
            with collect_decisions() as seen:
                ask("alice", agent)
            assert len(seen) == layers
        elif special == "waiting":
            limiter = limiters_of(ask)[-1]
            place = (limiter.bound().places[0][0], "alice" if layers == 1 else agent)
            with mock.patch.dict(default_store.lines.standing, {place: Line()}):
                ask("alice", agent)
        else:
            ask(("alice", 1), ("alice", 1))
        assert acquire.called


@keys_of_layers
def test_calls_that_wait_elsewhere_leave_a_call_common(layers: int, agent: str, default_store: MemoryStore) -> None:
    ask = limited(layers)
    ask("alice", agent)
    ((counts, _),) = limiters_of(ask)[-1].bound().places
    with (
        at([1_900_000_000_000_000]),  # also at one and the same time
        mock.patch.dict(default_store.lines.standing, {(counts, "carol"): Line()}),
        mock.patch.object(default_store, "acquire", wraps=default_store.acquire) as acquire,
    ):
        ask("alice", agent)
        ask("alice", agent)
        assert not acquire.called


@keys_of_layers
@pytest.mark.parametrize("before", ["the first call", "a common call", "a call that reports"])
def test_rule_19_a_step_back_since_a_call_is_left_to_the_general_path(
    before: str, layers: int, agent: str, default_store: MemoryStore
) -> None:
    ask = limited(layers)
    clock = [1_900_000_000_000_000]
    with at(clock):
        ask("alice", agent)
        if before == "a call that reports":
            clock[0] += 20_000_000
            with collect_decisions():
                ask("alice", agent)
        with mock.patch.object(default_store, "acquire", wraps=default_store.acquire) as acquire:
            if before == "a common call":
                clock[0] += 20_000_000
                ask("alice", agent)
                assert not acquire.called
            clock[0] -= 10_000_000
            ask("alice", agent)
            assert acquire.called


@pytest.mark.parametrize("agent", ["alice", "bob"])
def test_rule_19_a_step_back_in_the_middle_of_a_common_call_is_seen(agent: str) -> None:
    limiter = RateLimiter("4/minute")
    clock = [1_900_000_000_000_000]
    refusals: list[tuple[Any, ...]] = []

    @rate_limited(limiter, key="user")
    @token_budget("12/minute", key="agent", reserve=3)
    def ask(user: str, agent: str, back: int) -> Any:
        clock[0] -= back
        refusals.append(outcome(lambda user: limiter.acquire(user, 4), user))
        return reply(3)

    with at(clock):
        ask("alice", agent, 0)
        clock[0] += 20_000_000
        ask("alice", agent, 10_000_000)
    assert [retry_after for _, retry_after, *_ in refusals] == [60, 60]


@pytest.mark.parametrize("bad", [None, True, 1.0])
def test_each_key_of_a_common_call_is_checked(bad: object) -> None:
    """Also one that equals a key for which something is counted, and so would find its count."""
    ask = limited(2)
    ask(1, 1), ask(1, 1)
    for keys in [(bad, 1), (1, bad), (bad, bad)]:
        with pytest.raises(InvalidKey):
            ask(*keys)
    assert [limiter.peek(1).used for limiter in limiters_of(ask)] == [2, 6]


def test_a_common_call_is_refused_as_busy_while_a_hold_is_open() -> None:
    limiter = RateLimiter("2/minute")
    plain = rate_limited(limiter, key="user")(lambda user: user)
    held = rate_limited(limiter, key="user", refund_on=ConnectionError)(
        lambda user: (plain(user), outcome(plain, user))
    )
    assert plain("bob") == "bob"
    _, refusal = held("alice")
    assert refusal[0] == "busy"
    assert used(limiter) == 2


LAYERS = st.tuples(
    st.sampled_from(LIMITS),
    st.sampled_from(LIMITS),
    st.sampled_from([(), ConnectionError]),
    st.sampled_from([None, 0, 3]),
)
USES = st.none() | st.integers(-1, 6)
CALLS = st.lists(
    st.tuples(STEPS, st.sampled_from(["1.1.1.1", "2.2.2.2"]), st.sampled_from(["alice", 7, "1.1.1.1"]), USES, USES),
    max_size=40,
)


@given(LAYERS, CALLS)
@settings(deadline=None, max_examples=80)
def test_several_layers_are_decided_and_settled_as_by_the_general_path(
    layers: tuple[Any, Any, Any, int | None], calls: list[tuple[int, str, Any, int | None, int | None]]
) -> None:
    """A call that used -1 fails; the others report or record what they used, both, or neither."""
    by_ip, by_user, refund_on, reserve = layers

    def decorated() -> Callable[..., Any]:
        store = MemoryStore()

        @rate_limited(by_ip, key="ip", store=store)
        @rate_limited(by_user, key="user", refund_on=refund_on, store=store)
        @token_budget(SlidingWindow("12/minute"), key="user", reserve=reserve, store=store)
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


@pytest.mark.usefixtures("time")
def test_a_key_that_is_none_is_refused_as_such_also_while_others_wait(default_store: MemoryStore) -> None:
    chat = rate_limited("9/minute", key="user")(token_budget("90/minute", key="user")(lambda user: reply(3)))
    chat("alice")
    with mock.patch.dict(default_store.lines.standing, {"somewhere": Line()}), pytest.raises(InvalidKey):
        chat(["alice"])


@pytest.mark.usefixtures("time")
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


@pytest.mark.usefixtures("time")
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


@pytest.mark.usefixtures("time")
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


@pytest.mark.usefixtures("time")
def test_rule_2_two_layers_on_one_limiter_both_count() -> None:
    budget = TokenBudget("20/minute")

    @token_budget(budget, key="user", reserve=4)
    @token_budget(budget, key="user", reserve=4)
    def chat(user: str) -> Any:
        return reply(4)

    for charged in 8, 16:
        chat("alice")
        assert used(budget) == charged
    with pytest.raises(TokenBudgetExceeded):
        chat("alice")


@pytest.mark.parametrize("first", ["memory", "sqlite"])
def test_layers_on_two_stores_are_no_common_call(first: str, tmp_path: Path) -> None:
    file = SQLiteStore(tmp_path / "counts.db")
    stores = [MemoryStore(), file] if first == "memory" else [file, MemoryStore()]
    limiter = RateLimiter("9/minute", name="calls", store=stores[0])
    budget = TokenBudget("90/minute", name="tokens", store=stores[1])
    chat = rate_limited(limiter, key="user")(token_budget(budget, key="user")(lambda user: reply(3)))
    chat("alice"), chat("alice"), chat("alice")
    assert (used(limiter), used(budget)) == (3, 9)
    file.close()


@pytest.mark.parametrize("recorded", [0, 3])
@pytest.mark.parametrize("budgets", [1, 2])
def test_rule_8_of_common_calls_all_usage_counts_on_all_budgets(budgets: int, recorded: int) -> None:
    def chat(user: str) -> Any:
        if recorded:
            record_usage(reply(recorded))
        return reply(4)

    for _ in range(budgets):
        chat = token_budget("1000/day", key="user", reserve=50)(chat)
    for _ in range(3):
        chat("alice")
    assert [used(budget) for budget in limiters_of(chat)] == [12 + 3 * recorded] * budgets


def test_rule_12_a_nested_call_is_not_common() -> None:
    budget = TokenBudget("100/day")
    inner = token_budget(budget, key="user", reserve=60)(lambda user: reply(10))
    outer = token_budget(budget, key="user", reserve=80)(lambda user: inner(user))
    inner("alice"), inner("alice")
    assert outer("alice").usage.total_tokens == 10
    assert used(budget) == 30


def test_usage_recorded_in_or_after_a_common_call_without_a_budget_belongs_to_nobody() -> None:
    ask = rate_limited("5/day", key="user", refund_on=ConnectionError)(lambda user: record_usage(5))
    assert [ask("alice"), ask("alice")] == [False, False]


def test_usage_recorded_after_a_common_call_belongs_to_nobody_and_nothing_of_the_call_is_kept() -> None:
    class Prompt:
        """A prompt that can be referred to weakly."""

    budget = TokenBudget("100/day")
    contexts: list[Context] = []

    @token_budget(budget, key="user")
    def chat(user: str, prompt: Prompt) -> Any:
        contexts.append(copy_context())
        return reply(3)

    for charged in 3, 6:
        prompt = Prompt()
        seen = ref(prompt)
        chat("alice", prompt)
        del prompt
        assert contexts[-1].run(record_usage, 5) is False
        assert used(budget) == charged
        gc.collect()
        assert seen() is None


def test_rule_8_a_common_call_of_unknown_usage_is_estimated_from_its_text_and_that_of_its_result() -> None:
    budget = TokenBudget("100/day")
    chat = token_budget(budget, key="user")(lambda user: "an answer of seven words or so")
    chat("alice")
    estimate = used(budget)
    chat("alice")
    assert used(budget) == 2 * estimate > 2


def test_a_common_stream_is_charged_its_items_and_what_it_returns() -> None:
    budget = TokenBudget("100/day")

    @token_budget(budget, key="user", usage=lambda item: item)
    def chat(user: str) -> Generator[int, None, int]:
        yield 3
        yield 4
        return 5

    for charged in 12, 24:
        assert list(chat("alice")) == [3, 4]
        assert used(budget) == charged


@pytest.mark.parametrize("moment", ["made", "settled"])
def test_rule_11_an_interrupt_of_a_common_call_leaves_nothing_held(moment: str, default_store: MemoryStore) -> None:
    """One that was admitted but has not begun is charged nothing; one that has ended, what it reported."""
    budget = TokenBudget("100/day")
    chat = token_budget(budget, key="user", reserve=9)(lambda user: reply(3))
    chat("alice")
    if moment == "made":
        interrupted = mock.patch("quotalimit._fast_path.FastCall", side_effect=KeyboardInterrupt)
    else:
        settles = [KeyboardInterrupt, mock.DEFAULT]
        interrupted = mock.patch.object(default_store, "settle", wraps=default_store.settle, side_effect=settles)
    with interrupted, pytest.raises(KeyboardInterrupt):
        chat("alice")
    assert used(budget) == (3 if moment == "made" else 6)
    assert open_holds(budget) == 0
