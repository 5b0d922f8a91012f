"""The exceptions and the decisions: what they carry, which of several speaks, and that they travel."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import time_machine

from quotalimit import (
    Decision,
    InvalidKey,
    InvalidLimit,
    LimitExceeded,
    MemoryStore,
    QuotaLimitError,
    Rate,
    RateLimiter,
    RateLimitExceeded,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    collect_decisions,
    limiters_of,
    rate_limited,
    token_budget,
)

NOON = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)
SECRET = "alice@example.org"


@pytest.fixture(autouse=True)
def clock() -> Iterator[time_machine.Traveller]:
    """The clock stands still until it is moved."""
    with time_machine.travel(NOON, tick=False) as traveller:
        yield traveller


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> LimitExceeded:
    """The exception that a call raises."""
    with pytest.raises(LimitExceeded) as caught:
        call(*args, **kwargs)
    return caught.value


def a_refused_call() -> LimitExceeded:
    """The exception of a call that two layers refuse, as a caller sees it."""

    @rate_limited("2/minute", "3/day", key="user", name="calls")
    @token_budget("10/day", key="user", reserve=4, name="tokens")
    def chat(user: str) -> None: ...

    chat(SECRET)
    chat(SECRET)
    return refusal(chat, SECRET)


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (LimitExceeded, {QuotaLimitError}),
        (RateLimitExceeded, {LimitExceeded, QuotaLimitError}),
        (TokenBudgetExceeded, {LimitExceeded, QuotaLimitError}),
        (InvalidLimit, {QuotaLimitError, ValueError}),
        (InvalidKey, {QuotaLimitError, TypeError}),
        (StoreError, {QuotaLimitError}),
        (StoreUnavailable, {StoreError, QuotaLimitError}),
        (StoreFull, {StoreError, QuotaLimitError}),
    ],
)
def test_the_tree(error: type[Exception], bases: set[type[Exception]]) -> None:
    assert set(error.__mro__[1:]) - {Exception, BaseException, object} == bases


# What an exception carries


def test_an_exhausted_limit(clock: time_machine.Traveller) -> None:
    limiter = RateLimiter("3/minute", name="chat")
    limiter.acquire(SECRET, 2)
    clock.shift(10)
    error = refusal(limiter.acquire, SECRET, 2)
    assert type(error) is RateLimitExceeded
    assert (error.name, error.key, error.limit) == ("chat", SECRET, Rate(3, "minute"))
    assert (error.requested, error.used, error.remaining) == (2, 2, 1)
    assert (error.reason, error.retry_after) == ("exhausted", 50.0)
    assert error.reset_at == NOON + timedelta(seconds=60)
    assert error.reset_at.utcoffset() == timedelta(0)
    assert error.violations == (error.decision,)


def test_a_budget_in_debt() -> None:
    """`remaining` is never negative; `used` may exceed the limit."""
    budget = TokenBudget("100/day", name="tokens")
    with budget.reserve(SECRET, 10) as hold:
        hold.settle(150)
    error = refusal(budget.charge, SECRET, 1)
    assert type(error) is TokenBudgetExceeded
    assert (error.used, error.remaining, error.requested, error.reason) == (150, 0, 1, "exhausted")
    assert error.retry_after == 12 * 3_600
    assert error.reset_at == datetime(2026, 3, 5, tzinfo=UTC)


def test_a_busy_budget(clock: time_machine.Traveller) -> None:
    """Busy: it would fit if every open hold used nothing; `retry_after` is when it fits if they use everything."""
    budget = TokenBudget(TokenBucket("100/minute"), name="tokens")
    with budget.reserve(SECRET, 80):
        clock.shift(6)
        error = refusal(budget.charge, SECRET, 60)
        assert (error.reason, error.used, error.remaining, error.requested) == ("busy", 70, 30, 60)
        assert error.retry_after == 18.0
        clock.shift(18)
        assert budget.charge(SECRET, 60)


def test_spent_and_held_together_are_exhausted() -> None:
    budget = TokenBudget("100/day")
    budget.charge(SECRET, 50)
    with budget.reserve(SECRET, 40):
        assert refusal(budget.charge, SECRET, 50 + 1).reason == "exhausted"
        assert refusal(budget.charge, SECRET, 50).reason == "busy"
        assert budget.charge(SECRET, 10)


@pytest.mark.parametrize("used", [0, 5])
def test_a_call_that_is_too_large(used: int) -> None:
    limiter = RateLimiter("5/minute", name="chat")
    limiter.acquire(SECRET, used)
    error = refusal(limiter.acquire, SECRET, 6, wait=1_000)
    assert (error.reason, error.retry_after, error.requested, error.remaining) == ("too_large", None, 6, 5 - used)
    assert error.reset_at == NOON + timedelta(seconds=60 if used else 0)


def test_a_call_without_a_reserve_requests_one() -> None:
    @token_budget("5/day", key="user", name="tokens")
    def chat(user: str, tokens: int) -> dict[str, Any]:
        return {"usage": {"total_tokens": tokens}}

    chat(SECRET, 7)
    error = refusal(chat, SECRET, 7)
    assert (error.requested, error.used, error.remaining) == (1, 7, 0)


def test_a_tuple_is_carried_as_it_was_given() -> None:
    limiter = RateLimiter("1/day")
    limiter.acquire(("alice", 7))
    assert refusal(limiter.acquire, ("alice", 7)).key == ("alice", 7)


# Which layer speaks


def stacked(outer: str, inner: str, cost: int = 1) -> Callable[[str], None]:
    """A function with two layers of these limits."""

    @rate_limited(outer, key="user", cost=cost, name="outer")
    @rate_limited(inner, key="user", cost=cost, name="inner")
    def chat(user: str) -> None: ...

    return chat


@pytest.mark.parametrize(
    ("outer", "inner", "speaks", "violated"),
    [
        ("1/minute", "1/hour", "inner", ["outer", "inner"]),
        ("1/hour", "1/minute", "outer", ["outer", "inner"]),
        ("1/minute", "1/minute", "outer", ["outer", "inner"]),
        ("1/60 seconds", "1/minute", "outer", ["outer", "inner"]),
        ("9/hour", "1/minute", "inner", ["inner"]),
        ("1/minute", "9/hour", "outer", ["outer"]),
    ],
)
def test_rule_4_the_slowest_to_clear_speaks(outer: str, inner: str, speaks: str, violated: list[str]) -> None:
    chat = stacked(outer, inner)
    chat(SECRET)
    error = refusal(chat, SECRET)
    assert error.name == speaks
    assert [violation.name for violation in error.violations] == violated
    assert error.retry_after == max(violation.retry_after or 0 for violation in error.violations)
    assert error.decision in error.violations


@pytest.mark.parametrize(
    ("outer", "inner", "speaks"),
    [("9/day", "4/minute", "inner"), ("4/minute", "9/day", "outer"), ("4/minute", "3/day", "outer")],
)
def test_rule_4_too_large_is_longest(outer: str, inner: str, speaks: str) -> None:
    chat = stacked(outer, inner, cost=5)
    for limiter in limiters_of(chat):
        if "9/day" in str(limiter):
            limiter.acquire(SECRET, 9)  # type: ignore[attr-defined]
    error = refusal(chat, SECRET)
    assert (error.name, error.reason, error.retry_after) == (speaks, "too_large", None)
    assert len(error.violations) == 2


def test_rule_4_the_exception_is_of_the_kind_of_the_layer_that_speaks() -> None:
    error = a_refused_call()
    assert type(error) is TokenBudgetExceeded
    assert error.name == "tokens"
    assert [(violation.name, str(violation.limit)) for violation in error.violations] == [
        ("calls", "2/minute"),
        ("tokens", "10/day"),
    ]


def test_rule_4_each_layer_speaks_of_its_own_key() -> None:
    @rate_limited("9/day", key="tenant")
    @rate_limited("1/day", key="user")
    def chat(tenant: str, user: str) -> None: ...

    chat("acme", "alice")
    assert refusal(chat, "acme", "alice").key == "alice"


def test_rule_3_retry_after_is_honest_for_all_layers(clock: time_machine.Traveller) -> None:
    chat = stacked("2/minute", "1/10 seconds")
    chat(SECRET)
    clock.shift(10)
    chat(SECRET)
    error = refusal(chat, SECRET)
    assert error.retry_after == 50.0
    clock.shift(timedelta(seconds=error.retry_after, microseconds=-1))
    assert refusal(chat, SECRET).retry_after == 1e-6
    clock.shift(timedelta(microseconds=1))
    chat(SECRET)


# The message


def test_the_message_names_the_limit_the_numbers_and_the_wait() -> None:
    limiter = RateLimiter("12/hour", name="chat")
    limiter.acquire(SECRET, 7)
    text = str(refusal(limiter.acquire, SECRET, 11))
    for part in ("chat", "12/hour", "11 requested", "5 remaining", "3600 s"):
        assert part in text
    assert "busy" not in text
    assert "flight" not in text
    assert "never" in str(refusal(limiter.acquire, SECRET, 13)) or "more than" in str(
        refusal(limiter.acquire, SECRET, 13)
    )


def test_the_message_says_a_long_wait_in_plain_digits() -> None:
    budget = TokenBudget("5/month")
    budget.charge("alice", 5)
    assert f"{27.5 * 86_400:.0f} s" in str(refusal(budget.charge, "alice", 1))


def test_the_key_is_nowhere_in_what_is_logged() -> None:
    for error in (a_refused_call(), refusal(RateLimiter("1/day").acquire, SECRET, 2)):
        logged = [str(error), repr(error), repr(error.args), f"{error}", *map(repr, error.violations)]
        logged += [repr(error.decision), str(error.decision), *traceback.format_exception_only(error)]
        assert not [text for text in logged if SECRET in text or "alice" in text]
        assert error.key == SECRET


# How it travels

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


def same(one: LimitExceeded, other: BaseException) -> bool:
    """Whether two exceptions say the same."""
    fields = [
        "name",
        "key",
        "limit",
        "requested",
        "used",
        "remaining",
        "retry_after",
        "reset_at",
        "reason",
        "violations",
        "decision",
        "args",
    ]
    return (
        type(one) is type(other)
        and str(one) == str(other)
        and all(getattr(one, field) == getattr(other, field) for field in fields)
    )


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_says_the_same(way: str) -> None:
    error = a_refused_call()
    error.add_note("while answering")
    copied = COPIES[way](error)
    assert copied is not error
    assert same(error, copied)
    assert copied.__notes__ == ["while answering"]
    assert same(
        refusal(RateLimiter("1/day").acquire, "a", 2), COPIES[way](refusal(RateLimiter("1/day").acquire, "a", 2))
    )


@pytest.mark.parametrize("way", COPIES)
def test_the_other_exceptions_travel_too(way: str) -> None:
    for kind in (QuotaLimitError, InvalidLimit, InvalidKey, StoreError, StoreFull, StoreUnavailable):
        copied = COPIES[way](kind("what went wrong"))
        assert type(copied) is kind
        assert str(copied) == "what went wrong"


def test_cause_notes_and_traceback_work_as_on_any_exception() -> None:
    cause = KeyError("cause")

    def refused_because() -> None:
        try:
            a_refused_call_raised()
        except LimitExceeded as error:
            error.add_note("a note")
            raise error from cause

    error = refusal(refused_because)
    assert error.__cause__ is cause
    text = "".join(traceback.format_exception(error))
    assert "a note" in text
    assert "a_refused_call_raised" in text
    assert "alice" not in text


def a_refused_call_raised() -> None:
    """Raise the exception of a refused call."""
    raise a_refused_call()


class Tenanted(RateLimitExceeded):
    """An exception that a user derives, with state of its own."""

    tenant: str


def test_a_derived_exception_keeps_its_attributes() -> None:
    error = a_refused_call()
    derived = Tenanted(error.decision, error.key, error.violations)
    derived.tenant = "acme"
    for way in COPIES.values():
        copied = way(derived)
        assert same(derived, copied)
        assert copied.tenant == "acme"


@rate_limited("1/day", key="user", name="worker")
def work(user: str) -> str:
    """A decorated function for a process pool."""
    return user


def work_twice(user: str) -> str:
    """Call it twice in the worker, where the second call is refused."""
    return work(user) + work(user)


def test_a_refusal_comes_back_from_a_process_pool() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(work, "bob").result() == "bob"
        error = refusal(pool.submit(work_twice, SECRET).result)
    assert type(error) is RateLimitExceeded
    assert (error.name, error.key, error.limit) == ("worker", SECRET, Rate(1, "day"))
    assert (error.requested, error.used, error.remaining, error.reason) == (1, 1, 0, "exhausted")
    assert error.retry_after == pytest.approx(86_400, abs=60)
    assert error.reset_at.tzinfo is UTC
    assert error.__cause__ is not None
    assert "work_twice" in str(error.__cause__)


# Decisions


def decisions() -> list[Decision]:
    """The decisions of a fixed trace on a store of its own."""
    limiter = RateLimiter("2/minute", name="chat", store=MemoryStore())
    return [limiter.peek(SECRET), limiter.acquire(SECRET), limiter.acquire(SECRET), limiter.peek(SECRET)]


def test_a_decision_is_true_if_the_call_is_admitted() -> None:
    free, first, second, refused = decisions()
    assert [bool(decision) for decision in (free, first, second, refused)] == [True, True, True, False]
    assert [decision.allowed for decision in (free, first, second, refused)] == [True, True, True, False]
    assert [decision.used for decision in (free, first, second, refused)] == [0, 1, 2, 2]
    assert [decision.remaining for decision in (free, first, second, refused)] == [2, 1, 0, 0]
    assert [decision.retry_after for decision in (free, first, second, refused)] == [0.0, 0.0, 0.0, 60.0]
    assert [decision.reason for decision in (free, first, second, refused)] == [None, None, None, "exhausted"]
    assert (free.reset_at, first.reset_at) == (NOON, NOON + timedelta(seconds=60))


def test_equal_decisions_are_equal_and_hash_equally() -> None:
    one, other = decisions(), decisions()
    assert one == other
    assert list(map(hash, one)) == list(map(hash, other))
    assert len(set(one)) == len(one)
    assert one[0] != "chat"
    assert copy.deepcopy(one) == one
    assert pickle.loads(pickle.dumps(one)) == one


def test_the_repr_of_a_decision_shows_name_limit_and_verdict() -> None:
    _, first, _, refused = map(repr, decisions())
    assert "'chat' 2/minute: admitted" in first
    assert "'chat' 2/minute: exhausted" in refused


@pytest.mark.parametrize(
    ("limits", "used", "speaks"),
    [
        (("3/minute", "10/day"), 0, "3/minute"),
        (("10/minute", "3/day"), 0, "3/day"),
        (("3/minute", "10/day"), 3, "3/minute"),
        (("3/minute", "3/day"), 3, "3/day"),
        (("3/day", "3/minute"), 3, "3/day"),
    ],
)
def test_rule_4_a_decision_over_several_limits(limits: tuple[str, ...], used: int, speaks: str) -> None:
    """It is that of the slowest to clear, else of the fewest remaining."""
    limiter = RateLimiter(*limits)
    for _ in range(used):
        assert str(limiter.acquire(SECRET).limit) in limits
    assert str(limiter.peek(SECRET).limit) == speaks
    if used:
        error = refusal(limiter.acquire, SECRET)
        assert str(error.limit) == speaks
    else:
        assert str(limiter.acquire(SECRET).limit) == speaks
        assert limiter.peek(SECRET).used == 1


# What headers need to know of a decision


def test_decisions_say_what_they_count_and_which_limit_they_are_about() -> None:
    @rate_limited("5/minute", "100/day", key="user", name="calls")
    @token_budget("50/day", key="user", reserve=20, name="tokens")
    def chat(user: str) -> Any:
        return None

    with collect_decisions() as seen:
        chat("alice")
    named = [("calls 5/minute", "requests"), ("calls 100/day", "requests"), ("tokens", "tokens")]
    assert [(decision.policy, decision.unit) for decision in seen] == named
    assert [(d.policy, d.unit) for d in pickle.loads(pickle.dumps(seen))] == named

    chat("alice")
    with pytest.raises(TokenBudgetExceeded) as of_tokens:
        chat("alice")
    assert [(d.policy, d.unit, d.name) for d in of_tokens.value.violations] == [("tokens", "tokens", "tokens")]


def test_decisions_of_limiters_say_the_same() -> None:
    limiter, budget = RateLimiter("1/minute", "100/day", name="calls"), TokenBudget("50/day", name="tokens")
    assert (limiter.acquire("alice").policy, limiter.peek("alice").policy) == ("calls 1/minute", "calls 1/minute")
    with pytest.raises(RateLimitExceeded) as refusal:
        limiter.acquire("alice")
    assert refusal.value.decision.policy == "calls 1/minute"
    assert (budget.charge("alice", 1).policy, budget.peek("alice").unit) == ("tokens", "tokens")
