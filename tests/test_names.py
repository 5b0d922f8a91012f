"""Rule 21: what limits are called, and who shares a count."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import time_machine

from quotalimit import (
    CalendarWindow,
    InvalidLimit,
    LimitExceeded,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    configure,
    everyone,
    limiters_of,
    rate_limited,
    store_from_url,
    token_budget,
)
from quotalimit.stores.default import replace_default


@pytest.fixture(autouse=True)
def standing_clock() -> Iterator[None]:
    """The clock stands still, so that no window ends in the middle of a test."""
    with time_machine.travel(datetime(2026, 3, 4, 12, 0, tzinfo=UTC), tick=False):
        yield


def admitted(function: Callable[..., Any], *args: Any) -> int:
    """How many calls are admitted before the first refusal."""
    for calls in range(50):
        try:
            function(*args)
        except LimitExceeded:
            return calls
    raise AssertionError("never refused")


def names_of(function: Callable[..., Any]) -> list[str]:
    """The names of a function's limiters, the outermost first."""
    return [limiter.name for limiter in limiters_of(function)]


def tenant_of(user: str) -> str:
    """A key function with a name."""
    return user.partition("@")[2]


class ByTenant:
    """A key function that is an object."""

    def __call__(self, user: str) -> str:
        return tenant_of(user)


@rate_limited("2/day", key="user")
def chat(user: str) -> str:
    """A function that follows the default store."""
    return user


class Bot:
    """A class with a decorated method."""

    @rate_limited("2/day", key="user")
    def chat(self, user: str) -> str:
        return user


# Default names


def test_the_default_name_is_module_qualname_and_key() -> None:
    assert names_of(chat) == ["tests.test_names:chat:user"]
    assert names_of(Bot.chat) == ["tests.test_names:Bot.chat:user"]
    for key, title in (
        (tenant_of, "tenant_of"),
        (everyone, "everyone"),
        (lambda user: user, "<lambda>"),
        (ByTenant(), "ByTenant"),
        (functools.partial(tenant_of), "partial"),
    ):
        plain = chat.__wrapped__  # type: ignore[attr-defined]
        assert names_of(rate_limited("2/day", key=key)(plain)) == [f"tests.test_names:chat:{title}"]


def test_repeated_names_are_numbered_from_the_innermost() -> None:
    @rate_limited("1/day", key="user")
    @token_budget("1/day", key="user")
    @rate_limited("1/day", key=tenant_of)
    @rate_limited("1/day", key="user")
    def ask(user: str) -> None: ...

    base = "tests.test_names:test_repeated_names_are_numbered_from_the_innermost.<locals>.ask"
    assert names_of(ask) == [f"{base}:user#3", f"{base}:user#2", f"{base}:tenant_of", f"{base}:user"]


def test_a_name_that_was_given_is_used_as_it_is() -> None:
    decorated = rate_limited("1/day", key="user", name="chat")(chat)
    assert names_of(decorated) == ["chat", "tests.test_names:chat:user"]
    decorated("alice")
    with pytest.raises(RateLimitExceeded) as caught:
        decorated("alice")
    assert caught.value.name == "chat"


@pytest.mark.parametrize("limiter", [RateLimiter, TokenBudget])
def test_a_limiter_without_limits_is_none(limiter: Any) -> None:
    with pytest.raises(InvalidLimit, match="at least one limit"):
        limiter(name="free")


@pytest.mark.parametrize("bad", ["", 5, b"chat", True])
def test_a_name_is_text(bad: Any) -> None:
    with pytest.raises(ValueError, match="name must be text, not "):
        RateLimiter("2/day", name=bad)
    with pytest.raises(ValueError, match="name must be text, not "):
        rate_limited("2/day", key="user", name=bad)(tenant_of)


def test_a_limiter_shows_its_limits_and_its_name() -> None:
    assert repr(RateLimiter("2/day", "1/hour", name="chat")) == (
        "RateLimiter(SlidingWindow('2/day'), SlidingWindow('1/hour'), name='chat')"
    )

    def plan(user: str) -> str:
        return "2/day"

    (budget,) = limiters_of(token_budget(plan, key="user", name="tokens")(tenant_of))
    assert repr(budget) == f"TokenBudget({plan!r}, name='tokens')"


def test_the_exception_carries_the_default_name() -> None:
    admitted(chat, "alice")
    with pytest.raises(RateLimitExceeded) as caught:
        chat("alice")
    assert caught.value.name == "tests.test_names:chat:user"


# Who shares


def test_rule_21_limiters_without_a_name_never_share() -> None:
    one, other = (rate_limited("2/day", key="user")(lambda user: user) for _ in range(2))
    assert names_of(one) == names_of(other)
    assert admitted(one, "alice") == 2
    assert admitted(other, "alice") == 2
    first, second = RateLimiter("2/day"), RateLimiter("2/day")
    assert admitted(first.acquire, "alice") == 2
    assert admitted(second.acquire, "alice") == 2


def test_rule_21_a_limiter_without_a_name_shares_nothing_with_one_that_has_its_name() -> None:
    unnamed = rate_limited("2/day", key="user")(lambda user: user)
    named = RateLimiter("3/day", name=names_of(unnamed)[0])
    assert admitted(unnamed, "alice") == 2
    assert admitted(named.acquire, "alice") == 3


def test_rule_21_two_decorators_of_one_function_without_names_never_share() -> None:
    @rate_limited("4/day", key="user")
    @rate_limited("4/day", key="user")
    def ask(user: str) -> None: ...

    assert admitted(ask, "alice") == 4


def test_rule_21_one_decorator_on_two_functions_makes_two_counts() -> None:
    limit = rate_limited("2/day", key="user")
    one, other = limit(lambda user: user), limit(lambda user: user)
    assert admitted(one, "alice") == 2
    assert admitted(other, "alice") == 2


@pytest.mark.parametrize("explicit", [False, True])
def test_rule_21_equal_names_with_equal_limits_share(explicit: bool) -> None:
    store = MemoryStore() if explicit else None
    one = rate_limited("3/day", key="user", name="shared", store=store)(lambda user: user)
    other = rate_limited("3/day", key="owner", name="shared", store=store)(lambda owner, model: owner)
    limiter = RateLimiter("3/day", name="shared", store=store)
    one("alice")
    other("alice", "large")
    assert limiter.acquire("alice")
    for call in (lambda: one("alice"), lambda: other("alice", "large"), lambda: limiter.acquire("alice")):
        with pytest.raises(RateLimitExceeded):
            call()
    limiter.reset("alice")
    assert one("alice")


def test_rule_21_equal_names_on_different_stores_share_nothing() -> None:
    limiters = [RateLimiter(f"{amount}/day", name="chat", store=MemoryStore()) for amount in (1, 2)]
    assert [admitted(limiter.acquire, "alice") for limiter in limiters] == [1, 2]


DIFFERENT: list[tuple[str, Callable[..., Any]]] = [
    ("amount", lambda **more: rate_limited("3/day", key=everyone, **more)),
    ("period", lambda **more: rate_limited("2/hour", key=everyone, **more)),
    ("algorithm", lambda **more: rate_limited(CalendarWindow("2/day"), key=everyone, **more)),
    ("burst", lambda **more: rate_limited(TokenBucket("2/day", burst=1), key=everyone, **more)),
    ("several", lambda **more: rate_limited("2/day", "3/day", key=everyone, **more)),
    ("tiers", lambda **more: rate_limited(lambda: "2/day", key=everyone, **more)),
    ("tokens", lambda **more: token_budget("2/day", key=everyone, **more)),
]


@pytest.mark.parametrize("decorator", [decorator for _, decorator in DIFFERENT], ids=[what for what, _ in DIFFERENT])
def test_rule_21_equal_names_with_different_limits_are_refused(decorator: Any) -> None:
    """At decoration if the store was given, at the first call and every later one else."""

    def other() -> None:
        raise AssertionError("not reached")

    store = MemoryStore()
    rate_limited("2/day", key=everyone, name="taken", store=store)(lambda: None)
    with pytest.raises(InvalidLimit, match="taken"):
        decorator(name="taken", store=store)(other)
    RateLimiter("2/day", name="taken").allow("alice")
    late = decorator(name="taken")(other)
    for _ in range(2):
        with pytest.raises(InvalidLimit, match="taken"):
            late()


def test_rule_21_equal_names_with_limits_from_different_callables_are_refused() -> None:
    rate_limited(lambda: "2/day", key=everyone, name="taken")(lambda: None)()
    with pytest.raises(InvalidLimit, match="taken"):
        rate_limited(lambda: "2/day", key=everyone, name="taken")(lambda: None)()


def test_rule_21_one_function_cannot_give_one_name_to_different_limits() -> None:
    """Two layers of one function are no re-definition of each other."""

    def ask(user: str) -> None: ...

    store = MemoryStore()
    inner = rate_limited("2/day", key="user", name="chat", store=store)(ask)
    with pytest.raises(InvalidLimit, match="chat"):
        rate_limited("9/day", key="user", name="chat", store=store)(inner)

    def late() -> None:
        rate_limited("9/day", key="user", name="calls")(rate_limited("2/day", key="user", name="calls")(ask))("alice")

    with pytest.raises(InvalidLimit, match="calls"):
        late()


# Re-definitions


def define(*limits: Any, decorator: Any = rate_limited, **more: Any) -> Any:
    """Define a function as a notebook does when its cell runs again."""

    @decorator(*limits, key="user", name="notebook", **more)
    def ask(user: str) -> str:
        return user

    return ask


@pytest.mark.parametrize("explicit", [False, True])
def test_rule_21_a_redefinition_replaces_and_keeps_the_count(explicit: bool) -> None:
    store = MemoryStore() if explicit else None
    assert admitted(define("3/day", store=store), "alice") == 3
    wider = define("5/day", store=store)
    assert admitted(wider, "alice") == 2
    narrower = define("1/day", store=store)
    with pytest.raises(RateLimitExceeded) as caught:
        narrower("alice")
    assert (caught.value.used, caught.value.remaining) == (5, 0)
    assert admitted(narrower, "bob") == 1


def test_rule_21_after_a_redefinition_the_name_has_its_limits() -> None:
    define("3/day")("alice")
    define("5/day")("alice")
    assert RateLimiter("5/day", name="notebook").peek("alice").used == 2
    with pytest.raises(InvalidLimit, match=r"taken by .*5/day.*, and this is .*3/day"):
        RateLimiter("3/day", name="notebook").peek("alice")


def test_rule_21_a_redefinition_may_change_the_burst_and_keeps_the_count() -> None:
    assert admitted(define(TokenBucket("9/day", burst=2)), "alice") == 2
    assert admitted(define(TokenBucket("9/day", burst=5)), "alice") == 3


@pytest.mark.parametrize("other", ["2/hour", "2/2 days", TokenBucket("2/day"), CalendarWindow("2/day")], ids=repr)
def test_rule_21_a_redefinition_with_another_algorithm_or_period_counts_anew(other: Any) -> None:
    assert admitted(define("2/day"), "alice") == 2
    assert admitted(define(other), "alice") == 2


def test_rule_21_a_redefinition_may_change_the_zone_and_counts_anew() -> None:
    assert admitted(define(CalendarWindow("2/day")), "alice") == 2
    assert admitted(define(CalendarWindow("2/day", tz="Asia/Tokyo")), "alice") == 2


def test_rule_21_positions_are_apart_and_kept() -> None:
    assert admitted(define("2/day", "5/hour"), "alice") == 2
    assert admitted(define("4/day", "5/hour"), "alice") == 2


def test_rule_21_another_function_may_not_replace() -> None:
    define("2/day")("alice")
    with pytest.raises(InvalidLimit, match="notebook"):
        RateLimiter("3/day", name="notebook").acquire("alice")


def test_rule_21_a_lambda_is_no_redefinition_of_another() -> None:
    rate_limited("2/day", key="user", name="notebook")(lambda user: user)("alice")
    with pytest.raises(InvalidLimit, match="notebook"):
        rate_limited("3/day", key="user", name="notebook")(lambda user: user)("alice")


# One object, several functions


@pytest.mark.parametrize("name", [None, "shared"])
def test_a_limiter_object_is_shared_by_the_functions_it_is_given_to(name: str | None) -> None:
    shared = RateLimiter("4/day", name=name)

    @rate_limited(shared, key="user")
    def one(user: str) -> None: ...

    @rate_limited(shared, key=lambda request: request["user"], cost=2)
    async def other(request: dict[str, str]) -> None: ...

    import asyncio

    one("alice")
    asyncio.run(other({"user": "alice"}))
    assert shared.allow("alice")
    with pytest.raises(RateLimitExceeded) as caught:
        one("alice")
    assert caught.value.name == shared.name
    assert limiters_of(one) == limiters_of(other) == (shared,)
    assert admitted(one, "bob") == 4


def test_a_budget_object_is_shared_by_the_functions_it_is_given_to() -> None:
    shared = TokenBudget("10/day", name="tokens")

    @token_budget(shared, key="user", reserve=3)
    def one(user: str) -> None: ...

    @token_budget(shared, key="user", usage=lambda result: result)
    def other(user: str) -> int:
        return 5

    one("alice")
    other("alice")
    assert shared.peek("alice").used == 8
    with pytest.raises(TokenBudgetExceeded):
        one("alice")
    other("alice")
    with pytest.raises(TokenBudgetExceeded):
        other("alice")
    assert shared.peek("alice").used == 13


def test_decorating_with_a_limiter_object_keeps_its_name() -> None:
    shared = RateLimiter("9/day")

    @rate_limited(shared, key="user")
    def one(user: str) -> None: ...

    one("alice")
    name = shared.name

    @rate_limited(shared, key="user")
    def other(user: str) -> None: ...

    other("alice")
    assert shared.name == name == shared.peek("alice").name


def test_rule_21_a_shared_object_has_no_function_that_could_redefine_it() -> None:
    """A limiter object belongs to no function: decorating with it makes no other limit of its name a re-definition."""

    def ask(user: str) -> None: ...

    store = MemoryStore()
    shared = RateLimiter("2/day", name="shared", store=store)
    rate_limited(shared, key="user")(ask)
    with pytest.raises(InvalidLimit, match="shared"):
        rate_limited("9/day", key="user", name="shared", store=store)(ask)


# The default store


def test_a_limiter_asks_for_the_default_store_at_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs choose the store after they have imported what is limited."""
    asked: list[object] = []

    def follow(limiter: Any) -> MemoryStore:
        asked.append(limiter)
        return MemoryStore()

    monkeypatch.setattr("quotalimit.limiters.follow", follow)
    limiter = RateLimiter("2/day")
    rate_limited(limiter, key="user")(tenant_of)
    assert asked == []
    limiter.acquire("alice")
    limiter.acquire("alice")
    assert asked == [limiter]


def test_configure_sets_the_store_of_functions_decorated_before_and_after() -> None:
    first = MemoryStore()
    configure(store=first)
    assert chat("alice")
    later = rate_limited("2/day", key="user")(lambda user: user)
    for _ in range(2):
        configure(store=MemoryStore())
        assert admitted(chat, "alice") == 2
        assert admitted(later, "alice") == 2
    configure(store=first)
    assert admitted(Bot().chat, "alice") == 2


def test_configure_brings_back_the_counts_of_named_limiters() -> None:
    first, limiter = MemoryStore(), RateLimiter("2/day", name="chat")
    configure(store=first)
    assert limiter.allow("alice")
    configure(store=MemoryStore())
    assert admitted(limiter.acquire, "alice") == 2
    configure(store=first)
    assert admitted(limiter.acquire, "alice") == 1


def test_a_store_of_its_own_is_not_touched_by_configure() -> None:
    own = rate_limited("2/day", key="user", store=MemoryStore())(lambda user: user)
    assert own("alice")
    configure(store=MemoryStore())
    assert admitted(own, "alice") == 1


def test_a_hold_settles_on_the_store_it_was_taken_from() -> None:
    """Rule 14, also where the default store changes while the call runs."""
    first, budget = MemoryStore(), TokenBudget("100/day", name="tokens")
    configure(store=first)
    with budget.reserve("alice", 10) as hold:
        configure(store=MemoryStore())
        hold.settle(60)
    assert budget.peek("alice").used == 0
    configure(store=first)
    assert budget.peek("alice").used == 60


@pytest.mark.parametrize("wrong", [None, "memory://", MemoryStore, 7])
def test_configure_refuses_what_is_no_store(wrong: Any) -> None:
    with pytest.raises(TypeError, match="MemoryStore"):
        configure(store=wrong)


@pytest.mark.parametrize("wrong", ["memory://", MemoryStore, 7])
def test_a_limiter_refuses_what_is_no_store(wrong: Any) -> None:
    with pytest.raises(TypeError, match="store"):
        RateLimiter("2/day", store=wrong)


def test_a_store_from_a_url() -> None:
    one, other = store_from_url("memory://"), store_from_url("memory://")
    assert isinstance(one, MemoryStore)
    assert one is not other
    assert RateLimiter("1/day", name="chat", store=one).allow("alice")
    assert RateLimiter("1/day", name="chat", store=other).allow("alice")


def test_limiters_share_a_store_in_memory_unless_a_program_chooses_another() -> None:
    replace_default(None)
    one, other = (RateLimiter("2/day", name="chat") for _ in range(2))
    one.acquire("alice")
    assert type(one.bound().store) is MemoryStore
    assert other.peek("alice").used == 1


@pytest.mark.parametrize("url", ["", "memory", "mysql://host/db", "http://[bad", "://", "postgres://"])
def test_a_url_of_no_store_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"store|URL"):
        store_from_url(url)


def test_the_scheme_of_no_store_is_named() -> None:
    with pytest.raises(ValueError, match="no store for the scheme 'mysql'"):
        store_from_url("mysql://host/db")
