"""The two classes of a beginner's lesson as oracles: `RateLimiter` and `TokenBudget` decide the same, call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import time_machine
from freezegun import freeze_time

from quotalimit import RateLimiter, TokenBudget, TokenBudgetExceeded

START = datetime(2024, 2, 28, 21, 0, tzinfo=UTC).timestamp()
USERS = ["alice", "bob", "carol"]


class LessonLimiter:
    """A list of timestamps per user, of which those newer than now - window count."""

    def __init__(self, limit: int, window: float) -> None:
        self.limit = limit
        self.window = window
        self.calls: dict[str, list[float]] = {}

    def allow(self, user: str, cost: int, now: float) -> bool:
        recent = [moment for moment in self.calls.get(user, []) if moment > now - self.window]
        self.calls[user] = recent
        if len(recent) + cost > self.limit:
            return False
        recent.extend([now] * cost)
        return True


class LessonBudget:
    """{date, tokens} per user, in UTC, which refuses when the tokens would pass the limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.days: dict[str, tuple[date, int]] = {}

    def charge(self, user: str, tokens: int, now: float) -> bool:
        today = datetime.fromtimestamp(now, UTC).date()
        day, used = self.days.get(user, (today, 0))
        if day != today:
            used = 0
        if used + tokens > self.limit:
            return False
        self.days[user] = (today, used + tokens)
        return True


class Call(NamedTuple):
    """One call of a trace, at a time in seconds that a float holds exactly."""

    now: float
    user: str
    units: int


def trace(random: Random, window: int, limit: int) -> list[Call]:
    """Some 40 calls of three users over a few windows. Times stand still, step to the edge of a window and over it."""
    elapsed = [0.0, 0.0, 0.0, 0.25, window / 8, window / 4, window - 0.25, window, window + 0.25]
    most = random.choice([1, 1, 3, limit + 1])
    now, calls = START + random.choice([0, random.randrange(4 * window)]) / 4, []
    for _ in range(random.randrange(20, 60)):
        now += random.choice(elapsed) if random.random() < 0.5 else random.randrange(window) / 4
        calls.append(Call(now, random.choice(USERS), random.randint(min(most, 1), most)))
    return calls


SetClock = Callable[[float], None]


@contextmanager
def patched() -> Iterator[SetClock]:
    present = [START]
    with patch("time.time", lambda: present[0]):
        yield lambda now: present.__setitem__(0, now)


@contextmanager
def travelled() -> Iterator[SetClock]:
    with time_machine.travel(START, tick=False) as traveller:
        yield traveller.move_to


@contextmanager
def frozen() -> Iterator[SetClock]:
    with freeze_time(datetime.fromtimestamp(START, UTC)) as freezer:
        yield lambda now: freezer.move_to(datetime.fromtimestamp(now, UTC))


CLOCKS = pytest.mark.parametrize(("clock", "traces"), [(patched, 1_000), (travelled, 300), (frozen, 100)])
"""Frozen time: thousands of traces where it is cheap to move, some under each library that freezes it."""


@CLOCKS
def test_rate_limiter_decides_as_the_lesson(clock: Callable[[], Any], traces: int) -> None:
    """Rule 1: `RateLimiter.allow` admits exactly what a list of timestamps admits."""
    random, refused, asked = Random(1), 0, 0
    with clock() as set_clock:
        for number in range(traces):
            limit, window = random.choice([1, 2, 3, 5, 10]), random.choice([1, 10, 60, 3_600])
            limiter, lesson = RateLimiter(f"{limit}/{window} seconds"), LessonLimiter(limit, window)
            for place, call in enumerate(calls := trace(random, window, limit)):
                set_clock(call.now)
                expected = lesson.allow(call.user, call.units, call.now)
                assert limiter.allow(call.user, call.units) == expected, (number, limiter, place, calls)
                asked, refused = asked + 1, refused + (not expected)
    assert asked / 10 < refused < asked * 9 / 10


@CLOCKS
def test_token_budget_decides_as_the_lesson(clock: Callable[[], Any], traces: int) -> None:
    """Rule 20: `TokenBudget.charge` admits exactly what a count of each day in UTC admits."""
    random, refused, asked = Random(2), 0, 0
    with clock() as set_clock:
        for number in range(traces):
            limit, step = random.choice([1, 3, 10, 1_000]), random.choice([60, 3_600, 86_400])
            budget, lesson = TokenBudget(f"{limit}/day"), LessonBudget(limit)
            for place, call in enumerate(calls := trace(random, step, limit)):
                set_clock(call.now)
                expected = lesson.charge(call.user, call.units, call.now)
                assert charge(budget, call) == expected, (number, budget, place, calls)
                asked, refused = asked + 1, refused + (not expected)
    assert asked / 10 < refused < asked * 9 / 10


def charge(budget: TokenBudget, call: Call) -> bool:
    try:
        return bool(budget.charge(call.user, call.units))
    except TokenBudgetExceeded:
        return False
