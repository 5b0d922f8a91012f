"""Limits that are a function of the call: plans, tiers, `UNLIMITED`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import time_machine

from quotalimit import (
    UNLIMITED,
    CalendarWindow,
    InvalidKey,
    InvalidLimit,
    LimitExceeded,
    Rate,
    RateLimitExceeded,
    SlidingWindow,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    limiters_of,
    rate_limited,
    token_budget,
)

PLANS: dict[str, Any] = {
    "free": "2/minute",
    "rate": Rate(3, "minute"),
    "bucket": TokenBucket("60/minute", burst=4),
    "paid": ["5/minute", "6/day"],
    "team": ("7/minute",),
    "staff": UNLIMITED,
}


@pytest.fixture(autouse=True)
def clock() -> Iterator[time_machine.Traveller]:
    """The clock stands still until it is moved."""
    with time_machine.travel(datetime(2026, 3, 4, 12, 0, tzinfo=UTC), tick=False) as traveller:
        yield traveller


@rate_limited(lambda plan: PLANS.get(plan), key="user")
def chat(user: str, plan: str) -> str:
    """A function with a plan for each call."""
    return user


def admitted(user: str, plan: str, most: int = 50) -> int:
    """How many calls are admitted before the first refusal, of so many."""
    for calls in range(most):
        try:
            chat(user, plan)
        except LimitExceeded:
            return calls
    return most


@pytest.mark.parametrize(
    ("plan", "calls"), [("free", 2), ("rate", 3), ("bucket", 4), ("paid", 5), ("team", 7), ("staff", 50)]
)
def test_each_plan_has_its_limits(plan: str, calls: int) -> None:
    assert admitted("alice", plan) == calls
    assert admitted("bob", plan) == calls


def test_several_limits_hold_together_and_the_slowest_speaks(clock: time_machine.Traveller) -> None:
    assert admitted("alice", "paid") == 5
    clock.shift(60)
    assert admitted("alice", "paid") == 1
    with pytest.raises(RateLimitExceeded) as caught:
        chat("alice", "paid")
    assert caught.value.limit == Rate(6, "day")
    assert caught.value.retry_after == 86_400 - 60


@pytest.mark.parametrize("plan", ["bare", "in a list"])
def test_a_bare_string_means_what_it_means_for_the_decorator(plan: str, clock: time_machine.Traveller) -> None:
    tier: Any = "1/minute" if plan == "bare" else ["1/minute"]

    @rate_limited(lambda: tier, key="user")
    def rated(user: str) -> None: ...

    @token_budget(lambda: tier, key="user", reserve=1)
    def budgeted(user: str) -> None: ...

    clock.move_to(datetime(2026, 3, 4, 12, 0, 45, tzinfo=UTC))
    for function, error, wait in ((rated, RateLimitExceeded, 60), (budgeted, TokenBudgetExceeded, 15)):
        function("alice")
        with pytest.raises(error) as caught:
            function("alice")
        assert caught.value.retry_after == wait


@pytest.mark.parametrize(
    "tier", [None, [], (), [None], ["2/minute", None], 5, "5", "0/minute", SlidingWindow, {}, object(), [["2/minute"]]]
)
def test_a_missing_or_wrong_plan_is_refused_and_never_free(tier: Any) -> None:
    @rate_limited("9/day", key="user")
    @rate_limited(lambda user: tier, key="user", name="plans")
    def ask(user: str) -> None:
        raise AssertionError("not reached")

    for _ in range(2):
        with pytest.raises(InvalidLimit, match=r"^plans: "):
            ask("alice")
    assert limiters_of(ask)[0].peek("alice").used == 0


def test_a_missing_plan_is_named() -> None:
    @rate_limited({"free": "2/minute"}.get, key="plan", name="plans")
    def ask(plan: str) -> None: ...

    ask("free")
    with pytest.raises(InvalidLimit, match=r"plans.*None.*not a free one"):
        ask("unknown")


def test_no_limits_at_all_are_named() -> None:
    ask = rate_limited(lambda user: [], key="user", name="plans")(lambda user: user)
    with pytest.raises(InvalidLimit, match=r"plans.*no limits.*not a free one"):
        ask("alice")


def test_however_many_limits_a_callable_returns_they_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quotalimit.limiters._MOST_TIERS", 3)
    read: list[Any] = []

    @rate_limited(lambda plan: f"{plan}/day", key="user")
    def ask(user: str, plan: int) -> None: ...

    (limiter,) = limiters_of(ask)
    really_read = limiter.read_tier
    monkeypatch.setattr(limiter, "read_tier", lambda tier: read.append(tier) or really_read(tier))
    for plan in (11, 12, 13, 11, 12, 13):
        ask("alice", plan)
    assert len(read) == 3, "each is read once"
    for plan in (14, 14, 15, 15):
        ask("alice", plan)
    assert len(read) == 5
    assert len(limiter.bound()._tiers) == 2
    with pytest.raises(RateLimitExceeded):
        ask("alice", 10)


def test_the_policy_of_a_decision_names_one_of_several_limits(clock: time_machine.Traveller) -> None:
    policies = []
    for plan in ("free", "paid"):
        admitted("alice", plan)
        with pytest.raises(RateLimitExceeded) as refusal:
            chat("alice", plan)
        policies.append(refusal.value.decision.policy)
        clock.shift(86_400)
    (limiter,) = limiters_of(chat)
    assert policies == [limiter.name, f"{limiter.name} 5/minute"]


def test_an_unlimited_caller_still_needs_an_identity() -> None:
    with pytest.raises(InvalidKey):
        chat(None, "staff")  # type: ignore[arg-type]


def test_an_unlimited_layer_leaves_the_other_layers_their_limits() -> None:
    @rate_limited(lambda plan: PLANS[plan], key="user")
    @token_budget("3/day", key="user", reserve=1)
    def ask(user: str, plan: str) -> None: ...

    for _ in range(3):
        ask("alice", "staff")
    with pytest.raises(TokenBudgetExceeded):
        ask("alice", "staff")


def test_an_unlimited_token_budget_charges_nothing() -> None:
    @token_budget(lambda plan: UNLIMITED if plan == "staff" else "10/day", key="user", reserve=1)
    def ask(user: str, plan: str, tokens: int) -> dict[str, Any]:
        return {"usage": {"total_tokens": tokens}}

    ask("alice", "staff", 1_000)
    ask("alice", "free", 10)
    with pytest.raises(TokenBudgetExceeded) as caught:
        ask("alice", "free", 1)
    assert caught.value.used == 10


def test_unlimited_is_one_object_everywhere() -> None:
    assert pickle.loads(pickle.dumps(UNLIMITED)) is UNLIMITED
    assert copy.deepcopy(UNLIMITED) is UNLIMITED
    assert repr(UNLIMITED) == "UNLIMITED"


def test_rule_21_a_key_keeps_its_count_when_its_amount_changes() -> None:
    assert admitted("alice", "free") == 2
    assert admitted("alice", "team") == 5
    with pytest.raises(RateLimitExceeded) as caught:
        chat("alice", "free")
    assert (caught.value.used, caught.value.remaining) == (7, 0)


def test_rule_21_a_burst_may_change_and_keeps_the_count() -> None:
    @rate_limited(lambda burst: TokenBucket("60/minute", burst=burst), key="user")
    def ask(user: str, burst: int) -> None: ...

    for _ in range(2):
        ask("alice", 2)
    for _ in range(3):
        ask("alice", 5)
    with pytest.raises(RateLimitExceeded) as caught:
        ask("alice", 5)
    assert caught.value.used == 5


@pytest.mark.parametrize("other", ["1/hour", TokenBucket("1/minute"), CalendarWindow("1/minute")])
def test_rule_21_another_algorithm_or_period_is_another_count(other: Any) -> None:
    limits = ["1/minute", other]

    @rate_limited(lambda which: limits[which], key="user")
    def ask(user: str, which: int) -> None: ...

    for which in (0, 1):
        ask("alice", which)
    for which in (0, 1):
        with pytest.raises(RateLimitExceeded):
            ask("alice", which)


def test_rule_21_the_zone_belongs_to_the_count() -> None:
    @rate_limited(lambda tz: CalendarWindow("1/day", tz=tz), key="user")
    def ask(user: str, tz: str) -> None: ...

    ask("alice", "UTC")
    ask("alice", "Europe/Paris")
    with pytest.raises(RateLimitExceeded):
        ask("alice", "UTC")


def test_a_change_of_plan_settles_what_is_held_where_it_was_taken() -> None:
    """Rule 14: usage is charged on the limit that admitted the call, though the plan changed meanwhile."""
    plan = {"alice": "100/day"}

    @token_budget(lambda user: plan[user], key="user", reserve=10)
    def ask(user: str) -> dict[str, Any]:
        plan[user] = "50/day"
        return {"usage": {"total_tokens": 40}}

    ask("alice")
    ask("alice")
    with pytest.raises(TokenBudgetExceeded) as caught:
        ask("alice")
    assert (caught.value.used, caught.value.remaining, caught.value.limit.amount) == (80, 0, 50)


def test_such_a_limiter_cannot_be_asked_without_its_function_and_says_so() -> None:
    (limiter,) = limiters_of(chat)
    with pytest.raises(InvalidLimit, match="decorated function"):
        limiter.peek("alice")
    with pytest.raises(InvalidLimit, match="decorated function"):
        limiter.acquire("alice")  # type: ignore[attr-defined]


def test_such_a_limiter_can_be_reset() -> None:
    (limiter,) = limiters_of(chat)
    limiter.reset("alice")
    assert admitted("alice", "paid") == 5
    assert admitted("alice", "bucket") == 4
    assert admitted("bob", "free") == 2
    limiter.reset("alice")
    assert admitted("alice", "bucket") == 4
    assert admitted("alice", "paid") == 5
    assert admitted("bob", "free") == 0


def test_a_reset_forgets_the_counts_that_two_functions_share_by_name() -> None:
    def plans() -> str:
        return "1/day"

    @rate_limited(plans, key="user", name="shared")
    def one(user: str) -> None: ...

    @rate_limited(plans, key="user", name="shared")
    def other(user: str) -> None: ...

    one("alice")
    with pytest.raises(RateLimitExceeded):
        other("alice")
    limiters_of(other)[0].reset("alice")
    one("alice")
    limiters_of(one)[0].reset("alice")
    other("alice")


def test_a_reset_through_one_function_reaches_what_another_has_counted() -> None:
    def plans() -> str:
        return "1/day"

    @rate_limited(plans, key="user", name="shared")
    def one(user: str) -> None: ...

    @rate_limited(plans, key="user", name="shared")
    def never_called(user: str) -> None: ...

    one("alice")
    limiters_of(never_called)[0].reset("alice")
    one("alice")


def test_a_tiered_budget_is_a_token_budget() -> None:
    decorated = token_budget(lambda: "5/day", key="user")(lambda user: user)
    assert isinstance(limiters_of(decorated)[0], TokenBudget)
