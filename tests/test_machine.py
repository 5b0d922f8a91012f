"""A machine that drives decorated functions in random ways, against a model that only adds.

The model keeps every charge in a list and knows one rule of each kind of limit: what is in a window counts, and what
a bucket lacks refills. Calls that wait stand in another list, in order of arrival. It is asked at each call whether it
is admitted, refused or waits, and for how long, and after each step what is in use, on every store (rules 1, 2, 4, 6,
7, 9, 11, 13 and 14), also where the clock steps back (rule 19).
"""

from __future__ import annotations

import asyncio
import tempfile
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil, inf
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quotalimit import (
    CalendarWindow,
    Decision,
    LimitExceeded,
    RateLimiter,
    SlidingWindow,
    TokenBucket,
    TokenBudget,
    rate_limited,
    token_budget,
)
from quotalimit._waiting import FOREVER, Lines
from quotalimit.algorithms import Algorithm
from quotalimit.stores.memory_counts import MemoryCounts
from quotalimit.stores.rows import Rows

from .callers import Caller, Callers, ThreadCaller
from .conftest import STORES, Place

SECOND = 1_000_000
DAY = 86_400 * SECOND
NOON = 1_795_435_200 * SECOND
KEYS = ("alice", 7, ("acme", "bob"))
MOST = 4
"""The calls that wait at once."""


@dataclass(eq=False)
class Charge:
    """Units charged at a time. A part of one can only come back to a bucket."""

    time: int
    units: int | Fraction


class Model:
    """The model of a limit: the charges of each key, the oldest first."""

    def __init__(self, amount: int, period: int) -> None:
        self.amount = amount
        self.period = period
        self.charges: dict[Any, list[Charge]] = {key: [] for key in KEYS}

    def used(self, key: Any, now: int) -> int:
        raise NotImplementedError

    def has_room(self, key: Any, need: int, now: int) -> bool:
        return bool(self.used(key, now) + need <= self.amount)

    def room_at(self, key: Any, need: int, now: int) -> int | None:
        """When so many units fit at the earliest if nobody else calls; None for never."""
        raise NotImplementedError

    def has_room_after(self, key: Any, units: int, need: int, start: int, now: int) -> bool:
        """Whether what is needed at the start would fit if so many units were charged now."""
        self.charge(key, units, now)
        try:
            return self.has_room(key, need, start)
        finally:
            self.charges[key].pop()

    def is_busy(self, key: Any, need: int, held: list[Charge], now: int) -> bool:
        """Whether what is needed would fit if the calls that hold something came to use nothing."""
        kept = self.charges[key]
        self.charges[key] = [replace(charge) for charge in kept]
        try:
            for charge, its in zip(kept, tuple(self.charges[key]), strict=True):
                if charge in held:
                    self.settle(key, its, 0, now)
            return self.has_room(key, need, now)
        finally:
            self.charges[key] = kept

    def charge(self, key: Any, units: int, now: int) -> Charge:
        charge = Charge(now, units)
        self.charges[key].append(charge)
        return charge

    def settle(self, key: Any, charge: Charge, used: int, now: int) -> None:
        raise NotImplementedError

    def forget(self, key: Any) -> None:
        self.charges[key] = []

    def step_back(self, key: Any, now: int) -> None:
        """The newest charge, if it is of the future, becomes one of now, and all keep their distances (rule 19)."""
        newest = max((charge.time for charge in self.charges[key]), default=now)
        for charge in self.charges[key]:
            charge.time -= max(0, newest - now)


class Window(Model):
    """What was charged since some moment counts."""

    def begin(self, now: int) -> int:
        raise NotImplementedError

    def used(self, key: Any, now: int) -> Any:
        return sum(charge.units for charge in self.charges[key] if charge.time >= self.begin(now))

    def room_at(self, key: Any, need: int, now: int) -> int | None:
        if need > self.amount:
            return None
        ends = [charge.time + self.period for charge in self.charges[key]] + [self.begin(now) + self.period]
        moments = sorted({now, *(end for end in ends if end > now)})
        return next((moment for moment in moments if self.has_room(key, need, moment)), None)

    def settle(self, key: Any, charge: Charge, used: int, now: int) -> None:
        if charge.time >= self.begin(now):  # rule 11: nothing once the window is gone
            charge.units = used


class Sliding(Window):
    """What was charged in the last period counts."""

    def begin(self, now: int) -> int:
        return now - self.period + 1


class Calendar(Window):
    """What was charged in the present minute or hour counts."""

    def begin(self, now: int) -> int:
        return now - now % self.period

    def step_back(self, key: Any, now: int) -> None:
        """The window of the newest charge becomes the present one, and what was before it is gone (rule 19)."""
        newest = self.begin(max((charge.time for charge in self.charges[key]), default=now))
        if newest > now:
            self.charges[key] = [charge for charge in self.charges[key] if charge.time >= newest]
            for charge in self.charges[key]:
                charge.time = now


class Bucket(Model):
    """A bucket as large as the amount: charges empty it, time refills the amount in a period, evenly."""

    def missing(self, key: Any, now: int) -> Fraction:
        """What the bucket lacks: all that was ever charged, one after the other, less what refilled in between."""
        missing, time = Fraction(0), 0
        for charge in self.charges[key]:
            left = max(Fraction(0), missing - self.refilled(charge.time - time))
            missing, time = max(Fraction(0), left + charge.units), charge.time
        return max(Fraction(0), missing - self.refilled(now - time))

    def refilled(self, elapsed: int) -> Fraction:
        return Fraction(self.amount * elapsed, self.period)

    def used(self, key: Any, now: int) -> int:
        return ceil(self.missing(key, now))

    def has_room(self, key: Any, need: int, now: int) -> bool:
        return self.missing(key, now) + need <= self.amount

    def room_at(self, key: Any, need: int, now: int) -> int | None:
        if need > self.amount:
            return None
        over = self.missing(key, now) + need - self.amount
        return now + max(0, ceil(over * self.period / self.amount))

    def settle(self, key: Any, charge: Charge, used: int, now: int) -> None:
        """More is charged now; what was not used comes back, less what has refilled since (rule 14)."""
        change: int | Fraction = used - charge.units
        if change < 0:
            change = min(Fraction(0), change + self.refilled(now - charge.time))
        if used != charge.units:
            self.charges[key].append(Charge(now, change))


def limit_of(amount: int, seconds: int, kind: type[Model]) -> tuple[Algorithm, Model]:
    """A limit and its model."""
    if kind is Calendar:
        unit, seconds = ("hour", 3_600) if seconds == 3_600 else ("minute", 60)
        return CalendarWindow(f"{amount}/{unit}"), Calendar(amount, seconds * SECOND)
    algorithm = SlidingWindow if kind is Sliding else TokenBucket
    return algorithm(f"{amount}/{seconds} seconds"), kind(amount, seconds * SECOND)


class Ended(Exception):
    """What fails in a call, after which nothing was billed."""


class Need(NamedTuple):
    """What a call needs of a limit, for a key, and the microseconds for which it may be delayed for that."""

    name: str
    key: Any
    units: int
    patience: int

    @property
    def place(self) -> tuple[str, Any]:
        """Where the call stands in line."""
        return self.name, self.key


class Refusal(NamedTuple):
    """Why a call cannot start: how long until it could if nobody else came; None for never."""

    wait: int | None
    busy: bool = False


@dataclass(eq=False)
class Call:
    """A call that was begun, and the model of its waiting."""

    caller: Caller
    needs: list[Need]
    used: int | None = None
    ending: str = "return"
    asked: int = 0
    """When the store was asked last, by the clock, and what has passed since."""
    fell_asleep: int = 0
    """When it did, by the clock."""
    not_before: int = 0
    """A time known to have come though the clock stands still."""
    due: int = 0
    """When it is going to start, by the clock."""
    waited: int = 0
    deadlines: dict[Need, int] = field(default_factory=dict)
    """How long it may have waited, for each limit that has refused it."""
    gives_up: int = 0
    nap: int = 0
    wakes: int = 0
    """When its nap is over, by the time of the callers."""
    is_rung: bool = False


class Machine(RuleBasedStateMachine):
    """Functions with two or three layers on one store, called in random ways, in threads and in tasks.

    A call that waits stays asleep while others come, streams end, keys are reset, the clock steps back and time passes;
    then those that are awake go on, the one that came first before all others.
    """

    store_name: ClassVar[str]
    two_keys: ClassVar[bool]
    """Whether a call may have two keys and yet be decided in one go."""

    def __init__(self) -> None:
        super().__init__()
        self._exit = ExitStack()
        directory = Path(self._exit.enter_context(tempfile.TemporaryDirectory()))
        make: Callable[[Path], AbstractContextManager[Place]] = STORES[self.store_name]
        self.store = self._exit.enter_context(make(directory)).make()
        self.store.lines = self.lines = Lines()
        self.now = NOON
        self._exit.enter_context(patch("quotalimit.clock.now", lambda: self.now))
        self.callers = self._exit.enter_context(Callers().waiting())
        self.streams: list[tuple[Any, list[tuple[str, Any, Charge]]]] = []
        self.waiting: list[Call] = []
        self.models: dict[str, tuple[Any, Model]] = {}

    def teardown(self) -> None:
        try:
            while self.waiting:
                self.interrupt_a_call_that_waits(0)
            while self.streams:
                self.close_a_stream(0, 1)
            self.what_is_in_use_is_what_was_charged()
        finally:
            self._exit.close()

    @initialize(
        calls=st.tuples(st.integers(1, 6), st.sampled_from([10, 60]), st.sampled_from([Sliding, Calendar, Bucket])),
        tokens=st.tuples(st.integers(5, 40), st.sampled_from([60, 3_600]), st.sampled_from([Calendar, Bucket])),
        more=st.booleans(),
        reserve=st.integers(0, 12),
        patience=st.sampled_from([(0, 0, 0), (5, 5, 5), (100, 100, 100), (inf, inf, inf), (0, 5, inf), (100, inf, 5)]),
        steps_back=st.booleans(),
    )
    def decorate(
        self,
        calls: tuple[int, int, type[Model]],
        tokens: tuple[int, int, type[Model]],
        more: bool,
        reserve: int,
        patience: tuple[float, float, float],
        steps_back: bool,
    ) -> None:
        rate, rate_model = limit_of(*calls)
        budget, budget_model = limit_of(*tokens)
        self.rate = RateLimiter(rate, name="calls", store=self.store)
        self.budget = TokenBudget(budget, name="tokens", store=self.store)
        self.models |= {"calls": (self.rate, rate_model), "tokens": (self.budget, budget_model)}
        self.reserve, self.steps_back = reserve, steps_back
        self.patience = [FOREVER if wait == inf else int(wait) * SECOND for wait in patience]
        if steps_back:  # no state is dropped: one that is idle would come to matter again
            self._exit.enter_context(patch.object(MemoryCounts, "sweep"))
            self._exit.enter_context(patch.object(Rows, "sweep"))
        layers = [
            rate_limited(self.rate, key="key", cost=lambda cost: cost, wait=patience[0]),
            token_budget(
                self.budget, key="payer", reserve=lambda: self.reserve, usage=lambda used: used, wait=patience[1]
            ),
        ]
        if more:
            third = RateLimiter("4/20 seconds", name="third", store=self.store)
            self.models["third"] = (third, Sliding(4, 20 * SECOND))
            layers.append(rate_limited(third, key="key", wait=patience[2], refund_on=Ended))

        def decorated(function: Any) -> Any:
            for layer in layers:
                function = layer(function)
            return function

        def ask(key: Any, payer: Any, cost: int, used: int | None, ending: str) -> int | None:
            if ending == "raise":
                raise Ended
            if ending == "interrupt":
                raise KeyboardInterrupt
            return used

        async def ask_async(key: Any, payer: Any, cost: int, used: int | None, ending: str) -> int | None:
            await asyncio.sleep(0)
            if ending == "interrupt":
                raise asyncio.CancelledError
            return ask(key, payer, cost, used, ending)

        def stream(key: Any, payer: Any, cost: int) -> Iterator[int]:
            yield 1
            yield 2

        self.ask, self.ask_async, self.stream = decorated(ask), decorated(ask_async), decorated(stream)

    # What the model says

    def _line(self, place: tuple[str, Any]) -> list[tuple[Call, Need]]:
        """The calls that wait at a place, in order of arrival."""
        return [(call, need) for call in self.waiting for need in call.needs if need.place == place]

    def _is_first(self, call: Call) -> bool:
        return all(self._line(need.place)[0][0] is call for need in call.needs)

    def _ring(self, *places: tuple[str, Any]) -> None:
        """There may be room: the heads of lines ask."""
        for place in places:
            for head, _ in self._line(place)[:1]:
                head.is_rung = True

    def _refusal(self, need: Need, call: Call | None, now: int) -> Refusal | None:
        """Why a limit refuses what is needed now; None if it does not."""
        model = self.models[need.name][1]
        room = model.room_at(need.key, need.units, now)
        if room is None:
            return Refusal(None)
        line = self._line(need.place)
        if line and line[0][0] is call:
            line = []
        ahead = sum(its.units for other, its in line if other is not call)
        in_turn = model.room_at(need.key, min(need.units + ahead, model.amount), now)
        assert in_turn is not None
        if room > now:
            held = [charge for _, charges in self.streams for *place, charge in charges if (*place,) == need.place]
            busy = need.name != "calls" and model.is_busy(need.key, need.units, held, now)
            return Refusal(max(room, in_turn) - now, busy)
        if line:  # a newcomer goes first only if the head could still start when it was going to
            head, its = line[0]
            start = max(now, head.due)
            if not model.has_room_after(need.key, need.units, its.units, start, now):
                return Refusal(max(in_turn, start, now + 1) - now)
        return None

    def _refusals(self, call: Call, now: int) -> dict[Need, Refusal]:
        refusals = {need: self._refusal(need, call, now) for need in call.needs}
        return {need: refusal for need, refusal in refusals.items() if refusal is not None}

    def _is_worth_waiting(self, call: Call, refusals: dict[Need, Refusal]) -> bool:
        """Whether a call that was refused may yet start before a limit that refuses it has delayed it too long."""
        for need, (wait, busy) in refusals.items():
            deadline = call.deadlines.setdefault(need, call.waited + need.patience)
            if wait is None or deadline <= call.waited or (call.waited + wait > deadline and not busy):
                return False
        call.gives_up = min(call.deadlines[need] for need in refusals)
        return True

    # What calls do

    def _begin(self, caller: Caller, needs: list[Need], used: int | None = None, ending: str = "return") -> None:
        """Compare what a call that has just begun does with what the model says."""
        call = Call(caller, needs, used, ending)
        self._ask(call)
        self._let_all_go_on()

    def _ask(self, call: Call) -> None:
        """The store is asked for a call, which starts, sleeps or is refused."""
        call.asked = max(self.now, call.not_before)
        refusals = self._refusals(call, call.asked)
        if not refusals:
            assert call.caller.is_over, "the model admits it"
            self._leave(call)
            self._start(call)
        elif self._is_worth_waiting(call, refusals):
            assert not call.caller.is_over, "the model lets it wait"
            is_new = call not in self.waiting
            if is_new:
                self.waiting.append(call)
            if is_new or self._is_first(call):
                call.due = call.asked + max(wait for wait, _ in refusals.values() if wait is not None)
            self._sleep(call)
        else:
            assert call.caller.is_over, "the model refuses it"
            self._leave(call)
            self._is_refused(call, refusals)

    def _sleep(self, call: Call) -> None:
        nap = call.gives_up - call.waited
        if self._is_first(call):
            nap = min(nap, call.due - call.asked)
        call.nap = min(nap, DAY)
        assert round((call.caller.nap or 0) * SECOND) == call.nap, "it sleeps no longer than it must"
        call.fell_asleep, call.wakes = self.now, self.callers.now + call.nap

    def _start(self, call: Call) -> None:
        """A call has started: its charges are of now, and settled if it has ended, too."""
        charges = []
        for name, key, units, _ in call.needs:
            if units or name == "tokens":
                charges.append((name, key, self.models[name][1].charge(key, units, call.asked)))
        self._date_back()
        if isinstance(call.caller.outcome, Iterator):
            self.streams.append((call.caller.outcome, charges))
        elif not isinstance(call.caller.outcome, Decision):
            expected = {"return": type(call.used), "raise": Ended, "interrupt": (KeyboardInterrupt, CancelledError)}
            assert isinstance(call.caller.outcome, expected[call.ending]), "the model admits it"
            self._settle(charges, call.used, call.ending)
        if call.asked > self.now:
            self._look_at_all()

    def _is_refused(self, call: Call, refusals: dict[Need, Refusal]) -> None:
        """A call is refused by the limit that takes longest to clear (rule 4)."""
        error = call.caller.outcome
        assert isinstance(error, LimitExceeded), "the model refuses it"
        need = next(need for need in call.needs if need.name == error.name)
        wait, busy = refusals[need]
        assert error.key == need.key
        if wait is None:
            assert (error.reason, error.retry_after) == ("too_large", None)
        else:
            assert all(other.wait is not None and other.wait <= wait for other in refusals.values())
            assert (error.reason, error.retry_after) == ("busy" if busy else "exhausted", wait / SECOND)

    def _leave(self, call: Call) -> None:
        if call in self.waiting:
            self.waiting.remove(call)
            self._ring(*(need.place for need in call.needs))

    def _settle(self, charges: list[tuple[str, Any, Charge]], used: int | None, ending: str) -> None:
        for name, key, charge in charges:
            model = self.models[name][1]
            if name == "calls" or charge not in model.charges[key]:  # nothing is held, or it was reset
                continue
            if ending == "raise":
                model.settle(key, charge, 0, self.now)
                self._ring((name, key))
            elif ending == "return" and name == "tokens" and used is not None:
                model.settle(key, charge, used, self.now)
                self._ring((name, key))

    def _let_all_go_on(self) -> None:
        """Let the calls that are awake go on, the one that came first before all others, until all sleep."""
        while True:
            self.callers.let_tasks_run()
            for call in self.waiting:
                assert call.caller.is_awake or not (call.is_rung or call.wakes <= self.callers.now), "it is not woken"
            awake = next((call for call in self.waiting if call.caller.is_awake), None)
            if awake is None:
                return
            self._go_on(awake)

    def _go_on(self, call: Call) -> None:
        """A call that slept asks again if it is first or out of patience. Time slept has passed, whatever the clock."""
        call.is_rung = False
        call.caller.go_on()
        passed = self.now - call.fell_asleep
        if passed < 0:
            call.not_before = 0
        elif passed == 0 and not call.caller.rang:
            call.not_before = call.asked + call.nap
        if passed < call.nap and not call.caller.rang:
            passed = call.nap
        call.waited += max(passed, 0)
        call.asked += max(passed, 0)
        if self._is_first(call) or call.waited >= call.gives_up:
            self._ask(call)
        else:
            self._sleep(call)

    # What happens

    keys = st.sampled_from(("alice", "alice", *KEYS))
    costs = st.integers(0, 4)
    uses = st.none() | st.integers(0, 15)
    times = st.sampled_from([0.000001, 0.5, 3, 9.999999, 10, 60, 3_600])

    def _needs(self, key: Any, payer: Any, cost: int) -> list[Need]:
        needs = [Need("calls", key, cost, self.patience[0]), Need("tokens", payer, self.reserve, self.patience[1])]
        return [*needs, Need("third", key, 1, self.patience[2])] if "third" in self.models else needs

    @precondition(lambda self: len(self.waiting) < MOST)
    @rule(
        key=keys,
        payer=keys,
        cost=costs,
        used=uses,
        ending=st.sampled_from(["return", "return", "raise", "interrupt"]),
        in_a_task=st.booleans(),
    )
    def call(self, key: Any, payer: Any, cost: int, used: int | None, ending: str, in_a_task: bool) -> None:
        payer = payer if self.two_keys else key
        caller = self.callers.call(self.ask, self.ask_async, in_a_task, key, payer, cost, used, ending)
        self._begin(caller, self._needs(key, payer, cost), used, ending)

    @precondition(lambda self: len(self.waiting) < MOST)
    @rule(
        name=st.sampled_from(["calls", "tokens"]),
        key=keys,
        units=st.integers(1, 6),
        wait=st.sampled_from([0, 0, 5, 100]),
        in_a_task=st.booleans(),
    )
    def ask_one_limit(self, name: str, key: Any, units: int, wait: int, in_a_task: bool) -> None:
        """A call that stands in one line only, or that is a newcomer who never waits."""
        now, later = (self.rate.acquire, self.rate.acquire_async)
        if name == "tokens":
            now, later = (self.budget.charge, self.budget.charge_async)
        caller = self.callers.call(now, later, in_a_task, key, units, wait=wait)
        self._begin(caller, [Need(name, key, units, wait * SECOND)])

    @precondition(lambda self: len(self.streams) < 3 and len(self.waiting) < MOST)
    @rule(key=keys, payer=keys, cost=costs)
    def begin_a_stream(self, key: Any, payer: Any, cost: int) -> None:
        payer = payer if self.two_keys else key
        caller = ThreadCaller(self.callers, lambda: self.stream(key, payer, cost))
        self._begin(caller, self._needs(key, payer, cost))

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, 2), read=st.integers(0, 3))
    def close_a_stream(self, which: int, read: int) -> None:
        """Read some of a stream and leave it: what it told is charged, nothing if nobody began."""
        stream, charges = self.streams.pop(which % len(self.streams))
        items = [item for _, item in zip(range(read), stream, strict=False)]
        stream.close()
        self._settle(charges, sum(items), "return")
        self._let_all_go_on()

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, MOST))
    def interrupt_a_call_that_waits(self, which: int) -> None:
        call = self.waiting[which % len(self.waiting)]
        call.caller.interrupt()
        assert isinstance(call.caller.outcome, (KeyboardInterrupt, CancelledError))
        self._leave(call)
        self._let_all_go_on()

    @rule(key=keys, name=st.sampled_from(["calls", "tokens", "third"]))
    def reset(self, key: Any, name: str) -> None:
        if name in self.models:
            limiter, model = self.models[name]
            limiter.reset(key)
            model.forget(key)
            self._ring((name, key))
            self._let_all_go_on()

    @rule(seconds=times)
    def let_time_pass(self, seconds: float) -> None:
        self._pass(round(seconds * SECOND))

    @precondition(lambda self: self.steps_back and self.waiting)
    @rule(seconds=times)
    def let_calls_sleep_while_the_clock_stands_still(self, seconds: float) -> None:
        self._pass(round(seconds * SECOND), moves=False)

    def _pass(self, time: int, *, moves: bool = True) -> None:
        """Let time pass, and each call that waits go on when its nap is over."""
        end = self.callers.now + time
        while self.callers.now < end:
            passed = min([end, *(call.wakes for call in self.waiting)]) - self.callers.now
            self.callers.now += passed
            self.now += passed if moves else 0
            self._let_all_go_on()

    @precondition(lambda self: self.steps_back)
    @rule(seconds=st.sampled_from([0.000001, 0.5, 3, 9.999999, 59, 61, 3_600, 90_000]))
    def step_the_clock_back(self, seconds: float) -> None:
        self.now -= round(seconds * SECOND)
        self._date_back()
        self._look_at_all()

    def _date_back(self) -> None:
        for _, model in self.models.values():
            for key in KEYS:
                model.step_back(key, self.now)

    def _look_at_all(self) -> None:
        """All of a limit is free again within one period all the same (rule 19), but for the debt of a bucket."""
        for limiter, model in self.models.values():
            for key in KEYS:
                back = limiter.peek(key).reset_us - self.now
                assert back <= model.period or model.used(key, self.now) > model.amount, (limiter, key)

    @invariant()
    def what_is_in_use_is_what_was_charged(self) -> None:
        for limiter, model in self.models.values():
            for key in KEYS:
                assert limiter.peek(key).used == model.used(key, self.now), (limiter, key)
        if not self.streams:  # nothing else holds anything between two steps, and calls that wait hold nothing
            assert not any(place.open for limiter, _ in self.models.values() for place, _ in limiter.bound().places)

    @invariant()
    def those_who_wait_stand_in_line(self) -> None:
        places = {need.place for call in self.waiting for need in call.needs}
        lines = [[need.units for _, need in self._line(place)] for place in places]
        standing = [(len(line.waiters), line.need) for line in self.lines.standing.values()]
        assert sorted(standing) == sorted((len(needs), sum(needs)) for needs in lines)


def machine_class(name: str) -> type[Machine]:
    attributes = {"store_name": name, "two_keys": name != "valkey_cluster"}
    return type(f"MachineOn{name.title()}", (Machine,), attributes)


def machine_on(name: str) -> Any:
    """The machine as a test case, on one store."""
    case: Any = machine_class(name).TestCase
    case.settings = settings(deadline=None, max_examples=60 if name == "memory" else 15, stateful_step_count=30)
    return case


globals().update({f"TestMachineOn{name.title()}": machine_on(name) for name in STORES})


# Cases that it found


@pytest.fixture(params=STORES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = machine_class(request.param)()
    yield machine
    machine.teardown()


def test_rule_6_a_clock_that_steps_back_gives_nobody_more_patience(machine: Machine) -> None:
    """The second call that waits is first once the other has left, and asks by the new time."""
    machine.decorate((1, 10, Sliding), (5, 60, Calendar), False, 3, (5, 5, 5), True)
    machine.let_time_pass(10)
    for _ in range(3):
        machine.begin_a_stream("alice", "alice", 0)
    machine.step_the_clock_back(3)
    machine.interrupt_a_call_that_waits(0)
    machine.let_time_pass(9.999999)
    assert not machine.waiting


def test_rule_21_what_has_been_settled_is_held_no_more_when_the_next_call_is_asked(machine: Machine) -> None:
    """The head is woken by a settlement that leaves too little: its limit is exhausted, and not busy."""
    machine.decorate((1, 10, Sliding), (10, 60, Calendar), False, 4, (5, 5, 5), False)
    machine.ask_one_limit("tokens", "alice", 6, 0, False)
    machine.begin_a_stream("alice", "alice", 0)
    machine.begin_a_stream("alice", "alice", 0)
    assert machine.waiting
    machine.close_a_stream(0, 1)
    assert not machine.waiting


def test_rule_14_what_has_refilled_since_a_clock_stepped_back_is_not_given_back_twice(machine: Machine) -> None:
    machine.decorate((1, 10, Sliding), (40, 60, Bucket), False, 12, (0, 0, 0), True)
    machine.begin_a_stream("alice", "alice", 0)
    machine.ask_one_limit("tokens", "alice", 20, 0, False)
    machine.step_the_clock_back(59)
    machine.let_time_pass(3)
    machine.close_a_stream(0, 1)
    machine.what_is_in_use_is_what_was_charged()
