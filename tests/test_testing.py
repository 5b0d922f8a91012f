"""What `quotalimit.testing` gives to users' tests, with the runners and the clocks that they use."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import time_machine
from freezegun import freeze_time

from quotalimit import (
    UNLIMITED,
    InvalidLimit,
    LimitExceeded,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    Store,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    Usage,
    limiters_of,
    rate_limited,
    read_usage,
    token_budget,
)
from quotalimit import clock as library_clock
from quotalimit._waiting import LINES
from quotalimit.stores.sqlite import SQLiteStore
from quotalimit.testing import Clock, assert_no_holds, exhaust, fake_response, fake_stream, use_store
from tests.helpers import reply, used

pytest_plugins = ["pytester"]

T0 = datetime(2026, 3, 1, 12, tzinfo=UTC)


@rate_limited("2/minute", key="user")
def chat(user: str) -> str:
    return user


@token_budget("100/day", key="user", reserve=10)
def ask(user: str) -> Any:
    return reply(7)


# Clocks


def test_the_clock_stands_still_until_it_is_moved() -> None:
    with Clock(T0) as clock:
        assert clock.now == T0
        chat("alice")
        clock.tick(20)
        chat("alice")
        with pytest.raises(RateLimitExceeded) as refusal:
            chat("alice")
        assert refusal.value.retry_after == 40
        clock.tick(timedelta(seconds=39.999999))
        with pytest.raises(RateLimitExceeded):
            chat("alice")
        clock.tick(0.000001)
        chat("alice")
        clock.move_to(datetime(2026, 3, 2))
        assert clock.now == datetime(2026, 3, 2, tzinfo=UTC)
        chat("alice")
        clock.tick()
        assert clock.now == datetime(2026, 3, 2, 0, 0, 1, tzinfo=UTC)


def test_it_starts_at_the_present_and_ends_with_its_block() -> None:
    before = library_clock.now()
    with Clock() as clock:
        start = library_clock.now()
        assert library_clock.now() == start
        clock.tick(-3_600)
        with Clock(T0):
            assert library_clock.now() == T0.timestamp() * 1e6
        assert library_clock.now() == start - 3_600_000_000
    assert before <= start <= library_clock.now()


FREEZERS: list[Any] = [
    pytest.param(lambda when: freeze_time(when, real_asyncio=True), id="freezegun"),
    pytest.param(lambda when: time_machine.travel(when, tick=False), id="time-machine"),
]


@pytest.mark.parametrize("freeze", FREEZERS)
@pytest.mark.parametrize("outer", ["clock", "frozen block"])
def test_where_time_is_frozen_it_moves_that_time(freeze: Callable[[datetime], Any], outer: str) -> None:
    """A test has one time, whoever stopped it first, and both ways to move it do."""
    clock = Clock()
    first, second = (clock, freeze(T0)) if outer == "clock" else (freeze(T0), clock)
    with first, second as moved:
        assert clock.now == datetime.now(UTC) == T0
        chat("alice")
        clock.tick(60)
        assert clock.now == datetime.now(UTC) == T0 + timedelta(seconds=60)
        chat("alice")
        chat("alice")
        if outer == "clock":
            moved.move_to(T0 + timedelta(hours=2))
        else:
            clock.move_to(T0 + timedelta(hours=2))
        assert clock.now == datetime.now(UTC) == T0 + timedelta(hours=2)
        chat("alice")


def test_after_a_frozen_block_the_clock_stands_where_it_stood() -> None:
    with Clock(T0) as clock:
        with freeze_time("2030-01-01"):
            assert clock.now == datetime(2030, 1, 1, tzinfo=UTC)
        assert clock.now == T0


async def test_moving_it_starts_calls_that_wait() -> None:
    limiter = RateLimiter("1/hour", name="calls")
    with Clock() as clock:
        limiter.acquire("alice")
        limiter.acquire("bob")
        thread = threading.Thread(target=limiter.acquire, args=("alice",), kwargs={"wait": 7_200})
        thread.start()
        task = asyncio.create_task(limiter.acquire_async("bob", wait=7_200))
        while len(LINES.standing) < 2:
            await asyncio.sleep(0)
        clock.tick(3_600)
        assert (await task).allowed
        thread.join()
    assert used(limiter) == used(limiter, "bob") == 1


# Counts


def test_use_store_gives_back_what_was_there(default_store: MemoryStore) -> None:
    chat("alice")
    with use_store(MemoryStore()) as store:
        assert used(limiters_of(chat)[0]) == 0
        chat("alice")
        assert limiters_of(chat)[0].bound().store is store
    assert used(limiters_of(chat)[0]) == 1
    assert limiters_of(chat)[0].bound().store is default_store


def test_a_store_of_its_own_is_left_only_by_name(store: Store) -> None:
    limiter = RateLimiter("9/minute", name="calls", store=store)

    @rate_limited(limiter, key="user")
    @token_budget("100/day", key="user", name="tokens", store=store)
    def both(user: str) -> Any:
        return reply(7)

    both("alice")
    with use_store(MemoryStore()):
        both("alice")
        assert [used(each) for each in limiters_of(both)] == [2, 14]
    with use_store(MemoryStore(), both):
        assert [used(each) for each in limiters_of(both)] == [0, 0]
        both("alice")
        assert used(limiter) == 1
    assert [used(each) for each in limiters_of(both)] == [2, 14]
    with use_store(MemoryStore(), both, limiter):  # it is named twice
        pass
    assert used(limiter) == 2
    with pytest.raises(TypeError, match="has no limits"), use_store(MemoryStore(), reply):
        pass


@pytest.mark.parametrize("limited", [(), (chat,)])
def test_use_store_refuses_what_is_no_store(limited: tuple[Any, ...], default_store: MemoryStore) -> None:
    not_a_store: Any = "memory://"
    with pytest.raises(TypeError, match="store must be a Store"), use_store(not_a_store, *limited):
        pass
    chat("alice")
    assert limiters_of(chat)[0].bound().store is default_store


def test_with_no_default_before_there_is_none_after() -> None:
    code = """
    import quotalimit, quotalimit.stores.default as default
    from quotalimit.testing import use_store
    with use_store(quotalimit.MemoryStore()):
        assert default._store is not None
    assert default._store is None
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


# Limits that are used up


def test_exhaust_puts_a_key_at_its_limit(store: Store) -> None:
    @rate_limited("20/minute", "500/day", key="user", name="calls", store=store)
    @token_budget("10_000/day", key="user", name="tokens", store=store)
    def both(user: str) -> Any:
        return reply(7)

    calls, tokens = limiters_of(both)
    both("alice")
    exhaust(both, "alice")
    assert (used(calls), used(tokens)) == (20, 10_000)
    with pytest.raises(LimitExceeded) as refusal:
        both("alice")
    assert {decision.name for decision in refusal.value.violations} == {"calls", "tokens"}
    exhaust(both, "alice")
    assert both("bob").usage.total_tokens == 7


@pytest.mark.parametrize(
    "limiter", [RateLimiter("20/minute"), RateLimiter(TokenBucket("20/minute", burst=5)), TokenBudget("20/day")]
)
def test_exhaust_may_leave_some(limiter: RateLimiter | TokenBudget) -> None:
    with Clock(T0):
        exhaust(limiter, "alice", leave=3)
        assert limiter.peek("alice").remaining == 3
        exhaust(limiter, "alice")
        exhaust(limiter, "alice", leave=1)  # no more than what is left
        assert not limiter.peek("alice")


def test_exhaust_takes_what_has_limits_that_are_known() -> None:
    with pytest.raises(TypeError, match="has no limits"):
        exhaust(reply, "alice")
    with pytest.raises(InvalidLimit, match="only through that function"):
        exhaust(rate_limited(lambda user: UNLIMITED, key="user")(lambda user: user), "alice")


def test_a_budget_in_debt_is_exhausted_already() -> None:
    stream = token_budget("5/day", key="user")(lambda user: reply(7))
    stream("alice")
    exhaust(stream, "alice")
    assert used(limiters_of(stream)[0]) == 7


def test_an_exhausted_budget_refuses() -> None:
    exhaust(ask, "alice", leave=10)
    ask("alice")
    with pytest.raises(TokenBudgetExceeded):
        ask("alice")


# Holds


def test_assert_no_holds_sees_what_is_open(store: Store) -> None:
    budget = TokenBudget("100/day", name="tokens", store=store)

    @token_budget(budget, key="user", reserve=10)
    def stream(user: str) -> Any:
        yield reply(7)

    open_stream = stream("alice")
    hold = budget.reserve("bob", 5)
    for place in (budget, stream, store):
        with pytest.raises(AssertionError, match="tokens: 2 calls are still open, which hold 15 units") as failure:
            assert_no_holds(place)
        assert "alice" not in str(failure.value)
    list(open_stream)
    hold.settle(3)
    assert_no_holds(budget, stream, store)


def test_assert_no_holds_sees_what_is_open_on_the_store_that_is_asked_instead(tmp_path: Path) -> None:
    spare = SQLiteStore(tmp_path / "spare.db", on_unavailable=MemoryStore())
    store = SQLiteStore(tmp_path / "nowhere" / "counts.db", on_unavailable=spare)
    budget = TokenBudget("100/day", name="tokens", store=store)
    hold = budget.reserve("alice", 5)
    for place in (budget, store, spare):
        with pytest.raises(AssertionError, match="tokens: 1 calls are still open, which hold 5 units"):
            assert_no_holds(place)
    hold.settle(3)
    assert_no_holds(budget, store, spare)
    store.close()
    spare.close()


def test_a_stream_that_is_garbage_holds_nothing() -> None:
    @token_budget("100/day", key="user", reserve=10)
    def stream(user: str) -> Any:
        yield reply(7)

    left = stream("alice")
    cycle: list[Any] = [left]
    cycle.append(cycle)
    gc.collect()
    gc.disable()
    del cycle, left
    gc.enable()
    assert_no_holds(stream)


# Fake answers

LIKE: list[Any] = [
    "openai",
    "openai-responses",
    "anthropic",
    "gemini",
    "bedrock",
    "mistral",
    "cohere",
    "ollama",
    "langchain",
]


def text_of(answer: Any, like: str) -> str:
    """The text of an answer, at the place where code that uses the SDK looks for it."""
    places: dict[str, Callable[[], str]] = {
        "openai-responses": lambda: answer.output_text,
        "anthropic": lambda: answer.content[0].text,
        "gemini": lambda: answer.text,
        "bedrock": lambda: answer["output"]["message"]["content"][0]["text"],
        "cohere": lambda: answer.message.content[0].text,
        "ollama": lambda: answer.message.content,
        "langchain": lambda: answer.content,
    }
    return places.get(like, lambda: answer.choices[0].message.content)()


@pytest.mark.parametrize("like", LIKE)
def test_a_fake_answer_says_its_text_and_is_charged_its_usage(like: Any) -> None:
    @token_budget("1_000/day", key="user")
    def answer(user: str) -> Any:
        return fake_response("Good morning.", input_tokens=30, output_tokens=7, like=like)

    response = answer("alice")
    assert text_of(response, like) == "Good morning."
    assert read_usage(response) == Usage(input_tokens=30, output_tokens=7)
    assert used(limiters_of(answer)[0]) == 37


@pytest.mark.parametrize("like", LIKE)
async def test_a_fake_stream_is_charged_at_its_end_either_way(like: Any) -> None:
    @token_budget("1_000/day", key="user", reserve=100)
    def answer(user: str) -> Any:
        return fake_stream("It is a good morning.", input_tokens=30, output_tokens=7, like=like)

    @token_budget("1_000/day", key="user", reserve=100)
    async def answer_async(user: str) -> Any:
        return fake_stream("It is a good morning.", input_tokens=30, output_tokens=7, like=like)

    stream = answer("alice")
    items = stream["stream"] if like == "bedrock" else stream
    assert used(limiters_of(answer)[0]) == 100
    assert len(list(items)) >= 5
    assert used(limiters_of(answer)[0]) == 37
    stream = await answer_async("alice")
    async with stream["stream"] if like == "bedrock" else stream as items:
        assert len([item async for item in items]) >= 5
    assert used(limiters_of(answer_async)[0]) == 37
    with items:
        assert list(items) == []
    assert_no_holds(answer, answer_async)


def test_a_fake_stream_that_is_left_is_charged_for_what_arrived() -> None:
    @token_budget("1_000/day", key="user", reserve=100)
    def answer(user: str) -> Any:
        return fake_stream("It is a good morning.", input_tokens=30, output_tokens=7, like="anthropic")

    with answer("alice") as stream:
        next(stream)
    assert 30 < used(limiters_of(answer)[0]) < 37
    assert_no_holds(answer)


def test_unknown_answers_are_refused() -> None:
    for make in (fake_response, fake_stream):
        with pytest.raises(ValueError, match="no fake answers like 'opanai': there are those of openai, "):
            make(like="opanai")  # type: ignore[operator]


# Runners

CONFTEST = "from quotalimit.testing import clock, fresh_counts\n"
MODULE = """
import pytest
from quotalimit import RateLimitExceeded, rate_limited

@rate_limited("1/minute", key="user")
def chat(user):
    return user

@rate_limited("1/minute", key="user")
async def chat_async(user):
    return user

@pytest.mark.parametrize("count", range(2))
def test_counts_are_fresh(count, clock):
    chat("alice")
    with pytest.raises(RateLimitExceeded) as refusal:
        chat("alice")
    assert refusal.value.retry_after == 60
    clock.tick(60)
    chat("alice")
"""
ASYNC = """
{mark}
@pytest.mark.parametrize("count", range(2))
async def test_counts_are_fresh_for_coroutines(count, clock, fresh_counts):
    await chat_async("alice")
    with pytest.raises(RateLimitExceeded):
        await chat_async("alice")
    clock.tick(60)
    await chat_async("alice")

{fixture}
"""
BACKEND = """
@pytest.fixture
def anyio_backend():
    return "asyncio"
"""


@pytest.mark.parametrize(
    ("runner", "plugins", "module", "passed"),
    [
        ("pytest", ("-p", "no:asyncio", "-p", "no:anyio"), MODULE, 2),
        (
            "pytest-asyncio",
            ("-p", "no:anyio", "-o", "asyncio_default_fixture_loop_scope=function"),
            MODULE + ASYNC.format(mark="@pytest.mark.asyncio", fixture=""),
            4,
        ),
        ("anyio", ("-p", "no:asyncio"), MODULE + ASYNC.format(mark="@pytest.mark.anyio", fixture=BACKEND), 4),
    ],
)
def test_the_fixtures_work_with_each_runner(
    pytester: pytest.Pytester, runner: str, plugins: tuple[str, ...], module: str, passed: int
) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(module)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error", *plugins)
    result.assert_outcomes(passed=passed)


def test_without_pytest_only_the_fixtures_are_missing() -> None:
    code = """
    import sys
    sys.modules["pytest"] = None
    from quotalimit.testing import Clock, exhaust
    try:
        from quotalimit.testing import clock
    except ImportError as error:
        assert "pip install pytest" in str(error), error
    else:
        raise AssertionError
    import quotalimit.testing
    assert not hasattr(quotalimit.testing, "another")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
