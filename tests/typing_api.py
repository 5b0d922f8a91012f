"""Typed uses of the whole public API: checked by mypy --strict and pyright, never executed."""

from __future__ import annotations

import functools
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from typing import Literal, Protocol, assert_type
from uuid import UUID

from fastapi import FastAPI, Request
from flask import Flask
from starlette.applications import Starlette

from quotalimit import (
    KEEP,
    RELEASE,
    UNLIMITED,
    CalendarWindow,
    Decision,
    Event,
    Hold,
    InvalidKey,
    InvalidLimit,
    LimitExceeded,
    MemoryStore,
    QuotaLimitError,
    Rate,
    RateLimiter,
    RateLimitExceeded,
    Settlement,
    SlidingWindow,
    Store,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    Usage,
    collect_decisions,
    configure,
    estimate_tokens,
    everyone,
    ip_key,
    limiters_of,
    log_event,
    on_event,
    rate_limited,
    read_error,
    read_usage,
    record_usage,
    store_from_url,
    testing,
    token_budget,
)
from quotalimit.integrations import fastapi as of_fastapi
from quotalimit.integrations import flask as of_flask

# Every kind of function keeps its type


@rate_limited("100/minute", key=lambda request: ip_key(request))
@rate_limited("20/minute", Rate(500, "day"), TokenBucket("5/second", burst=9), key="user", name="calls", wait=1.5)
@token_budget("10_000/day", key="user", reserve=lambda prompt: len(prompt))
def function(request: str, user: str, prompt: str = "hello", *, model: str = "small") -> list[str]:
    return [request, user, prompt, model]


@rate_limited("20/minute", key=everyone, cost=2, wait=math.inf, refund_on=(KeyError, TimeoutError))
@token_budget(CalendarWindow("1M/month", tz="Europe/Paris"), key="user", reserve=1_500)
async def coroutine_function(user: str) -> int:
    return len(user)


@rate_limited(SlidingWindow("20/minute"), key="user", refund_on=ConnectionError)
@token_budget("10_000/day", key="user", usage=lambda item: len(item))
def generator(user: str) -> Iterator[str]:
    yield user


@rate_limited("20/minute", key="user")
@token_budget("10_000/day", key="user")
async def async_generator(user: str) -> AsyncIterator[bytes]:
    yield user.encode()


assert_type(function("203.0.113.7", "alice", model="large"), list[str])
assert_type(generator("alice"), Iterator[str])
assert_type(async_generator("alice"), AsyncIterator[bytes])
function("203.0.113.7")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
function("203.0.113.7", 7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class Chats(Protocol):
    def chat(self, user: str) -> str: ...


class Bot:
    name: str = "bot"

    @rate_limited("20/minute", key=lambda self, user: (self.name, user))
    def chat(self, user: str) -> str:
        return user

    @token_budget("10_000/day", key="user")
    async def chat_async(self, user: str) -> bytes:
        return user.encode()

    @rate_limited("20/minute", key="user")
    @classmethod
    def above(cls, user: str) -> type[Bot]:
        return cls

    @classmethod
    @token_budget("10_000/day", key="user")
    def below(cls, user: str) -> type[Bot]:
        return cls

    @rate_limited("20/minute", key="user")
    @staticmethod
    def static_above(user: str) -> float:
        return len(user)

    @staticmethod
    @token_budget("10_000/day", key="user")
    async def static_below(user: str) -> float:
        return len(user)

    def __call__(self, user: str) -> complex:
        return len(user)


class AsyncBot:
    async def __call__(self, user: str) -> complex:
        return len(user)


bot = Bot()
chats: Chats = bot
assert_type(bot.chat("alice"), str)
assert_type(Bot.chat(bot, "alice"), str)
assert_type(Bot.above("alice"), type[Bot])
assert_type(bot.below("alice"), type[Bot])
assert_type(Bot.static_above("alice"), float)
assert_type(rate_limited("20/minute", key="user")(bot), Bot)
assert_type(rate_limited("20/minute", key="user")(bot)("alice"), complex)
assert_type(token_budget("10_000/day", key="user")(AsyncBot()), AsyncBot)
bot.chat(7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Bot.above(7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def plain(user: str, prompt: str) -> str:
    return user + prompt


partial = functools.partial(plain, prompt="hello")
assert_type(rate_limited("20/minute", key="user")(partial), functools.partial[str])
assert_type(rate_limited("20/minute", key="user")(partial)("alice"), str)

by_lambda: Callable[[str], int] = rate_limited("20/minute", key="user")(lambda user: len(user))
assert_type(by_lambda("alice"), int)


def returns_awaitable(user: str) -> Awaitable[int]:
    return coroutine_function(user)


assert_type(rate_limited("20/minute", key="user")(returns_awaitable)("alice"), Awaitable[int])

# Keys, costs, tiers and readers


def plan_of(user: str) -> str | list[SlidingWindow]:
    return "20/minute" if user else [SlidingWindow("20/minute")]


tiered = rate_limited(plan_of, key="user")
tiered_budget = token_budget(lambda plan: UNLIMITED if plan == "staff" else Rate(5, "day"), key="user")
for_any_identity = rate_limited(
    "20/minute", key=lambda user: (user, 1, b"x", UUID(int=1)), cost=lambda tokens: tokens * 0.5
)


def by_usage(usage: Usage) -> float:
    return usage.input_tokens + 4 * usage.output_tokens + usage.cache_read_tokens * 0.1


def on_failure(error: BaseException) -> Usage | int | None:
    return read_usage(error) if isinstance(error, ValueError) else 7


weighed = token_budget("10_000/day", key="user", usage=read_usage, weigh=by_usage, on_error=read_error)
estimated = token_budget("10_000/day", key="user", reserve=lambda prompt: estimate_tokens(prompt), on_error=on_failure)
released = token_budget("10_000/day", key="user", on_error=lambda error: KEEP if error.args else RELEASE)

rate_limited("20/minute")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
rate_limited(20, key="user")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rate_limited(TokenBudget("20/day"), key="user")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
token_budget(RateLimiter("20/day"), key="user")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rate_limited("20/minute", key="user", refund_on=KeyError())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rate_limited("20/minute", key="user", store="memory://")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

# Limiters

store: Store = MemoryStore(max_keys=1_000)
configure(store=store)
assert_type(store_from_url("memory://"), Store)

limiter = RateLimiter("20/minute", Rate.parse("500/day"), TokenBucket("5/second"), name="chat", store=store)
budget = TokenBudget("10_000/day", name="tokens")
shared = rate_limited(limiter, key="user")(token_budget(budget, key="user")(plain))
assert_type(shared("alice", "hello"), str)

assert_type(limiter.allow("alice"), bool)
assert_type(limiter.allow(("alice", 7), cost=0.5), bool)
assert_type(limiter.acquire("alice", cost=1, wait=2.0), Decision)
assert_type(limiter.peek(UUID(int=1)), Decision)
limiter.reset(b"alice")
limiter.allow(None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
limiter.allow(1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

assert_type(budget.charge("alice", 120), Decision)
with budget.reserve("alice", 1_500, wait=1) as hold:
    assert_type(hold, Hold)
    assert_type(hold.decision, Decision)
    assert_type(hold.settlement, Settlement | None)
    assert_type(hold.settle({"usage": {"total_tokens": 7}}), Settlement)
assert_type(budget.peek("alice"), Decision)
budget.reset("alice")


async def asynchronously() -> None:
    assert_type(await coroutine_function("alice"), int)
    assert_type(await bot.chat_async("alice"), bytes)
    assert_type(await Bot.static_below("alice"), float)
    assert_type(await rate_limited("20/minute", key="user")(AsyncBot())("alice"), complex)
    assert_type([item async for item in async_generator("alice")], list[bytes])
    assert_type(await limiter.allow_async("alice"), bool)
    assert_type(await limiter.acquire_async("alice", 2, wait=math.inf), Decision)
    assert_type(await limiter.peek_async("alice"), Decision)
    await limiter.reset_async("alice")
    assert_type(await budget.charge_async("alice", 120), Decision)
    async with budget.reserve_async("alice", 1_500) as held:
        assert_type(held, Hold)
        held.settle(Usage(input_tokens=3, output_tokens=4))
    assert_type(await budget.reserve_async("alice", 1_500), Hold)
    assert_type(await budget.peek_async("alice"), Decision)
    await budget.reset_async("alice")


for found in limiters_of(function):
    assert_type(found.name, str)
    assert_type(found.peek("alice"), Decision)

# Decisions, usage and exceptions

assert_type(record_usage(Usage(total_tokens=7)), bool)
assert_type(read_usage({}), Usage | None)
assert_type(estimate_tokens("hello", ["world"]), int)
assert_type(ip_key("203.0.113.7"), str)
assert_type(everyone("anything", at="all"), str)

with collect_decisions() as seen:
    assert_type(seen, list[Decision])
    for decision in seen:
        assert_type(decision.allowed, bool)
        assert_type(decision.limit, Rate)
        assert_type(decision.retry_after, float | None)
        assert_type(decision.reset_at, datetime)
        assert_type(decision.reason, Literal["exhausted", "busy", "too_large"] | None)
        if decision.settlement is not None:
            assert_type(decision.settlement.used, int)
            assert_type(decision.settlement.overrun, int)
            assert_type(
                decision.settlement.source, Literal["reported", "recorded", "reserved", "estimated", "released"]
            )

try:
    function("203.0.113.7", "alice")
except RateLimitExceeded as refused:
    assert_type(refused.retry_after, float | None)
    assert_type(refused.reset_at, datetime)
    assert_type(refused.limit, Rate)
    assert_type(refused.limit.amount, int)
    assert_type(refused.limit.period, int | None)
    assert_type((refused.requested, refused.used, refused.remaining), tuple[int, int, int])
    assert_type(refused.reason, Literal["exhausted", "busy", "too_large"])
    assert_type(refused.violations, tuple[Decision, ...])
    assert_type(refused.name, str)
except TokenBudgetExceeded as refused_tokens:
    exceeded: LimitExceeded = refused_tokens
except (InvalidLimit, InvalidKey, StoreFull, StoreUnavailable, StoreError) as wrong:
    base: QuotaLimitError = wrong

# Events and layers that only tell


def hear(event: Event) -> None:
    assert_type(event.kind, Literal["admitted", "refused", "waited", "settled", "overrun", "store_failed"])
    assert_type(event.decision, Decision | None)
    assert_type(event.settlement, Settlement | None)
    assert_type((event.name, event.waited, event.enforced), tuple[str, float, bool])
    event.name = "another"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


assert_type(on_event(hear), Callable[[], None])
on_event(log_event)()
told = rate_limited("20/minute", key="user", enforce=False)(token_budget("9/day", key="user", enforce=False)(plain))
assert_type(told("alice", "hello"), str)


# What tests use


def test_of_limited_code(clock: testing.Clock) -> None:
    with testing.use_store(MemoryStore(), function, limiter) as used_store, testing.Clock() as later:
        assert_type(used_store, Store)
        assert_type(later, testing.Clock)
    clock.tick(60)
    clock.tick(timedelta(days=1))
    clock.move_to(clock.now)
    testing.exhaust(function, "alice")
    testing.exhaust(budget, ("alice", 7), leave=3)
    testing.assert_no_holds(function, budget, store)
    testing.fake_response("hello", input_tokens=900, like="openai-responses")
    testing.fake_stream(like="nobody")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Web frameworks


def web(app: FastAPI, service: Starlette, site: Flask) -> None:
    of_fastapi.install(app)
    of_fastapi.install(service, x_ratelimit=True)
    of_flask.install(site, x_ratelimit=True)


@rate_limited("100/minute", key=of_fastapi.client_address("10.0.0.0/8", "unix", header="Forwarded"))
async def endpoint(request: Request) -> str:
    return "hello"


@rate_limited("100/minute", key=of_flask.client_address("10.0.0.0/8"))
def view(page: int) -> str:
    return "hello"


assert_type(view(1), str)
checked: Callable[[Request], Awaitable[str]] = endpoint
