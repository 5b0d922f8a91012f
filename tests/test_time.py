"""Rules 18 and 19: frozen, moved and stepped-back clocks, with freezegun and time-machine as they are.

What freezegun itself does oddly, and the recipe for it:

- It leaves real time to whatever is called by `threading`, `queue` and a few other modules within five calls: a thread
  whose target is `limiter.peek` itself sees the real time. Take `threading` out of its ignore list, or use
  time-machine.
- It stops `time.monotonic` too, and with it the event loop: `asyncio.sleep` and calls that wait never wake unless it is
  given `real_asyncio=True`. time-machine leaves monotonic clocks alone.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import freezegun.config
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
    clock,
    rate_limited,
    token_budget,
)
from quotalimit.algorithms.base import Algorithm

T0 = datetime(2026, 3, 1, 12, tzinfo=UTC)

freezers = pytest.mark.parametrize(
    "freeze",
    [lambda when: freeze_time(when, real_asyncio=True), lambda when: time_machine.travel(when, tick=False)],
    ids=["freezegun", "time-machine"],
)
Freeze = Callable[[Any], Any]


@rate_limited("2/minute", key="user")
def chat(user: str) -> str:
    """Decorated when this module is imported, by the real clock."""
    return user


@rate_limited("2/minute", key="user")
async def chat_async(user: str) -> str:
    return user


@token_budget("10/day", key="user", reserve=5)
def ask(user: str) -> str:
    return user


class Bot:
    @rate_limited("2/minute", key="user")
    def chat(self, user: str) -> str:
        return user


def retry_after(call: Callable[..., Any], *args: Any) -> float | None:
    """How long a call that must be refused is to wait; an async one is run to its end."""
    with pytest.raises((RateLimitExceeded, TokenBudgetExceeded)) as refused:
        run(call, *args)
    return refused.value.retry_after


def run(call: Callable[..., Any], *args: Any) -> Any:
    result = call(*args)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


def after(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


# Rule 18: frozen and moved clocks


@freezers
@pytest.mark.parametrize("where", ["import", "import, async", "method", "inside"])
def test_rule_18_a_window_is_as_long_as_the_frozen_clock_says(freeze: Freeze, where: str) -> None:
    with freeze(T0) as frozen:
        inside = rate_limited("2/minute", key="user")(lambda user: user)
        call = {"import": chat, "import, async": chat_async, "method": Bot().chat, "inside": inside}[where]
        assert [run(call, "alice"), run(call, "alice")] == ["alice", "alice"]
        assert retry_after(call, "alice") == 60.0
        frozen.move_to(after(59.999_990))
        assert retry_after(call, "alice") == pytest.approx(0.000_010)
        frozen.move_to(after(60))
        assert run(call, "alice") == "alice"


@freezers
def test_rule_18_a_day_ends_where_the_frozen_clock_says(freeze: Freeze) -> None:
    with freeze(T0) as frozen:
        assert [ask("alice"), ask("alice")] == ["alice", "alice"]
        assert retry_after(ask, "alice") == 12 * 3600
        frozen.move_to(datetime(2026, 3, 1, 23, 59, 59, 999_990, tzinfo=UTC))
        assert retry_after(ask, "alice") == pytest.approx(0.000_010)
        frozen.move_to(datetime(2026, 3, 2, tzinfo=UTC))
        assert ask("alice") == "alice"


def test_rule_18_freezegun_ticks_and_moves() -> None:
    with freeze_time(T0) as frozen:
        chat("alice"), chat("alice")
        frozen.tick(59)
        assert retry_after(chat, "alice") == 1.0
        frozen.tick(timedelta(milliseconds=500))
        assert retry_after(chat, "alice") == 0.5
        frozen.tick(0.5)
        chat("alice")
        frozen.move_to("2027-01-01")
        chat("alice"), chat("alice")


def test_rule_18_time_machine_shifts_and_moves() -> None:
    with time_machine.travel(T0, tick=False) as traveller:
        chat("alice"), chat("alice")
        traveller.shift(59)
        assert retry_after(chat, "alice") == 1.0
        traveller.shift(timedelta(seconds=1))
        chat("alice")
        traveller.move_to("2027-01-01T00:00:00Z")
        chat("alice"), chat("alice")


@pytest.mark.parametrize("freeze", [lambda: freeze_time(T0, tick=True), lambda: time_machine.travel(T0, tick=True)])
def test_rule_18_a_clock_that_runs_on_from_another_time_is_followed(freeze: Callable[[], Any]) -> None:
    with freeze() as frozen:
        chat("alice"), chat("alice")
        first = retry_after(chat, "alice")
        assert first is not None
        assert 0 < first <= 60
        frozen.move_to(after(3_600))
        chat("alice")


def test_rule_18_freezeguns_auto_tick_moves_the_clock_at_each_call() -> None:
    """The clock is read at least once in each call: with a period a reading, no call is ever refused."""
    with freeze_time(T0, auto_tick_seconds=60):
        for _ in range(10):
            chat("alice")


def test_rule_18_freezeguns_tz_offset_does_not_move_the_limits() -> None:
    """It moves local time; days are UTC days, and `reset_at` is an aware UTC datetime."""
    with freeze_time("2026-03-01 20:00", tz_offset=-8) as frozen:
        ask("alice"), ask("alice")
        with pytest.raises(TokenBudgetExceeded) as refused:
            ask("alice")
        assert refused.value.retry_after == 4 * 3600
        assert refused.value.reset_at == datetime(2026, 3, 2, tzinfo=UTC)
        assert refused.value.reset_at.utcoffset() == timedelta(0)
        frozen.tick(4 * 3600)
        ask("alice")


@freeze_time(T0)
def test_rule_18_as_a_decorator_freezegun() -> None:
    chat("alice"), chat("alice")
    assert retry_after(chat, "alice") == 60.0


@time_machine.travel(T0, tick=False)
def test_rule_18_as_a_decorator_time_machine() -> None:
    chat("alice"), chat("alice")
    assert retry_after(chat, "alice") == 60.0


@freeze_time(T0, real_asyncio=True)
async def test_rule_18_as_a_decorator_of_an_async_test_freezegun() -> None:
    await chat_async("alice")
    await asyncio.sleep(0.001)
    await chat_async("alice")
    with pytest.raises(RateLimitExceeded) as refused:
        await chat_async("alice")
    assert refused.value.retry_after == 60.0


@time_machine.travel(T0, tick=False)
async def test_rule_18_as_a_decorator_of_an_async_test_time_machine() -> None:
    await chat_async("alice")
    await asyncio.sleep(0.001)
    await chat_async("alice")
    with pytest.raises(RateLimitExceeded) as refused:
        await chat_async("alice")
    assert refused.value.retry_after == 60.0


@freeze_time(T0)
class TestFrozenClass:
    def test_rule_18_a_frozen_test_class(self) -> None:
        chat("alice"), chat("alice")
        assert retry_after(chat, "alice") == 60.0


@freezers
@pytest.mark.parametrize("when", [datetime(2001, 1, 1, tzinfo=UTC), datetime(2050, 1, 1, tzinfo=UTC)])
def test_rule_18_calls_before_inside_and_after_a_frozen_block(freeze: Freeze, when: datetime) -> None:
    """Going to another time is a leap or a step back of the clock, and so is coming home."""
    chat("alice")
    with freeze(when) as frozen:
        if when.year > 2030:  # the call before is long past
            chat("alice")
        chat("alice")
        assert retry_after(chat, "alice") == 60.0
        frozen.move_to(when + timedelta(seconds=60))
        chat("alice"), chat("alice")
    if when.year < 2030:  # home is years later
        chat("alice"), chat("alice")
    wait = retry_after(chat, "alice")
    assert wait is not None
    assert 0 < wait <= 60


@freezers
def test_rule_18_a_function_decorated_inside_a_frozen_block_keeps_counting_after_it(freeze: Freeze) -> None:
    with freeze(datetime(2020, 1, 1, tzinfo=UTC)):

        @rate_limited("2/minute", key="user")
        @token_budget("10/day", key="user", reserve=1)
        def send(user: str) -> str:
            return user

        send("alice"), send("alice")
        assert retry_after(send, "alice") == 60.0
    assert send("alice") == "alice"
    send("alice")
    with pytest.raises(RateLimitExceeded) as refused:
        send("alice")
    assert abs(refused.value.reset_at.timestamp() - time.time()) < 120


@freezers
def test_rule_18_a_hold_taken_before_and_settled_inside_or_after_a_frozen_block_counts_once(freeze: Freeze) -> None:
    budget = TokenBudget(TokenBucket("10/day"), store=MemoryStore())
    with freeze(T0):
        first = budget.reserve("alice", 6)
        with freeze(T0):
            first.settle(2)
            second = budget.reserve("alice", 6)
        second.settle(1)
        assert budget.peek("alice").used == 3


@pytest.mark.parametrize("tool", ["freezegun", "time_machine"])
def test_rule_18_quotalimit_may_be_imported_inside_a_frozen_block(tool: str) -> None:
    code = f"""
        import time, sys
        from datetime import UTC, datetime
        import {tool}
        real = time.time()
        when = datetime(2020, 5, 5, 12, tzinfo=UTC)
        freeze = getattr({tool}, "freeze_time", None) or (lambda when: {tool}.travel(when, tick=False))
        with freeze(when) as frozen:
            assert "quotalimit" not in sys.modules
            import quotalimit as q

            @q.rate_limited("2/minute", "1_000/hour", key="user")
            @q.token_budget(q.CalendarWindow("10/day", tz="Europe/Paris"), key="user", reserve=5)
            def chat(user):
                return user

            def refusal():
                try:
                    chat("alice")
                except q.LimitExceeded as error:
                    return error

            chat("alice"), chat("alice")
            assert refusal().reset_at == datetime(2020, 5, 5, 22, tzinfo=UTC), refusal().reset_at
            assert refusal().retry_after == 10 * 3600
            frozen.move_to(datetime(2020, 5, 5, 22, tzinfo=UTC))
            chat("alice"), chat("alice")
        chat("alice"), chat("alice")
        error = refusal()
        assert real < error.reset_at.timestamp() < real + 90_000, error.reset_at
        assert type(error.reset_at) is datetime, type(error.reset_at)
        assert 0 < error.retry_after <= 90_000
    """
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


# Rule 18: what freezegun does oddly


@contextmanager
def freezegun_that_freezes_threads() -> Iterator[None]:
    """The recipe: frozen time also for what `threading` and `queue` call directly."""
    ignored = [name for name in freezegun.config.DEFAULT_IGNORE_LIST if name not in ("threading", "queue")]
    freezegun.config.configure(default_ignore_list=ignored)
    try:
        yield
    finally:
        freezegun.config.reset_config()


def in_thread(call: Callable[[], Any]) -> Any:
    """What a call returns in a thread whose target is little more than the call itself."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def test_rule_18_recipe_threads_under_freezegun() -> None:
    """freezegun gives real time to shallow threads: `threading` is taken out of its ignore list."""
    limiter = RateLimiter("2/minute", store=MemoryStore())
    with freezegun_that_freezes_threads(), freeze_time(T0):
        assert in_thread(clock.now) == int(T0.timestamp()) * 1_000_000
        limiter.acquire("alice", 2)
        assert in_thread(lambda: limiter.peek("alice").used) == 2
        assert not in_thread(lambda: limiter.allow("alice"))
        assert limiter.peek("alice").used == 2


def test_rule_18_recipe_threads_under_time_machine() -> None:
    """time-machine moves the clock of every thread, as it is."""
    limiter = RateLimiter("2/minute", store=MemoryStore())
    with time_machine.travel(T0, tick=False):
        assert in_thread(clock.now) == int(T0.timestamp()) * 1_000_000
        assert in_thread(lambda: limiter.allow("alice", 2))
        assert limiter.peek("alice").reset_at == after(60)


@freezers
async def test_rule_18_recipe_sleeping_in_asyncio_under_a_frozen_clock(freeze: Freeze) -> None:
    """freezegun stops the event loop's clock unless it is given `real_asyncio=True`; time-machine leaves it alone."""
    limiter = RateLimiter("1/minute", store=MemoryStore())
    with freeze(T0) as frozen:
        await asyncio.wait_for(asyncio.sleep(0.001), 10)
        await limiter.acquire_async("alice")
        frozen.move_to(after(59.99))
        await asyncio.wait_for(limiter.acquire_async("alice", wait=1), 10)


# Rule 19: the clock steps back

HOUR, DAY = 3_600, 86_400
LIMITS = [
    SlidingWindow("4/minute"),
    CalendarWindow("4/minute"),
    CalendarWindow("4/day", tz="Europe/Paris"),
    TokenBucket("4/minute"),
    TokenBucket("8/minute", burst=4),
]
limits = pytest.mark.parametrize("limit", LIMITS, ids=str)
back = pytest.mark.parametrize("back", [1, HOUR, DAY, 400 * DAY])
both = pytest.mark.parametrize("asynchronous", [False, True])


def window(limit: Algorithm) -> float:
    """The longest that a full limit may take until it is whole again."""
    if isinstance(limit, TokenBucket):
        return 30 if limit.rate.amount == 8 else 60
    return {"minute": 60, "day": 90_000}[limit.rate.unit]


async def acquire(limiter: RateLimiter, cost: int, asynchronous: bool) -> Any:
    return await limiter.acquire_async("alice", cost) if asynchronous else limiter.acquire("alice", cost)


@limits
@back
@both
async def test_rule_19_after_a_step_back_nobody_gains_and_nobody_waits_longer_than_one_window(
    limit: Algorithm, back: int, asynchronous: bool
) -> None:
    limiter = RateLimiter(limit, store=MemoryStore())
    with time_machine.travel(T0, tick=False) as traveller:
        await acquire(limiter, 3, asynchronous)
        traveller.shift(-back)
        await acquire(limiter, 1, asynchronous)
        with pytest.raises(RateLimitExceeded) as refused:
            await acquire(limiter, 1, asynchronous)
        assert refused.value.used == 4
        assert refused.value.retry_after is not None
        assert refused.value.retry_after <= window(limit)
        whole = (refused.value.reset_at - datetime.now(UTC)).total_seconds()
        assert whole <= window(limit)
        traveller.shift(whole)
        assert await acquire(limiter, 4, asynchronous)


@limits
@back
@pytest.mark.parametrize("question", ["refused call", "peek", "settlement"])
def test_rule_19_the_window_runs_from_the_first_question_whatever_it_is(
    limit: Algorithm, back: int, question: str
) -> None:
    """A store that sees a state newer than now re-dates it and keeps it so: a second question finds time has passed."""
    store = MemoryStore()
    limiter = RateLimiter(limit, name="limit", store=store)
    budget = TokenBudget(limit, name="budget", store=store)
    with time_machine.travel(T0, tick=False) as traveller:
        limiter.acquire("alice", 4)
        hold = budget.reserve("alice", 4)
        traveller.shift(-back)
        counted: RateLimiter | TokenBudget = limiter
        if question == "peek":
            limiter.peek("alice")
        elif question == "refused call":
            assert not limiter.allow("alice")
        else:
            hold.settle(4)
            counted = budget
        traveller.shift(window(limit))
        assert counted.peek("alice").used == 0


@limits
@back
def test_rule_19_a_settlement_hides_a_step_back_from_no_other_limit_of_the_key(limit: Algorithm, back: int) -> None:
    store = MemoryStore()
    limiter = RateLimiter(limit, name="limit", store=store)
    budget = TokenBudget(limit, name="budget", store=store)
    with time_machine.travel(T0, tick=False) as traveller:
        limiter.acquire("alice", 4)
        hold = budget.reserve("alice", 4)
        traveller.shift(-back)
        hold.settle(4)
        waits = retry_after(limiter.acquire, "alice")
        assert waits is not None
        assert waits <= window(limit)


def test_rule_19_a_step_back_since_a_settlement_is_seen() -> None:
    """From the first question after it, the bucket refills."""
    budget = TokenBudget(TokenBucket("60/minute"), store=MemoryStore())
    with time_machine.travel(T0, tick=False) as traveller:
        hold = budget.reserve("alice", 40)
        traveller.shift(20)
        hold.settle(60)
        traveller.shift(-10)
        assert budget.peek("alice").used == 40
        traveller.shift(10)
        assert budget.peek("alice").used == 30


@back
def test_rule_19_entries_of_a_sliding_window_keep_their_distances(back: int) -> None:
    limiter = RateLimiter("3/minute", store=MemoryStore())
    with time_machine.travel(T0, tick=False) as traveller:
        limiter.acquire("alice")
        traveller.shift(20)
        limiter.acquire("alice")
        traveller.shift(10)
        limiter.acquire("alice")
        traveller.shift(-back)
        assert retry_after(limiter.acquire, "alice") == 30.0
        traveller.shift(30)
        limiter.acquire("alice")
        assert retry_after(limiter.acquire, "alice") == 20.0
        traveller.shift(20)
        limiter.acquire("alice")
        assert retry_after(limiter.acquire, "alice") == 10.0


@pytest.mark.parametrize("weighted", [False, True])
def test_rule_19_stepping_back_again_and_again_gains_nothing(weighted: bool) -> None:
    limiter = RateLimiter("10/minute", store=MemoryStore())
    with time_machine.travel(T0, tick=False) as traveller:
        admitted = 0
        for _ in range(30):
            admitted += (1 + weighted) * limiter.allow("alice", 1 + weighted)
            traveller.shift(-HOUR)
        assert admitted == 10


@limits
@back
@pytest.mark.parametrize("used", [0, 1, 3, 6])
def test_rule_19_a_hold_survives_a_step_back(limit: Algorithm, back: int, used: int) -> None:
    budget = TokenBudget(limit, store=MemoryStore())
    with time_machine.travel(T0, tick=False) as traveller:
        hold = budget.reserve("alice", 3)
        traveller.shift(-back)
        budget.charge("alice", 1)
        hold.settle(used)
        assert budget.peek("alice").used == 1 + used


@limits
@pytest.mark.parametrize("strangers", [0, 400])
@pytest.mark.parametrize("same_window", [False, True])
def test_rule_19_a_hold_whose_window_is_gone_by_a_stepped_back_clock_is_not_given_back(
    limit: Algorithm, same_window: bool, strangers: int
) -> None:
    """The clock steps back and runs on, maybe into the same window as before, while strangers' calls sweep; a late
    refund must give no room in the present one."""
    budget = TokenBudget(limit, store=MemoryStore())
    length = window(limit)
    with time_machine.travel(T0, tick=False) as traveller:
        hold = budget.reserve("alice", 4)
        traveller.shift(-length if same_window else -2 * DAY)
        budget.peek("alice")
        passing = length if same_window else 2 * length
        for number in range(strangers):
            traveller.shift(passing / strangers)
            budget.charge(number, 1)
        traveller.move_to(T0.timestamp() + (0 if same_window else passing - 2 * DAY))
        budget.charge("alice", 3)
        hold.settle(0)
        assert budget.peek("alice").used == 3


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.sampled_from([0.0, 1.0, 7.5, 20.0, 59.0, 60.0, 61.0, 3_600.0])),
        st.tuples(st.just("back"), st.sampled_from([0.5, 30.0, 60.0, 3_600.0, 86_400.0])),
        st.tuples(st.just("call"), st.integers(1, 5)),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=200)
@given(limit=st.sampled_from([limit for limit in LIMITS if not isinstance(limit, CalendarWindow)]), steps=STEPS)
def test_rule_19_on_any_clock_no_period_that_has_really_passed_admits_more_than_it_may(
    limit: Algorithm, steps: list[tuple[str, float]]
) -> None:
    """Time that really passes is what the clock runs forward; a limit may never admit more than that allows."""
    limiter = RateLimiter(limit, store=MemoryStore())
    admitted: list[tuple[float, int]] = []
    passed = 0.0
    with time_machine.travel(T0, tick=False) as traveller:
        for step, amount in steps:
            if step == "wait":
                traveller.shift(amount)
                passed += amount
            elif step == "back":
                limiter.peek("alice")
                traveller.shift(-amount)
                limiter.peek("alice")
            elif limiter.allow("alice", amount):
                admitted.append((passed, int(amount)))
    for first, (start, _) in enumerate(admitted):
        for last in range(first, len(admitted)):
            units = sum(cost for _, cost in admitted[first : last + 1])
            elapsed = admitted[last][0] - start
            if isinstance(limit, SlidingWindow):
                assert elapsed >= 60 or units <= 4
            else:
                assert units <= 4 + limit.rate.amount * elapsed / 60 + 1e-6


@settings(deadline=None, max_examples=200)
@given(limit=st.sampled_from(LIMITS), steps=STEPS, back=st.sampled_from([0.5, 3_600.0, 86_400.0]))
def test_rule_19_after_any_history_and_a_step_back_one_window_makes_a_limit_whole(
    limit: Algorithm, steps: list[tuple[str, float]], back: float
) -> None:
    limiter = RateLimiter(limit, store=MemoryStore())
    with time_machine.travel(T0, tick=False) as traveller:
        for step, amount in steps:
            if step == "call":
                limiter.allow("alice", amount)
            else:
                traveller.shift(amount if step == "wait" else -amount)
        before = limiter.peek("alice").remaining
        traveller.shift(-back)
        assert limiter.peek("alice").remaining <= before
        wait = limiter.peek("alice").retry_after
        assert wait is not None
        assert wait <= window(limit)
        traveller.shift(window(limit))
        assert limiter.allow("alice", 4)
