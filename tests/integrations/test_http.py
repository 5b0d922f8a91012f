"""What is told to HTTP clients: the status, headers that parse and are true, and never whose limit it is."""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from typing import Any

import pytest
import time_machine
from hypothesis import given
from hypothesis import strategies as st

from quotalimit import (
    CalendarWindow,
    Decision,
    LimitExceeded,
    Rate,
    RateLimiter,
    RateLimitExceeded,
    StoreFull,
    StoreUnavailable,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    collect_decisions,
    rate_limited,
    token_budget,
)
from quotalimit.integrations import http

from ..helpers import reply
from .conftest import NOON
from .fields import limits, policies

pytestmark = pytest.mark.usefixtures("clock")
SECRET = "alice@example.org"


def refusal(limiter: RateLimiter | TokenBudget, cost: int = 1) -> LimitExceeded:
    """The exception with which a limiter refuses, once it is used up."""
    ask = limiter.acquire if isinstance(limiter, RateLimiter) else limiter.charge
    with pytest.raises(LimitExceeded) as caught:  # noqa: PT012
        for _ in range(1_000):
            ask(SECRET, cost)
    return caught.value


# Status and Retry-After


def test_what_may_pass_later_is_429_with_retry_after_in_whole_seconds_rounded_up(
    clock: time_machine.Traveller,
) -> None:
    limiter = RateLimiter("2/minute", name="burst")
    limiter.acquire(SECRET)
    clock.shift(timedelta(seconds=10.25))
    error = refusal(limiter)
    assert error.retry_after == 49.75
    assert http.status_of(error) == 429
    assert http.headers_of(error)["Retry-After"] == "50"

    clock.shift(timedelta(seconds=49))
    with pytest.raises(RateLimitExceeded):
        limiter.acquire(SECRET)
    clock.shift(timedelta(seconds=1))
    assert limiter.allow(SECRET)


def test_retry_after_is_exact_for_a_whole_number_of_seconds_and_at_least_one() -> None:
    error = refusal(RateLimiter("1/minute"))
    assert http.headers_of(error)["Retry-After"] == "60"
    short = refusal(RateLimiter(TokenBucket("1000/second", burst=1)))
    assert short.retry_after == 0.001
    assert http.headers_of(short)["Retry-After"] == "1"


def test_what_could_never_fit_is_413_and_never_to_be_retried() -> None:
    error = refusal(RateLimiter("5/minute", name="burst"), cost=6)
    answer = http.answer_to(error)
    assert error.reason == "too_large"
    assert answer.status == 413
    assert "Retry-After" not in answer.headers
    assert limits(answer.headers) == {"burst": {"r": 5}}
    assert json.loads(answer.body)["status"] == 413


def test_busy_is_429_too() -> None:
    budget = TokenBudget("10/day", name="tokens")
    with budget.reserve(SECRET, 8) as hold:
        error = refusal(budget, 5)
        assert error.reason == "busy"
        assert http.status_of(error) == 429
        hold.settle(1)


@pytest.mark.parametrize("error", [StoreUnavailable("redis://u:hunter2@db.internal"), StoreFull("hunter2")])
def test_a_store_that_cannot_answer_is_503_and_its_trouble_is_logged_and_not_shown(
    error: StoreUnavailable | StoreFull, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "quotalimit"):
        status, headers, body = http.answer_to(error)
    assert (status, headers) == (503, {"Content-Type": "application/problem+json"})
    assert json.loads(body) == {"type": "about:blank", "title": "Service Unavailable", "status": 503}
    assert "hunter2" in caplog.text


# RateLimit-Policy and RateLimit


def test_headers_list_every_policy_with_its_quota_unit_and_window() -> None:
    @rate_limited("100/minute", "1000/day", key="user", name="calls")
    @rate_limited("3/10 seconds", key="user", name="burst")
    @token_budget("10_000/day", key="user", reserve=50, name="tokens")
    @token_budget("1M/month", key="user", name="monthly")
    def chat(user: str) -> Any:
        return reply(10, 5)

    with collect_decisions() as seen:
        chat(SECRET)
    headers = http.rate_limit_headers(seen)
    assert policies(headers) == {
        "calls 100/minute": {"q": 100, "w": 60},
        "calls 1000/day": {"q": 1000, "w": 86400},
        "burst": {"q": 3, "w": 10},
        "tokens": {"q": 10_000, "qu": "tokens", "w": 86400},
        "monthly": {"q": 1_000_000, "qu": "tokens"},  # months differ in length
    }
    assert limits(headers) == {
        "calls 100/minute": {"r": 99, "t": 60},
        "calls 1000/day": {"r": 999, "t": 86400},
        "burst": {"r": 2, "t": 10},
        "tokens": {"r": 9_985, "t": 12 * 3600},
        "monthly": {"r": 999_985},  # it used more than it held, which was nothing
    }
    assert list(headers) == ["RateLimit-Policy", "RateLimit"]


def test_without_decisions_there_are_no_headers() -> None:
    assert http.rate_limit_headers([], x_ratelimit=True) == {}


def test_of_several_calls_the_last_tells_what_is_left() -> None:
    limiter = RateLimiter("5/minute", name="burst")
    with collect_decisions() as seen:
        for _ in range(3):
            limiter.acquire(SECRET)
    assert limits(http.rate_limit_headers(seen))["burst"]["r"] == 2


def test_what_is_left_of_a_budget_is_known_once_the_call_is_settled() -> None:
    """Before, its hold counts; after, what it used (rule 8)."""

    @token_budget("100/day", key="user", reserve=60, name="tokens")
    def chat(user: str) -> Any:
        during.append(http.rate_limit_headers(seen))
        return reply(70)

    during: list[dict[str, str]] = []
    with collect_decisions() as seen:
        chat(SECRET)
    assert limits(during[0])["tokens"]["r"] == 40
    assert limits(http.rate_limit_headers(seen))["tokens"]["r"] == 30


def test_a_budget_in_debt_has_nothing_left() -> None:
    @token_budget("100/day", key="user", name="tokens")
    def chat(user: str) -> Any:
        return reply(500)

    with collect_decisions() as seen:
        chat(SECRET)
    assert limits(http.rate_limit_headers(seen))["tokens"]["r"] == 0


def test_t_is_when_a_refused_request_fits_and_else_when_all_is_there_again(clock: time_machine.Traveller) -> None:
    limiter = RateLimiter("2/minute", name="burst")
    limiter.acquire(SECRET)
    clock.shift(timedelta(seconds=20))
    with collect_decisions() as seen:
        limiter.acquire(SECRET)
    assert limits(http.rate_limit_headers(seen)) == {"burst": {"r": 0, "t": 60}}
    assert limits(http.headers_of(refusal(limiter))) == {"burst": {"r": 0, "t": 40}}
    clock.shift(timedelta(seconds=60))
    assert limiter.peek(SECRET).remaining == 2


def test_no_t_is_later_than_retry_after() -> None:
    """The draft's section 6: Retry-After should not point to a time before the reset parameter's."""
    minute, day = RateLimiter("1/minute", name="minute"), TokenBudget("100/day", name="day")
    with collect_decisions() as seen:
        day.charge(SECRET, 5)
        error = refusal(minute)
    headers = http.rate_limit_headers(seen)
    assert limits(headers) == {"day": {"r": 95}, "minute": {"r": 0, "t": 60}}
    assert http.retry_after(error) == 60


def test_several_violated_limits_are_all_listed() -> None:
    limiter = RateLimiter("2/minute", "2/hour", "9/day", name="calls")
    answer = http.answer_to(refusal(limiter))
    assert answer.headers["Retry-After"] == "3600"
    assert limits(answer.headers) == {"calls 2/minute": {"r": 0, "t": 60}, "calls 2/hour": {"r": 0, "t": 3600}}
    assert json.loads(answer.body)["violated-policies"] == ["calls 2/minute", "calls 2/hour"]


def test_numbers_larger_than_a_structured_field_holds_are_cut() -> None:
    largest = 2**53 - 1
    headers = http.rate_limit_headers([RateLimiter(Rate(largest, "minute"), name="huge").acquire(SECRET)])
    assert policies(headers)["huge"]["q"] == 10**15 - 1
    assert limits(headers)["huge"]["r"] == 10**15 - 1


@given(st.text(min_size=1), st.sampled_from(["requests", "tokens"]))
def test_any_name_makes_a_header_that_parses_and_cannot_add_another(name: str, unit: Any) -> None:
    decision = Decision(name, Rate(5, "minute"), 1, 1, 4, 0, 0, None)
    decision.unit = unit
    headers = http.rate_limit_headers([decision])
    assert len(policies(headers)) == len(limits(headers)) == 1
    assert all(" " <= character <= "~" for value in headers.values() for character in value)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("app.main:ask:user", "app.main:ask:user"),
        ('say "hi" \\', 'say "hi" \\'),
        ("täglich", "t%C3%A4glich"),
        ("a\r\nSet-Cookie: x", "a%0D%0ASet-Cookie: x"),
    ],
)
def test_names_in_headers_and_body_are_the_same(name: str, shown: str) -> None:
    answer = http.answer_to(refusal(RateLimiter("1/minute", name=name)))
    assert list(policies(answer.headers)) == json.loads(answer.body)["violated-policies"] == [shown]


# X-RateLimit


def test_x_ratelimit_headers_are_those_of_the_limit_that_binds() -> None:
    @rate_limited("100/minute", key="user", name="minute")
    @rate_limited("3/hour", key="user", name="hour")
    def chat(user: str) -> None: ...

    with collect_decisions() as seen:
        chat(SECRET)
    headers = http.rate_limit_headers(seen, x_ratelimit=True)
    hour = str(int(NOON.timestamp()) + 3600)
    expected = {"X-RateLimit-Limit": "3", "X-RateLimit-Remaining": "2", "X-RateLimit-Reset": hour}
    assert {name: headers[name] for name in headers if name.startswith("X-")} == expected


def test_x_ratelimit_headers_of_a_refusal() -> None:
    headers = http.headers_of(refusal(RateLimiter("1/minute")), x_ratelimit=True)
    assert headers["X-RateLimit-Remaining"] == "0"
    assert headers["X-RateLimit-Reset"] == str(int(NOON.timestamp()) + 60)


# The body


def test_the_body_is_the_drafts_problem() -> None:
    answer = http.answer_to(refusal(TokenBudget("10_000/day", name="daily"), 9_000))
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert json.loads(answer.body) == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Request cannot be satisfied as assigned quota has been exceeded",
        "status": 429,
        "detail": "10000/day exceeded: 9000 requested, 1000 remaining; retry after 43200 s",
        "violated-policies": ["daily"],
    }


@pytest.mark.parametrize("key", [SECRET, (SECRET, "org-7"), b"alice@example.org"])
def test_no_identity_is_in_headers_or_body(key: Any) -> None:
    limiter = RateLimiter("1/minute", CalendarWindow("1/month", tz="Europe/Paris"))
    with collect_decisions() as seen:
        limiter.acquire(key)
    with pytest.raises(RateLimitExceeded) as caught:
        limiter.acquire(key)
    answer = http.answer_to(caught.value, x_ratelimit=True)
    told = repr((answer, http.rate_limit_headers(seen, x_ratelimit=True)))
    assert "alice" not in told
    assert "org-7" not in told


def test_an_exception_that_has_travelled_is_answered_all_the_same() -> None:
    import pickle

    error = refusal(TokenBudget("10/day", "50/month", name="tokens"))
    assert isinstance(error, TokenBudgetExceeded)
    assert http.answer_to(pickle.loads(pickle.dumps(error))) == http.answer_to(error)
