"""Random interleavings of all that can happen to a token budget, against a plain model (rules 7, 9, 11 to 14, 19).

The model knows no algorithm of the library: it keeps a list of charges and the one rule of each kind of limit. What a
calendar or a sliding window has in use must be equal to it at every moment; a bucket must stay between two bounds.
"""

from __future__ import annotations

import contextvars
import gc
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quotalimit import (
    CalendarWindow,
    MemoryStore,
    SlidingWindow,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    record_usage,
    token_budget,
)

from ..helpers import open_holds


@pytest.fixture(autouse=True)
def no_warnings_of_estimates(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "quotalimit")


SECOND = 1_000_000
PERIOD = 60 * SECOND
NOON = 1_795_435_200 * SECOND
LIMIT = 20
BURST = 15
ESTIMATES = {"alice": 2, "bob": 1}
"""What a call is charged of which nothing but its one argument is known: five bytes, and three."""


class Ledger(ABC):
    """What one identity has in use. Every question tells the time."""

    @abstractmethod
    def take(self, now: int, units: int) -> Any:
        """Charge units, and tell by what they are found again."""

    @abstractmethod
    def adjust(self, now: int, mark: Any, delta: int) -> None: ...

    @abstractmethod
    def agrees(self, now: int, used: int, *, can_forget: bool) -> bool:
        """Whether so many units may be in use."""

    @abstractmethod
    def admits(self, now: int, units: int) -> bool | None:
        """Whether so many units more fit; None if either answer will do."""


class Window(Ledger):
    """A ledger that is exact. What is out of the window may have been forgotten when the clock steps back to it."""

    def __init__(self) -> None:
        self.forgettable = False

    @abstractmethod
    def used(self, now: int) -> int: ...

    @abstractmethod
    def forget(self) -> None: ...

    def agrees(self, now: int, used: int, *, can_forget: bool) -> bool:
        expected = self.used(now)
        if expected == 0:
            self.forgettable = self.forgettable or can_forget
        elif used == 0 and self.forgettable:
            self.forget()
            return True
        return used == expected

    def admits(self, now: int, units: int) -> bool:
        return self.used(now) + units <= LIMIT


class Minutes(Window):
    """Each minute by itself. The one last opened is re-dated to the present if that comes to lie before it."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        self.minute: int | None = None
        self.units = {0: 0}
        self.opened = 0

    def used(self, now: int) -> int:
        if self.minute is not None and self.minute > now // PERIOD:
            self.minute = now // PERIOD
        return self.units[self.opened] if self.minute == now // PERIOD else 0

    def take(self, now: int, units: int) -> int:
        self.used(now)
        self.forgettable = False
        if self.minute != now // PERIOD:
            self.minute = now // PERIOD
            self.opened += 1
            self.units[self.opened] = 0
        self.units[self.opened] += units
        return self.opened

    def adjust(self, now: int, mark: int, delta: int) -> None:
        self.used(now)
        if self.minute == now // PERIOD and mark == self.opened:
            self.units[mark] += delta
            assert self.units[mark] >= 0


class LastMinute(Window):
    """A list of charges, of which those younger than a minute count. If the newest is of the future, all are moved."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        self.charges: list[list[int]] = []

    def used(self, now: int) -> int:
        early = max((time for time, _ in self.charges), default=now) - now
        if early > 0:
            for charge in self.charges:
                charge[0] -= early
        return sum(units for time, units in self.charges if now - time < PERIOD)

    def take(self, now: int, units: int) -> list[int]:
        self.used(now)
        self.forgettable = False
        self.charges.append([now, units])
        return self.charges[-1]

    def adjust(self, now: int, mark: list[int], delta: int) -> None:
        self.used(now)
        if now - mark[0] < PERIOD:
            mark[1] += delta
            assert mark[1] >= 0


class Bounds(Ledger):
    """A bucket lacks at most what it would if nothing were ever given back.

    And at least what it would if every call had held just what it came to use, and the clock had never stepped back.
    Amounts are in units * PERIOD, of which `LIMIT` refill each microsecond.
    """

    def __init__(self) -> None:
        self.passed = self.seen = self.shift = self.lacks = self.since = 0
        self.charges: list[list[int]] = []

    def look(self, now: int) -> tuple[int, int]:
        self.passed += max(0, now - (self.seen or now))
        self.seen = now
        least = before = 0
        for time, units in [*self.charges, [self.passed, 0]]:
            least = max(0, least - LIMIT * (time - before)) + units * PERIOD
            before = time
        if now + self.shift < self.since:
            self.shift = self.since - now
        return least, max(0, self.lacks - LIMIT * (now + self.shift - self.since))

    def take(self, now: int, units: int) -> list[int]:
        _, most = self.look(now)
        if units:
            self.lacks, self.since = most + units * PERIOD, now + self.shift
        self.charges.append([self.passed, units])
        return self.charges[-1]

    def adjust(self, now: int, mark: list[int], delta: int) -> None:
        if delta > 0:
            self.take(now, delta)
        else:
            mark[1] += delta

    def agrees(self, now: int, used: int, *, can_forget: bool) -> bool:
        least, most = self.look(now)
        return -(-least // PERIOD) <= used <= -(-most // PERIOD)

    def admits(self, now: int, units: int) -> bool | None:
        least, most = self.look(now)
        if most + units * PERIOD <= BURST * PERIOD:
            return True
        return False if least + units * PERIOD > BURST * PERIOD else None


@dataclass(eq=False)
class Running:
    """A call that has not been settled, and what the model knows of it."""

    key: str
    reserve: int | None
    mark: Any
    held: int
    """What of its own is held and not lent."""

    real: Any
    context: contextvars.Context
    parent: Running | None = None
    borrowed: int = 0
    recorded: list[int] = field(default_factory=list)
    inside: int = 0
    """What nested calls were charged on the same key."""

    open: bool = True
    """Whether the budget still holds for it: a reset ends that."""

    ended: bool = False


KEYS = st.sampled_from(["alice", "alice", "alice", "bob"])
UNITS = st.integers(1, 8)
USED = st.integers(0, 14)
ANY = st.integers(0, 3)
"""Which of the calls that run."""

STEPS = st.sampled_from([0, 1, 20 * SECOND, PERIOD - 1, PERIOD, PERIOD + 1]) | st.integers(0, 3 * PERIOD)


class Interleavings(RuleBasedStateMachine):
    """Calls of two users on one budget. Each subclass has a limit."""

    limit: CalendarWindow | SlidingWindow | TokenBucket
    make_ledger: Callable[[], Ledger]
    nests = True
    unreserved_with_steps_back = True

    @initialize(second=st.integers(0, 59), steps_back=st.booleans())
    def begin(self, second: int, steps_back: bool) -> None:
        self.now = NOON + second * SECOND
        self.clock = patch("quotalimit.clock.now", lambda: self.now)
        self.clock.start()
        self.steps_back = steps_back
        self.budget = TokenBudget(self.limit, store=MemoryStore())
        self.ledgers = {key: type(self).make_ledger() for key in ESTIMATES}
        self.calls: list[Running] = []

        @token_budget(self.budget, key="user", usage=lambda item: item)
        def unreserved(user: str) -> Any:
            used = yield
            return used

        self.unreserved = unreserved

    # What begins.

    @rule(key=KEYS, units=UNITS)
    def reserve(self, key: str, units: int) -> None:
        self.hold(contextvars.Context(), key, units, None)

    @rule(which=ANY, key=KEYS, units=UNITS)
    def reserve_inside_another_call(self, which: int, key: str, units: int) -> None:
        outer = [call for call in self.calls if call.parent is None and call.reserve]
        if outer and self.nests:
            self.hold(outer[which % len(outer)].context.copy(), key, units, outer[which % len(outer)])

    @rule(key=KEYS)
    def call_without_a_reserve(self, key: str) -> None:
        if self.steps_back and not self.unreserved_with_steps_back:
            return
        context = contextvars.Context()
        stream = self.ask(key, 1, lambda: context.run(self.unreserved, key))
        if stream is not None:
            context.run(next, stream)
            mark = self.ledgers[key].take(self.now, 0)
            self.calls.append(Running(key, None, mark, 0, stream, context))

    @rule(key=KEYS, units=UNITS)
    def charge(self, key: str, units: int) -> None:
        if self.ask(key, units, lambda: self.budget.charge(key, units)):
            self.ledgers[key].take(self.now, units)

    def hold(self, context: contextvars.Context, key: str, units: int, outer: Running | None) -> None:
        borrowed = min(units, outer.held) if outer and outer.open and outer.key == key else 0
        if borrowed == units and self.steps_back:
            return  # such a call takes nothing: whether it makes the state newer is left open by rule 19
        hold = self.ask(key, units - borrowed, lambda: context.run(self.budget.reserve, key, units))
        if hold is not None:
            context.run(hold.__enter__)
            if outer and borrowed:
                outer.held -= borrowed
            mark = self.ledgers[key].take(self.now, units - borrowed)
            self.calls.append(Running(key, units, mark, units - borrowed, hold, context, outer, borrowed))

    def ask(self, key: str, units: int, real: Callable[[], Any]) -> Any:
        expected = True if units == 0 else self.ledgers[key].admits(self.now, units)
        try:
            answer = real()
        except TokenBudgetExceeded:
            assert expected is not True
            return None
        assert expected is not False
        return answer

    # What happens while it runs.

    @rule(which=ANY, units=USED)
    def record(self, which: int, units: int) -> None:
        for call in [call for call in self.calls if call.reserve][which:][:1]:
            assert call.context.run(record_usage, units)
            call.recorded.append(units)

    # How it ends.

    @precondition(lambda self: self.calls)
    @rule(which=ANY, units=USED)
    def settle(self, which: int, units: int) -> None:
        call = self.calls.pop(which % len(self.calls))
        if call.reserve is None:
            try:
                call.context.run(call.real.send, units)
            except StopIteration:
                pass
            self.end(call, units)
        else:
            settlement = call.real.settle(units)
            used, charged = self.end(call, units)
            assert (settlement.used, settlement.charged, settlement.held) == (used, charged, call.reserve)
            assert settlement.overrun == max(0, charged - call.reserve)
            assert settlement is call.real.settle(units + 1)

    @precondition(lambda self: self.calls)
    @rule(which=ANY, error=st.sampled_from([ValueError(), TimeoutError()]), raises=st.booleans())
    def leave(self, which: int, error: Exception, raises: bool) -> None:
        call = self.calls.pop(which % len(self.calls))
        if call.reserve is None:
            try:
                call.context.run(call.real.throw, ValueError())
            except ValueError:
                pass
            self.end(call, None, released=True)
        elif raises:
            call.context.run(call.real.__exit__, type(error), error, None)
            self.end(call, None, released=isinstance(error, ValueError))
        else:
            call.context.run(call.real.__exit__, None, None, None)
            self.end(call, None)

    @precondition(lambda self: self.calls)
    @rule(which=ANY)
    def drop(self, which: int) -> None:
        call = self.calls.pop(which % len(self.calls))
        call.real = None
        self.end(call, None)

    def end(self, call: Running, reported: int | None, *, released: bool = False) -> tuple[int, int]:
        """Rules 8, 12 and 13: what the call used, and what of that it is charged."""
        known = call.recorded if reported is None else [reported, *call.recorded]
        if known:
            used = sum(known)
        elif released:
            used = 0
        else:
            used = ESTIMATES[call.key] if call.reserve is None else call.reserve
        charged = max(0, used - call.inside)
        call.ended = True
        if call.open:
            self.close(call, charged)
        if call.parent is not None and not call.parent.ended:
            call.parent.recorded += known or [used] * (used > 0)
            call.parent.inside += charged * (call.parent.key == call.key)
        return used, charged

    def close(self, call: Running, charged: int) -> None:
        """Settle in the window of the hold. What is not used of it, the outer call gets back before the budget."""
        call.open = False
        ledger = self.ledgers[call.key]
        over = charged - call.held - call.borrowed
        if over > 0:
            ledger.adjust(self.now, call.mark, over)
            return
        returned = min(call.borrowed, -over)
        if call.parent is not None and call.parent.open:
            call.parent.held += returned
        elif call.parent is not None:
            ledger.adjust(self.now, call.parent.mark, -returned)
        ledger.adjust(self.now, call.mark, over + returned)

    # What happens around it.

    @rule(key=KEYS)
    def reset(self, key: str) -> None:
        self.budget.reset(key)
        self.ledgers[key] = type(self).make_ledger()
        for call in self.calls:
            if call.key == key:
                call.open = False
                call.held = 0

    @rule(step=STEPS)
    def let_time_pass(self, step: int) -> None:
        self.now += step

    @rule()
    def begin_the_next_minute(self) -> None:
        self.now += PERIOD - self.now % PERIOD

    @rule(step=STEPS)
    def put_the_clock_back(self, step: int) -> None:
        self.now -= step * self.steps_back

    @invariant()
    def used_is_right(self) -> None:
        if not hasattr(self, "calls"):
            return
        for key, ledger in self.ledgers.items():
            used = self.budget.peek(key).used
            can_forget = not any(call.open and call.key == key for call in self.calls)
            assert ledger.agrees(self.now, used, can_forget=can_forget), (key, used, vars(ledger))

    @invariant()
    def no_hold_outlives_its_call(self) -> None:
        if hasattr(self, "calls"):
            assert open_holds(self.budget, *ESTIMATES) == sum(call.open for call in self.calls)

    def teardown(self) -> None:
        if not hasattr(self, "calls"):
            return
        try:
            while self.calls:
                self.drop(0)
            gc.collect(0)
            self.used_is_right()
            assert open_holds(self.budget, *ESTIMATES) == 0
        finally:
            self.clock.stop()


class CalendarInterleavings(Interleavings):
    limit = CalendarWindow(f"{LIMIT}/minute")
    make_ledger = Minutes


class SlidingInterleavings(Interleavings):
    limit = SlidingWindow(f"{LIMIT}/minute")
    make_ledger = LastMinute
    unreserved_with_steps_back = False  # a call that takes nothing: see `hold`


class BucketInterleavings(Interleavings):
    limit = TokenBucket(f"{LIMIT}/minute", burst=BURST)
    make_ledger = Bounds
    nests = False


TestCalendarWindow = CalendarInterleavings.TestCase
TestSlidingWindow = SlidingInterleavings.TestCase
TestTokenBucket = BucketInterleavings.TestCase
TestCalendarWindow.settings = settings(deadline=None, max_examples=80, stateful_step_count=40)
TestSlidingWindow.settings = TestCalendarWindow.settings
TestTokenBucket.settings = settings(TestCalendarWindow.settings, max_examples=100)
