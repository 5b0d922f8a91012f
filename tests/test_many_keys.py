"""Rule 22: state that no longer matters goes away as calls come, state that matters never does, and a hit is O(1)."""

from __future__ import annotations

import gc
import math
import random
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import pytest
import time_machine
from hypothesis import given, settings
from hypothesis import strategies as st

from quotalimit import (
    CalendarWindow,
    LimitExceeded,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    StoreFull,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    everyone,
    limiters_of,
    rate_limited,
    token_budget,
)
from quotalimit.algorithms.base import Algorithm
from quotalimit.keys import encode
from quotalimit.limiters import Limiter
from quotalimit.stores import memory_counts

from .helpers import used

T0 = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def clock() -> Iterator[Any]:
    """A clock that stands still until it is moved."""
    with time_machine.travel(T0, tick=False) as clock:
        yield clock


def states(limiter: Limiter) -> int:
    """For how many identities a limiter keeps a state, on its first limit."""
    return len(limiter.bound().places[0][0])


def traffic(limiter: RateLimiter, clock: Any, seconds: float, calls: int) -> None:
    """One busy caller, evenly over some time."""
    for _ in range(calls):
        clock.shift(seconds / calls)
        limiter.allow("busy", 0)


LIMITS = [
    SlidingWindow("10/minute"),
    CalendarWindow("10/minute"),
    TokenBucket("10/minute"),
    TokenBucket("20/minute", burst=3),
    TokenBucket("2/minute", burst=10),
]
limits = pytest.mark.parametrize("limit", LIMITS, ids=str)


def whole_after(limit: Algorithm) -> float:
    """Seconds after which a full limit says nothing any more."""
    return 60 * limit.capacity / limit.rate.amount if isinstance(limit, TokenBucket) else 60


# What goes away


@limits
@pytest.mark.parametrize("cost", [1, 2], ids=["units", "weighted"])
def test_rule_22_after_two_windows_of_traffic_no_idle_key_has_a_state(clock: Any, limit: Algorithm, cost: int) -> None:
    limiter = RateLimiter(limit, store=MemoryStore())
    for number in range(500):
        limiter.acquire(number, cost)
        clock.shift(0.1)
    assert states(limiter) == 500
    traffic(limiter, clock, 2 * max(60, whole_after(limit)), 600)
    assert states(limiter) == 0


@limits
def test_rule_22_what_settlements_left_goes_away_too(clock: Any, limit: Algorithm) -> None:
    store = MemoryStore()
    budget = TokenBudget(limit, name="budget", store=store)
    for number in range(100):
        hold = budget.reserve(number, 2)
        clock.shift(0.1)
        hold.settle(number % 3)
    for _ in range(400):
        clock.shift(max(60, whole_after(limit)) / 100)
        budget.charge("busy", 0)
    assert states(budget) == 0
    assert budget.bound().places[0][0].open == {}


@limits
def test_rule_22_keys_that_come_once_each_never_pile_up(clock: Any, limit: Algorithm) -> None:
    """Ten calls a second, each of a new address: about what came in two windows is kept, and not all."""
    limiter = RateLimiter(limit, store=MemoryStore())
    most = 0
    for number in range(6_000):
        limiter.acquire(number)
        clock.shift(0.1)
        most = max(most, states(limiter))
    assert most <= 10 * 3 * max(60, whole_after(limit))


@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from([0, 0, 0, 1, 20, 70])), max_size=400))
@settings(max_examples=40)
def test_rule_22_many_keys_are_counted_like_few(trace: list[tuple[int, float]]) -> None:
    """From some number on, states are spread over many dicts: here from nine on, and never."""
    with time_machine.travel(T0, tick=False) as clock, mock.patch.object(memory_counts, "_MANY", 8) as many:
        spread, together = (RateLimiter("2/minute", store=MemoryStore()) for _ in range(2))
        for key, later in trace:
            clock.shift(later)
            memory_counts._MANY = many
            answer = spread.allow(key)
            memory_counts._MANY = sys.maxsize
            assert answer == together.allow(key)
            assert spread.peek(key).used == together.peek(key).used


def test_rule_22_no_dict_of_states_grows_so_large_that_a_call_pauses(clock: Any) -> None:
    """A dict is copied as it grows: of a million keys in tens of milliseconds. Here fewer are many."""
    assert memory_counts._MANY < 70_000
    limiter = RateLimiter("2/hour", store=MemoryStore())
    ((counts, _),) = limiter.bound().places
    with mock.patch.object(memory_counts, "_MANY", 1_000):
        for number in range(10_000):
            limiter.allow(("caller", number))
            assert type(counts.young) is not dict or len(counts.young) < 1_100
    identities = {encode(("caller", number)) for number in range(10_000)}
    dicts = [found for found in gc.get_objects() if type(found) is dict and type(next(iter(found), None)) is bytes]
    sizes = [len(found) for found in dicts if not identities.isdisjoint(found)]
    assert states(limiter) == sum(sizes) == 10_000
    assert max(sizes) < 1_100


@pytest.mark.parametrize("back", [3_600, 86_400])
@limits
def test_rule_22_after_a_step_back_of_the_clock_idle_keys_go_away_within_a_few_windows(
    clock: Any, limit: Algorithm, back: int
) -> None:
    """Rule 19: a store that sees a state newer than now re-dates it; a sweep sees it too."""
    limiter = RateLimiter(limit, store=MemoryStore())
    for number in range(100):
        limiter.acquire(number)
    clock.shift(-back)
    traffic(limiter, clock, 4 * max(60, whole_after(limit)), 400)
    assert states(limiter) == 0


@limits
def test_rule_22_a_full_limiter_takes_new_keys_one_window_after_a_step_back_of_the_clock(
    clock: Any, limit: Algorithm
) -> None:
    """Rule 19: from the first question after a step back, nobody is refused for longer than one window."""
    limiter = RateLimiter(limit, store=MemoryStore(max_keys=3))
    for name in ("alice", "bob", "carol"):
        limiter.acquire(name)
    clock.shift(-86_400)
    with pytest.raises(StoreFull):
        limiter.acquire("dave")
    clock.shift(max(60, whole_after(limit)))
    assert limiter.allow("dave")


@limits
def test_rule_22_calls_that_take_nothing_make_no_state(clock: Any, limit: Algorithm) -> None:
    limiter = RateLimiter(limit, store=MemoryStore())
    assert limiter.peek("peeked")
    assert limiter.allow("free", 0)
    assert not limiter.allow("too large", limit.capacity + 1)
    limiter.reset("reset")
    assert states(limiter) == 0


async def test_rule_22_a_call_that_another_layer_refuses_makes_no_state() -> None:
    store = MemoryStore()
    open_one, full = (
        RateLimiter("5/minute", name="open", store=store),
        RateLimiter("1/minute", name="full", store=store),
    )
    tokens = TokenBudget("100/day", name="tokens", store=store)

    @token_budget(tokens, key="user", reserve=5)
    @rate_limited(open_one, key="user")
    @rate_limited(full, key=everyone)
    def chat(user: str) -> None: ...

    full.acquire("everyone")
    for user in ("alice", "bob"):
        with pytest.raises(RateLimitExceeded):
            chat(user)
    assert states(open_one) == states(tokens) == 0
    assert tokens.bound().places[0][0].open == {}


@pytest.mark.parametrize(("seconds", "units"), [(0, 0), (60, 5)], ids=["nothing used", "window gone"])
def test_rule_22_a_settlement_that_changes_nothing_makes_no_state(clock: Any, seconds: int, units: int) -> None:
    budget = TokenBudget(SlidingWindow("10/minute"), store=MemoryStore())

    @token_budget(budget, key="user", usage=lambda units: units)
    def chat(user: str) -> int:
        clock.shift(seconds)
        return units

    chat("alice")
    assert states(budget) == 0


def test_rule_22_a_reset_drops_the_state() -> None:
    limiter = RateLimiter("5/minute", store=MemoryStore())
    limiter.acquire("alice")
    limiter.reset("alice")
    assert states(limiter) == 0


def test_rule_22_no_thread_is_started(clock: Any) -> None:
    before = threading.enumerate()
    limiter = RateLimiter("10/second", store=MemoryStore())
    for number in range(2_000):
        limiter.acquire(number)
        clock.shift(0.01)
    assert threading.enumerate() == before


# What stays


class Plain:
    """Each limit in the plainest words, for one identity: it keeps every charge for ever, and nothing goes away."""

    def __init__(self, limit: Algorithm) -> None:
        self.limit = limit
        self.charges: list[list[float]] = []

    def used(self, now: float) -> float:
        limit = self.limit
        if isinstance(limit, SlidingWindow):
            return sum(units for time, units in self.charges if time > now - 60)
        if isinstance(limit, CalendarWindow):
            return sum(units for time, units in self.charges if time // 60 == now // 60)
        missing, last = 0.0, 0.0
        for time, units in self.charges:
            missing = max(0.0, missing - (time - last) * limit.rate.amount / 60) + units
            last = time
        return max(0.0, missing - (now - last) * limit.rate.amount / 60)

    def admits(self, now: float, units: int) -> bool:
        if self.used(now) + units > self.limit.capacity + 1e-9:
            return False
        self.charges.append([now, units])
        return True


@settings(deadline=None, max_examples=60)
@given(
    limit=st.sampled_from(LIMITS),
    seed=st.integers(0, 2**32),
    pace=st.sampled_from([0.25, 1.0, 4.0, 16.0]),
    keys=st.sampled_from([1, 3, 30]),
    costs=st.sampled_from([(1,), (1, 2, 3)]),
)
def test_rule_22_a_state_that_matters_is_never_dropped(
    limit: Algorithm, seed: int, pace: float, keys: int, costs: tuple[int, ...]
) -> None:
    """Traces of calls by many keys, with pauses of any length, decide as a model does that forgets nothing."""
    source = random.Random(seed)
    limiter = RateLimiter(limit, store=MemoryStore())
    plain = [Plain(limit) for _ in range(keys)]
    now = 0.0
    with time_machine.travel(T0, tick=False) as clock:
        for _ in range(250):
            pause = source.choice([0, 0, 0.25, 0.5, 1, 2, 30 / pace]) * pace
            now += pause
            clock.shift(pause)
            key, cost = source.randrange(keys), source.choice(costs)
            assert limiter.allow(key, cost) == plain[key].admits(now, cost)
            if source.random() < 0.3:  # strangers, whose calls sweep
                limiter.allow(f"stranger {source.randrange(10_000)}")
        for key in range(keys):
            assert limiter.peek(key).used == math.ceil(plain[key].used(now) - 1e-9)


@limits
def test_rule_22_an_open_hold_is_never_dropped(clock: Any, limit: Algorithm) -> None:
    """A hold that waits long among sweeps settles where it was taken, or does nothing once its window is gone."""
    budget = TokenBudget(limit, store=MemoryStore())
    capacity = limit.capacity
    for age in (0.4, 0.9, 1.5, 3):
        budget.reset("alice")
        clock.move_to(T0.timestamp() + 86_400 * (age * 10 + 1))
        hold = budget.reserve("alice", capacity)
        for number in range(200):
            clock.shift(age * whole_after(limit) / 200)
            budget.charge(f"stranger {number}", 1)
        refilled = min(capacity, age * capacity) if isinstance(limit, TokenBucket) else capacity if age >= 1 else 0
        assert budget.peek("alice").used == math.ceil(capacity - refilled - 1e-6)
        hold.settle(capacity)
        assert budget.peek("alice").used == math.ceil(capacity - refilled - 1e-6)
        assert budget.bound().places[0][0].open == {}


@limits
def test_rule_22_a_debt_is_never_dropped_before_it_is_paid(clock: Any, limit: Algorithm) -> None:
    """Rule 9: usage above the hold is charged in full. Rule 14: a bucket's debt is refilled, never forgiven."""
    budget = TokenBudget(limit, store=MemoryStore())
    hold = budget.reserve("alice", 1)
    hold.settle(10 * limit.capacity)
    passed = 0.0
    bucket = isinstance(limit, TokenBucket)
    debt_is_paid = 10 * whole_after(limit) if bucket else 60.0
    step = debt_is_paid / 400
    for number in range(399):
        clock.shift(step)
        passed += step
        budget.charge(f"stranger {number}", 1)
        left = 10 * limit.capacity * (1 - passed / debt_is_paid) if bucket else 10 * limit.capacity
        assert budget.peek("alice").used == math.ceil(left - 1e-6)


# Full


def test_rule_22_a_full_limiter_refuses_new_keys_and_forgets_no_old_one(clock: Any) -> None:
    limiter = RateLimiter("2/minute", store=MemoryStore(max_keys=3))
    for name in ("alice", "bob", "carol"):
        limiter.acquire(name)
    for _ in range(3):
        for stranger in ("dave", "erin"):
            with pytest.raises(StoreFull, match="max_keys"):
                limiter.acquire(stranger)
            with pytest.raises(StoreFull):
                limiter.allow(stranger)
        clock.shift(5)
    assert states(limiter) == 3
    for name in ("alice", "bob", "carol"):
        assert limiter.peek(name).used == 1
        assert limiter.allow(name)
        assert not limiter.allow(name)


def test_rule_22_the_message_of_a_full_store_names_the_limit_and_never_the_key() -> None:
    limiter = RateLimiter("2/minute", name="chat", store=MemoryStore(max_keys=1))
    limiter.acquire("alice")
    with pytest.raises(StoreFull, match=r"^chat: ") as full:
        limiter.acquire("bob's secret")
    assert "secret" not in str(full.value)


@limits
def test_rule_22_a_full_limiter_recovers_when_old_keys_expire(clock: Any, limit: Algorithm) -> None:
    limiter = RateLimiter(limit, store=MemoryStore(max_keys=100))
    for number in range(100):
        limiter.acquire(number)
    with pytest.raises(StoreFull):
        limiter.acquire("dave")
    clock.shift(max(60, whole_after(limit)))
    for number in range(100):
        assert limiter.allow(f"new {number}")
    assert states(limiter) <= 100


@pytest.mark.parametrize(("seconds", "expired"), [(12, 1), (29, 4)])
def test_rule_22_a_full_limiter_recovers_for_as_many_keys_as_expired(clock: Any, seconds: int, expired: int) -> None:
    limiter = RateLimiter("2/minute", store=MemoryStore(max_keys=10))
    for number in range(10):
        limiter.acquire(number)
        clock.shift(5)
    clock.shift(seconds)  # 62 or 79 s after the first call
    for number in range(expired):
        assert limiter.allow(f"new {number}")
    with pytest.raises(StoreFull):
        limiter.allow("one more")


def test_rule_22_a_full_limiter_recovers_as_soon_as_keys_expire_though_none_is_due_to_retire(clock: Any) -> None:
    limiter = RateLimiter("2/minute", store=MemoryStore(max_keys=10))
    limiter.allow("busy", 0)
    clock.shift(50)
    for number in range(10):
        limiter.acquire(number)
    clock.shift(11)  # all retire, and move back, for they matter
    traffic(limiter, clock, 1, 10)
    clock.shift(49)
    for number in range(10):
        assert limiter.allow(f"new {number}")


def test_rule_22_a_full_limiter_still_answers_what_takes_nothing() -> None:
    limiter = RateLimiter("2/minute", store=MemoryStore(max_keys=1))
    limiter.acquire("alice")
    assert limiter.allow("bob", 0)
    limiter.reset("bob")
    limiter.reset("alice")
    assert limiter.allow("bob")


def test_rule_22_max_keys_is_for_each_limiter() -> None:
    store = MemoryStore(max_keys=1)
    one, other = RateLimiter("2/minute", name="one", store=store), RateLimiter("2/minute", name="other", store=store)
    assert one.allow("alice")
    assert other.allow("bob")


@pytest.mark.parametrize("max_keys", [0, -1, True, 1.0, "1", None])
def test_max_keys_is_a_positive_whole_number(max_keys: Any) -> None:
    with pytest.raises(ValueError, match="max_keys"):
        MemoryStore(max_keys=max_keys)


@pytest.mark.parametrize("same_store", [True, False])
def test_rule_2_a_call_is_counted_nowhere_when_one_layer_is_full(same_store: bool) -> None:
    roomy = MemoryStore(max_keys=10)
    full_store = MemoryStore(max_keys=1)
    by_ip = RateLimiter("5/minute", name="ip", store=full_store if same_store else roomy)
    tokens = TokenBudget("100/day", name="tokens", store=full_store if same_store else roomy)
    by_user = RateLimiter("5/minute", name="user", store=full_store)

    @rate_limited(by_ip, key="ip")
    @token_budget(tokens, key="ip", reserve=5)
    @rate_limited(by_user, key="user")
    def chat(ip: str, user: str) -> None: ...

    by_ip.acquire("1.2.3.4")
    tokens.charge("1.2.3.4", 1)
    by_user.acquire("alice")
    with pytest.raises(StoreFull):
        chat("1.2.3.4", "bob")
    assert by_ip.peek("1.2.3.4").used == 1
    assert tokens.peek("1.2.3.4").used == 1
    assert states(by_user) == 1
    assert tokens.bound().places[0][0].open == {}
    assert by_ip.bound().places[0][0].open == {}


def test_rule_22_one_call_with_two_new_keys_does_not_pass_max_keys() -> None:
    limiter = RateLimiter("5/minute", store=MemoryStore(max_keys=1))

    @rate_limited(limiter, key="sender")
    @rate_limited(limiter, key="receiver")
    def send(sender: str, receiver: str) -> None: ...

    with pytest.raises(StoreFull):
        send("alice", "bob")
    assert states(limiter) == 0
    send("alice", "alice")


def test_rule_22_a_function_of_one_limit_is_refused_new_keys_alone_when_its_store_is_full(clock: Any) -> None:
    """Also once its states have retired."""
    limit = TokenBucket("1/minute", burst=100)
    ask = rate_limited(limit, key="user", store=MemoryStore(max_keys=10))(lambda user: user)
    for user in [*range(10), *range(10)]:
        ask(user)
    with pytest.raises(StoreFull):
        ask(10)
    clock.shift(60)
    for user in range(10):
        ask(user)


@pytest.mark.parametrize("full_is", ["outside", "inside"])
def test_rule_22_a_new_key_is_refused_by_whichever_limiter_of_a_call_is_full(full_is: str) -> None:
    store = MemoryStore(max_keys=1)
    full, roomy = (RateLimiter("5/minute", name=name, store=store) for name in ("full", "roomy"))
    full.acquire("alice")
    outer, inner = (full, roomy) if full_is == "outside" else (roomy, full)
    chat = rate_limited(outer, key="user")(rate_limited(inner, key="user")(lambda user: user))
    with pytest.raises(StoreFull, match="full"):
        chat("bob")
    assert states(roomy) == 0


def test_rule_22_threads_with_new_keys_pass_max_keys_by_calls_in_flight_at_most(wide_races: None) -> None:
    limiter = RateLimiter("5/minute", store=MemoryStore(max_keys=50))

    def work(number: int) -> None:
        for turn in range(50):
            try:
                limiter.acquire((number, turn))
            except StoreFull:
                pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 50 <= states(limiter) < 50 + 8
    with pytest.raises(StoreFull):
        limiter.acquire("one more")


# The work of a hit


def work_of(call: Callable[[], object]) -> int:
    """The lines of quotalimit's own functions that a call runs, each time it runs them: the same on any machine."""
    steps = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal steps
        if "/quotalimit/" not in frame.f_code.co_filename:
            return None
        steps += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return steps


def asked(limiter: RateLimiter, key: str) -> None:
    try:
        limiter.acquire(key)
    except LimitExceeded:
        pass


@pytest.mark.parametrize("cost", [1, 2], ids=["units", "weighted"])
@pytest.mark.parametrize("kind", [SlidingWindow, CalendarWindow, TokenBucket])
def test_rule_22_a_hit_is_as_much_work_for_n_of_10_as_of_100_000(kind: type[Any], cost: int) -> None:
    def work(amount: int) -> tuple[int, int]:
        limiter = RateLimiter(kind(f"{amount}/hour"), store=MemoryStore())
        for _ in range(amount // cost - 1):
            limiter.acquire("alice", cost)
        return work_of(lambda: limiter.acquire("alice", cost)), work_of(lambda: asked(limiter, "alice"))

    small, large = work(10), work(100_000)
    assert min(large) > 20, "work is counted"
    assert large[0] <= small[0] * 1.1
    assert large[1] <= small[1] * 1.1


def test_rule_22_a_hit_is_as_much_work_for_1_key_as_for_100_000(clock: Any) -> None:
    """Also in the calls in which states retire and are swept, though all of them still matter."""

    def work(keys: int) -> tuple[int, int]:
        limiter = RateLimiter(TokenBucket("1/minute", burst=100), store=MemoryStore())
        for number in range(keys):
            limiter.acquire(number, 2)
        usual = work_of(lambda: limiter.acquire("alice"))
        clock.shift(60)
        sweeping = max(work_of(lambda: limiter.allow("alice")) for _ in range(20))
        return usual, sweeping

    (usual_one, _), (usual_many, sweeping_many) = work(1), work(100_000)
    assert usual_many <= usual_one * 1.1
    assert sweeping_many <= usual_one * 4


def test_rule_22_a_sliding_window_keeps_one_small_entry_a_call_and_trims_what_is_over(clock: Any) -> None:
    """About nine bytes a call at the most, and never more than an eighth beyond N."""
    limiter = RateLimiter("800/minute", store=MemoryStore())
    counts = limiter.bound().places[0][0]
    for _ in range(5_000):
        assert limiter.allow("alice")
        clock.shift(60 / 800)
    log = counts.load("alice", int(T0.timestamp() * 1e6))
    assert isinstance(log, array)
    assert len(log) * log.itemsize <= 9.2 * 800


def test_a_budget_keeps_one_entry_a_call_and_never_one_a_token(clock: Any) -> None:
    budget = TokenBudget(SlidingWindow("1_000_000/minute"), store=MemoryStore())
    for _ in range(100):
        budget.charge("alice", 1_000)
        clock.shift(0.1)
    counts = budget.bound().places[0][0]
    log = counts.load("alice", int(T0.timestamp() * 1e6))
    assert len(log.times) == 100
    with pytest.raises(TokenBudgetExceeded):
        budget.charge("alice", 900_001)


def test_rule_22_a_reset_forgets_what_has_retired_too() -> None:
    limiter = RateLimiter("5/hour")
    limiter.allow("alice")
    ((counts, _),) = limiter.bound().places
    counts._old, counts.young = counts.young, {}
    limiter.reset("alice")
    assert used(limiter) == 0


@pytest.mark.parametrize("plans", [("slow", "fast"), ("fast", "slow")])
def test_rule_22_a_state_is_kept_for_the_slowest_of_the_limits_that_share_it(
    plans: tuple[str, str], clock: Any
) -> None:
    limits = {"slow": TokenBucket("6/hour"), "fast": TokenBucket("3600/hour", burst=6)}

    @rate_limited(lambda plan: limits[plan], key="user", cost=lambda cost=0: cost)
    def ask(user: str, plan: str, cost: int = 0) -> None: ...

    for plan in plans:
        ask("bob", plan)
    ask("alice", "slow", 6)
    (limiter,) = limiters_of(ask)
    ((counts, _),) = limiter.bound().places_for(limits["slow"])
    counts._old, counts.young = counts.young, {}
    clock.shift(10)  # seconds, in which the fast one fills again
    counts.sweep()
    with pytest.raises(RateLimitExceeded):
        ask("alice", "slow", 1)
