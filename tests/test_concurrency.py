"""Rules 2, 5 and 11 under threads, tasks and finalizers: exact counts, all or nothing, and no deadlock."""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import time_machine

from quotalimit import (
    CalendarWindow,
    LimitExceeded,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    TokenBucket,
    TokenBudget,
    configure,
    everyone,
    limiters_of,
    rate_limited,
    token_budget,
)
from quotalimit.algorithms.base import Algorithm
from quotalimit.limiters import Limiter

T0 = datetime(2026, 1, 1, tzinfo=UTC)
THREADS = 8

pytestmark = pytest.mark.usefixtures("wide_races", "clock")


@pytest.fixture
def clock() -> Iterator[Any]:
    """A clock that stands still, so that a count is exact whatever the machine's speed."""
    with time_machine.travel(T0, tick=False) as clock:
        yield clock


def in_threads(work: Callable[[int], Any], threads: int = THREADS) -> list[Any]:
    """Run work in threads that start together; what it returns by thread. What it raises is raised here."""
    barrier = threading.Barrier(threads)
    results: list[Any] = [None] * threads
    errors: list[BaseException] = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            results[number] = work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(20)
    assert not any(thread.is_alive() for thread in running), "deadlock"
    if errors:
        raise errors[0]
    return results


def open_holds(limiter: Limiter) -> list[Any]:
    """The open holds of a limiter, on all its limits."""
    return [hold for counts, _ in limiter.bound().places for hold in counts.open.all()]


def used(limiter: Limiter, key: str) -> int:
    return limiter.peek(key).used


algorithms = pytest.mark.parametrize(
    "limit",
    [SlidingWindow("500/minute"), CalendarWindow("500/minute"), TokenBucket("500/minute")],
    ids=lambda limit: limit.kind,
)


# One key


@algorithms
def test_rule_5_threads_are_admitted_exactly_n_times(limit: Algorithm) -> None:
    limiter = RateLimiter(limit)
    admitted = in_threads(lambda _: sum(limiter.allow("alice") for _ in range(100)))
    assert sum(admitted) == 500
    assert used(limiter, "alice") == 500


@algorithms
def test_rule_5_threads_are_admitted_exactly_n_units(limit: Algorithm) -> None:
    limiter = RateLimiter(limit)

    def work(number: int) -> int:
        costs = [random.Random(number).randint(1, 9) for _ in range(60)]
        return sum(cost for cost in costs if limiter.allow("alice", cost))

    admitted = sum(in_threads(work))
    assert used(limiter, "alice") == admitted
    assert 500 - 9 < admitted <= 500


@algorithms
async def test_rule_5_tasks_are_admitted_exactly_n_times(limit: Algorithm) -> None:
    @rate_limited(limit, key=everyone)
    async def chat() -> bool:
        await asyncio.sleep(0)
        return True

    answers = await asyncio.gather(*(chat() for _ in range(1_000)), return_exceptions=True)
    assert sum(answer is True for answer in answers) == 500
    assert sum(isinstance(answer, RateLimitExceeded) for answer in answers) == 500


@algorithms
async def test_rule_5_threads_and_tasks_together_are_admitted_exactly_n_times(limit: Algorithm) -> None:
    limiter = RateLimiter(limit)

    async def task() -> bool:
        await asyncio.sleep(0)
        return await limiter.allow_async("alice")

    threads = asyncio.to_thread(in_threads, lambda _: sum(limiter.allow("alice") for _ in range(50)), 4)
    by_threads, *by_tasks = await asyncio.gather(threads, *(task() for _ in range(500)))
    assert sum(by_threads) + sum(by_tasks) == 500


# Tokens


@algorithms
@pytest.mark.parametrize("reserve", [10, None])
def test_rule_11_threads_are_charged_exactly_what_they_used(limit: Algorithm, reserve: int | None) -> None:
    budget = TokenBudget(limit)

    @token_budget(budget, key=everyone, reserve=reserve, usage=lambda tokens: tokens)
    def chat(tokens: int) -> int:
        if tokens == 0:
            raise RuntimeError("released")
        return tokens

    def work(number: int) -> int:
        source, charged = random.Random(number), 0
        for _ in range(30):
            try:
                charged += chat(source.randint(0, 12))
            except (LimitExceeded, RuntimeError):
                pass
        return charged

    charged = sum(in_threads(work))
    assert used(budget, "everyone") == charged > 0
    assert open_holds(budget) == []


async def test_rule_11_tasks_are_charged_exactly_what_they_used_and_leave_no_hold() -> None:
    budget = TokenBudget("4_000/day")
    charged = 0

    @token_budget(budget, key=everyone, reserve=10, usage=lambda tokens: tokens)
    async def chat(tokens: int) -> int:
        nonlocal charged
        for _ in range(tokens + 1):
            await asyncio.sleep(0)
        if tokens == 0:
            raise RuntimeError("released")
        charged += tokens
        return tokens

    calls = [asyncio.ensure_future(chat(number % 10)) for number in range(1_000)]
    await asyncio.sleep(0)
    assert used(budget, "everyone") == 4_000, "rule 7: all of it is held, and nothing above"
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, LimitExceeded) for answer in answers) == 600
    assert used(budget, "everyone") == charged == 400 // 10 * sum(range(10))
    assert open_holds(budget) == []


async def test_rule_7_with_reserves_that_are_kept_the_budget_is_never_passed() -> None:
    budget = TokenBudget("100/day")
    most = 0

    @token_budget(budget, key=everyone, reserve=7, usage=lambda tokens: tokens)
    async def chat(tokens: int) -> int:
        nonlocal most
        most = max(most, used(budget, "everyone"))
        await asyncio.sleep(0)
        return tokens

    for _ in range(20):
        await asyncio.gather(*(chat(number % 8) for number in range(50)), return_exceptions=True)
        most = max(most, used(budget, "everyone"))
    assert 100 - 7 < most <= 100


def test_rule_11_settlements_that_race_with_asks_lose_nothing() -> None:
    """Half the threads hold and settle, and half charge, on one key; the last settlements may be late."""
    budget = TokenBudget("1_000_000/day")

    def work(number: int) -> int:
        source, charged = random.Random(number), 0
        for _ in range(100):
            tokens = source.randint(1, 20)
            if number % 2:
                budget.charge("alice", tokens)
            else:
                budget.reserve("alice", 10).settle(tokens)
            charged += tokens
        return charged

    charged = sum(in_threads(work))
    assert used(budget, "alice") == charged > 0
    assert open_holds(budget) == []


def test_rule_11_of_many_ends_of_one_hold_one_counts() -> None:
    budget = TokenBudget("1_000/day")
    for _ in range(20):
        budget.reset("alice")
        hold = budget.reserve("alice", 100)
        in_threads(lambda number, hold=hold: hold.settle(number + 1))
        assert hold.settlement is not None
        assert used(budget, "alice") == hold.settlement.charged
        assert 1 <= hold.settlement.charged <= THREADS


@pytest.mark.parametrize("late", [False, True])
def test_settlements_after_a_reset_do_nothing(late: bool) -> None:
    budget = TokenBudget("100/day")
    hold = budget.reserve("alice", 50)
    if late:
        with budget.bound().store._stripe("alice").lock:
            hold.settle(20)
        budget.reset("alice")
    else:
        budget.reset("alice")
        hold.settle(20)
    assert used(budget, "alice") == 0
    budget.charge("alice", 1)
    assert used(budget, "alice") == 1


def test_resets_that_race_with_settlements_leave_no_hold_and_no_debt() -> None:
    """Later settlements of open holds do nothing after a reset."""
    budget = TokenBudget("1_000_000/day")

    def work(number: int) -> None:
        for _ in range(100):
            if number % 4:
                budget.reserve("alice", 10).settle(20)
            else:
                budget.reset("alice")

    in_threads(work)
    assert open_holds(budget) == []
    budget.reset("alice")
    assert used(budget, "alice") == 0


# Several layers


def test_rule_2_threads_take_from_all_layers_or_from_none() -> None:
    """Every layer of every key has exactly the admitted calls, and every call that was refused still would be."""
    by_ip, by_user = RateLimiter("40/minute", "60/hour", name="ip"), RateLimiter("30/minute", name="user")
    tokens = TokenBudget("200/day", name="tokens")

    @rate_limited(by_ip, key="ip")
    @rate_limited(by_user, key="user", cost=lambda tokens: 1 + tokens % 2)
    @token_budget(tokens, key="user", reserve=lambda tokens: tokens, usage=lambda used: used)
    def chat(ip: str, user: str, tokens: int) -> int:
        return tokens

    def work(number: int) -> tuple[list[Any], list[Any]]:
        source, admitted, refused = random.Random(number), [], []
        for _ in range(50):
            call = (source.choice("abc"), source.choice("xyz"), source.randint(1, 12))
            try:
                chat(*call)
                admitted.append(call)
            except LimitExceeded:
                refused.append(call)
        return admitted, refused

    results = in_threads(work)
    admitted = [call for calls, _ in results for call in calls]
    calls_by_ip = Counter(ip for ip, _, _ in admitted)
    units_by_user: Counter[str] = Counter()
    tokens_by_user: Counter[str] = Counter()
    for _, user, count in admitted:
        units_by_user[user] += 1 + count % 2
        tokens_by_user[user] += count
    for ip in "abc":
        assert used(by_ip, ip) == calls_by_ip[ip] <= 40
    for user in "xyz":
        assert used(by_user, user) == units_by_user[user] <= 30
        assert used(tokens, user) == tokens_by_user[user] <= 200
    assert open_holds(tokens) == []
    refused = [call for _, calls in results for call in calls]
    assert refused
    for call in refused:
        ip, user, count = call
        assert (
            calls_by_ip[ip] == 40 or units_by_user[user] + 1 + count % 2 > 30 or tokens_by_user[user] + count > 200
        ), "refused though there was room everywhere, and no room has come since"


def test_rule_2_calls_that_take_the_same_keys_in_opposite_order_do_not_deadlock() -> None:
    limiter = RateLimiter("300/minute")

    @rate_limited(limiter, key="one")
    @rate_limited(limiter, key="other")
    def send(one: str, other: str) -> None: ...

    def work(number: int) -> int:
        names = ("alice", "bob") if number % 2 else ("bob", "alice")
        admitted = 0
        for _ in range(100):
            try:
                send(*names)
                admitted += 1
            except RateLimitExceeded:
                pass
        return admitted

    assert sum(in_threads(work)) == 300
    assert used(limiter, "alice") == used(limiter, "bob") == 300


def test_rule_2_two_layers_of_one_key_and_limiter_take_two_units_or_none() -> None:
    limiter = RateLimiter("301/minute")

    @rate_limited(limiter, key=everyone)
    @rate_limited(limiter, key=everyone)
    def send() -> bool:
        return True

    def work(_: int) -> int:
        admitted = 0
        for _ in range(50):
            try:
                admitted += send()
            except RateLimitExceeded:
                pass
        return admitted

    assert sum(in_threads(work)) == 150
    assert used(limiter, "everyone") == 300


def test_rule_2_on_two_stores_a_call_is_counted_on_both_or_on_neither() -> None:
    outer, inner = RateLimiter("1_000/minute", store=MemoryStore()), RateLimiter("100/minute", store=MemoryStore())
    tokens = TokenBudget("1_000/day", store=outer.bound().store)

    @rate_limited(outer, key=everyone)
    @token_budget(tokens, key=everyone, reserve=1)
    @rate_limited(inner, key=everyone)
    def chat() -> bool:
        return True

    def work(_: int) -> int:
        admitted = 0
        for _ in range(30):
            try:
                admitted += chat()
            except RateLimitExceeded:
                pass
        return admitted

    assert sum(in_threads(work)) == 100
    assert [used(limiter, "everyone") for limiter in (outer, tokens, inner)] == [100, 100, 100]
    assert open_holds(outer) == open_holds(tokens) == []


# The first call


@pytest.mark.parametrize("through", ["limiter", "function", "names"])
def test_rule_5_first_calls_that_race_to_bind_count_on_the_same_store(through: str) -> None:
    for attempt in range(30):
        limiter = RateLimiter("5/minute", name=f"limiter {attempt}")

        @rate_limited("5/minute", key=everyone, name=f"function {attempt}")
        def chat() -> bool:
            return True

        def ask(_: int, limiter: RateLimiter = limiter, chat: Any = chat, attempt: int = attempt) -> bool:
            try:
                if through == "limiter":
                    limiter.acquire("alice")
                elif through == "function":
                    chat()
                else:
                    RateLimiter("5/minute", name=f"shared {attempt}").acquire("alice")
            except RateLimitExceeded:
                return False
            return True

        assert sum(in_threads(ask)) == 5


def test_first_calls_that_race_for_a_tier_count_in_one_place() -> None:
    for _ in range(30):

        @rate_limited(lambda plan: plan, key=everyone)
        def chat(plan: str) -> bool:
            return True

        def ask(_: int, chat: Any = chat) -> bool:
            try:
                return bool(chat("5/minute"))
            except RateLimitExceeded:
                return False

        assert sum(in_threads(ask)) == 5


def test_configure_may_race_with_calls() -> None:
    budget = TokenBudget("1_000_000/day")

    @rate_limited("1_000_000/day", key="user")
    @token_budget(budget, key="user", reserve=2)
    def chat(user: str) -> str:
        return user

    def work(number: int) -> None:
        for turn in range(100):
            if number == 0:
                configure(store=MemoryStore())
            else:
                chat(f"user {turn % 3}")

    in_threads(work, 5)
    last = MemoryStore()
    configure(store=last)
    chat("alice")
    assert [limiter.bound().store for limiter in limiters_of(chat)] == [last, last]
    assert used(budget, "alice") == 2
    assert open_holds(budget) == []


# Finalizers


class Meddling(SlidingWindow):
    """A sliding window in which the garbage collector strikes in a given place: under the store's locks."""

    def __init__(self, rate: str, place: str) -> None:
        super().__init__(rate)
        self.place = place
        self.struck = 0
        self.strike: Callable[[], object] = lambda: None

    def _at(self, place: str) -> None:
        if place == self.place:
            self.struck += 1
            self.strike()

    def fits(self, state: Any, need: int, now: int) -> int:
        self._at("fits")
        return super().fits(state, need, now)

    def take(self, state: Any, cost: int, now: int) -> Any:
        self._at("take")
        return super().take(state, cost, now)

    def adjust(self, state: Any, mark: int, delta: int, now: int) -> Any:
        self._at("adjust")
        return super().adjust(state, mark, delta, now)

    def redate(self, state: Any, now: int) -> Any:
        self._at("redate")
        return super().redate(state, now)

    def used(self, state: Any, now: int) -> int:
        self._at("used")
        return super().used(state, now)

    def matters(self, state: Any, now: int) -> bool:
        self._at("matters")
        return super().matters(state, now)


def abandoned_hold(budget: TokenBudget, key: str) -> None:
    """A hold of 5 that only the garbage collector will find."""
    cycle: list[Any] = [budget.reserve(key, 5)]
    cycle.append(cycle)


def abandoned_stream(budget: TokenBudget, key: str) -> None:
    """A running stream that held 9 and has used 5, which only the garbage collector will find."""

    @token_budget(budget, key="key", reserve=9, usage=lambda item: item)
    def stream(key: str) -> Generator[int]:
        yield from (3, 2, 1)

    running = stream(key)
    assert [next(running), next(running)] == [3, 2]
    cycle: list[Any] = [running]
    cycle.append(cycle)


@pytest.mark.parametrize("abandon", [abandoned_hold, abandoned_stream])
@pytest.mark.parametrize("whose", ["the same key", "another key"])
@pytest.mark.parametrize("place", ["fits", "take", "adjust", "redate", "used", "matters"])
def test_rule_11_a_finalizer_that_settles_under_the_stores_locks_neither_deadlocks_nor_is_lost(
    clock: Any, place: str, whose: str, abandon: Callable[[TokenBudget, str], None]
) -> None:
    limit = Meddling("100/minute", place)
    budget = TokenBudget(limit)
    victim = "alice" if whose == "the same key" else "bob"

    def work(_: int) -> None:
        gc.disable()
        try:
            budget.charge("dave", 1)  # a minute from now, states retire and are swept, for this one is over
            clock.shift(40)
            budget.charge("alice", 1)
            budget.charge("carol", 1)
            abandon(budget, victim)
            clock.shift(25)
            limit.strike = lambda: gc.collect(0)
            for _ in range(3):
                budget.reserve("alice", 1).settle(2)
        finally:
            limit.strike = lambda: None
            gc.enable()

    in_threads(work, 1)
    assert limit.struck
    assert used(budget, victim) == 5 + (1 + 3 * 2) * (victim == "alice")
    assert open_holds(budget) == [], "settled by the next call at the latest"


def test_rule_11_a_settlement_that_came_while_the_lock_was_taken_is_settled_by_the_next_call() -> None:
    budget = TokenBudget("100/day")
    hold = budget.reserve("alice", 50)
    with budget.bound().store._stripe("alice").lock:
        hold.settle(20)
        assert open_holds(budget) != []
    assert used(budget, "alice") == 20
    assert open_holds(budget) == []


# Sweeping


@pytest.mark.parametrize("kind", ["sliding", "calendar", "bucket"])
def test_rule_22_sweeping_that_races_with_hits_loses_no_state(clock: Any, kind: str) -> None:
    """In each round all threads hit all keys at one moment; how many hits each key is granted is known."""
    limits = {
        "sliding": SlidingWindow("3/2 seconds"),
        "calendar": CalendarWindow("3/minute"),
        "bucket": TokenBucket("1/second", burst=3),
    }
    step = {"sliding": 1.0, "calendar": 30.0, "bucket": 1.0}[kind]
    limiter = RateLimiter(limits[kind])
    keys = [f"key {number}" for number in range(60)]
    granted: Counter[tuple[int, str]] = Counter()
    totals = threading.Lock()

    def hit(number: int, round_: int) -> None:
        mine: Counter[tuple[int, str]] = Counter()
        order = keys[:]
        random.Random(number).shuffle(order)
        for key in order:
            mine[round_, key] += limiter.allow(key)
        with totals:
            granted.update(mine)

    expected = []
    for round_ in range(12):
        in_threads(lambda number, round_=round_: hit(number, round_), 4)
        clock.shift(step)
        if kind == "bucket":  # three at first, then one a second
            expected.append(3 if round_ == 0 else 1)
        else:  # all three in the first half of a window, none in the second
            expected.append(0 if round_ % 2 else 3)
    for round_, units in enumerate(expected):
        assert {granted[round_, key] for key in keys} == {units}, f"round {round_}"


def test_rule_22_a_state_that_a_sweep_looks_at_is_not_lost_to_a_call_of_its_key(clock: Any) -> None:
    """While one thread looks whether the last retired state still matters, another one calls with its key."""
    limit = Meddling("2/minute", "matters")
    limiter = RateLimiter(limit)
    _retire_the_state_of_bob(limiter, clock)
    answers: list[bool] = []

    def call() -> None:
        limit.strike = lambda: None
        thread = threading.Thread(target=lambda: answers.append(limiter.allow("bob")), daemon=True)
        thread.start()
        thread.join(0.1)  # it may well have to wait until the sweep is over

    limit.strike = call
    in_threads(lambda _: limiter.peek("alice"), 1)
    while not answers:
        pass
    assert answers == [False]
    assert used(limiter, "bob") == 2


def test_rule_22_wherever_a_call_stands_when_a_sweep_ends_its_state_is_not_lost(clock: Any) -> None:
    """One thread has the last retired state in its hands; another calls with its key, and is stopped at each of its
    lines in turn until the sweep is over."""
    line = 0
    stopped = True
    while stopped:
        line += 1
        stopped = _call_that_sees_a_sweep_end_at(line, clock)
    assert line > 10


def _retire_the_state_of_bob(limiter: RateLimiter, clock: Any) -> None:
    """Let it be the only one that is set aside, to be looked at by the next call. It matters, and is at its limit."""
    limiter.acquire("carol")
    clock.shift(40)
    limiter.acquire("bob", 2)
    clock.shift(25)
    limiter.peek("alice")  # the states retire, for that of carol does not matter any more
    limiter.reset("carol")


def _call_that_sees_a_sweep_end_at(line: int, clock: Any) -> bool:
    """Whether a call has so many lines; fails if it was admitted, or changed the count."""
    limit = Meddling("2/minute", "matters")
    limiter = RateLimiter(limit)
    _retire_the_state_of_bob(limiter, clock)
    caller_stopped, sweep_ended = threading.Event(), threading.Event()
    seen = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal seen
        if "/quotalimit/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                caller_stopped.set()
                sweep_ended.wait(0.5)  # no longer: it may hold what the sweep needs to end
        return trace

    answers: list[bool] = []

    def call() -> None:
        sys.settrace(trace)
        try:
            answers.append(limiter.allow("bob"))
        finally:
            sys.settrace(None)

    caller = threading.Thread(target=call, daemon=True)

    def strike() -> None:
        limit.strike = lambda: None
        caller.start()
        caller_stopped.wait(0.01)  # or it waits for the sweep, which is right too

    limit.strike = strike
    limiter.peek("alice")
    sweep_ended.set()
    caller.join(20)
    assert answers == [False], f"stopped at line {line}"
    assert used(limiter, "bob") == 2
    return seen >= line


async def test_rule_5_a_thousand_tasks_on_a_thousand_keys_do_not_mix_them() -> None:
    limiter = RateLimiter("2/minute")

    async def ask(number: int) -> list[bool]:
        answers = []
        for _ in range(3):
            answers.append(await limiter.allow_async(number))
            await asyncio.sleep(0)
        return answers

    assert await asyncio.gather(*(ask(number) for number in range(1_000))) == [[True, True, False]] * 1_000
