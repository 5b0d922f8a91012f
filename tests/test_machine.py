"""A machine that drives decorated functions in random ways, against a model that only adds.

The model keeps every charge in a list and knows one rule of each kind of limit: what is in a window counts, and what
a bucket lacks refills. It is asked before each call whether it will be admitted, and after each step what is in use, on
every store (rules 1, 2, 6, 7, 9, 11, 13 and 14), also where the clock steps back (rule 19).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, ClassVar
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quotalimit import (
    CalendarWindow,
    LimitExceeded,
    RateLimiter,
    SlidingWindow,
    TokenBucket,
    TokenBudget,
    rate_limited,
    token_budget,
)
from quotalimit._waiting import ThreadBell
from quotalimit.algorithms import Algorithm
from quotalimit.stores.memory_counts import MemoryCounts
from quotalimit.stores.rows import Rows

from .conftest import STORES, Place

SECOND = 1_000_000
NOON = 1_795_435_200 * SECOND
KEYS = ("alice", 7, ("acme", "bob"))


@dataclass
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

    def room_at(self, key: Any, need: int, now: int) -> int | None:
        """When so many units fit at the earliest if nobody else calls; None for never."""
        raise NotImplementedError

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
        return next(moment for moment in moments if self.used(key, moment) + need <= self.amount)

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


class Machine(RuleBasedStateMachine):
    """Functions with one to three layers on one store, called in random ways."""

    store_name: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self._exit = ExitStack()
        directory = Path(self._exit.enter_context(tempfile.TemporaryDirectory()))
        make: Callable[[Path], AbstractContextManager[Place]] = STORES[self.store_name]
        self.store = self._exit.enter_context(make(directory)).make()
        self.now = NOON
        self._exit.enter_context(patch("quotalimit.clock.now", lambda: self.now))
        really_wait = ThreadBell.wait

        def wait(bell: ThreadBell, seconds: float) -> bool:  # other threads are those of stores, which write
            return self._sleep(seconds) if current_thread() is main_thread() else really_wait(bell, seconds)

        self._exit.enter_context(patch.object(ThreadBell, "wait", wait))
        self.streams: list[tuple[Any, Any, list[tuple[Model, Charge]]]] = []
        self.models: list[tuple[Any, Model]] = []

    def _sleep(self, seconds: float) -> bool:
        self.now += round(seconds * SECOND)
        return False

    def teardown(self) -> None:
        while self.streams:
            self.close_a_stream(0)
        self.what_is_in_use_is_what_was_charged()
        self._exit.close()

    @initialize(
        calls=st.tuples(st.integers(1, 6), st.sampled_from([10, 60]), st.sampled_from([Sliding, Calendar, Bucket])),
        tokens=st.tuples(st.integers(5, 40), st.sampled_from([60, 3_600]), st.sampled_from([Calendar, Bucket])),
        more=st.booleans(),
        reserve=st.integers(0, 12),
        wait=st.sampled_from([0, 5, 100]),
        steps_back=st.booleans(),
    )
    def decorate(
        self,
        calls: tuple[int, int, type[Model]],
        tokens: tuple[int, int, type[Model]],
        more: bool,
        reserve: int,
        wait: int,
        steps_back: bool,
    ) -> None:
        rate, self.rate_model = limit_of(*calls)
        budget, self.budget_model = limit_of(*tokens)
        self.rate = RateLimiter(rate, name="calls", store=self.store)
        self.budget = TokenBudget(budget, name="tokens", store=self.store)
        self.models += [(self.rate, self.rate_model), (self.budget, self.budget_model)]
        self.reserve, self.wait, self.steps_back = reserve, wait, steps_back
        if steps_back:  # no state is dropped: one that is idle would come to matter again
            self._exit.enter_context(patch.object(MemoryCounts, "sweep"))
            self._exit.enter_context(patch.object(Rows, "sweep"))
        layers = [
            rate_limited(self.rate, key="key", cost=lambda cost: cost, wait=wait),
            token_budget(self.budget, key="key", reserve=lambda: self.reserve, usage=lambda used: used, wait=wait),
        ]
        self.third: Model | None = None
        if more:
            third = RateLimiter("4/20 seconds", name="third", store=self.store)
            self.third = Sliding(4, 20 * SECOND)
            self.models.append((third, self.third))
            layers.append(rate_limited(third, key="key", wait=wait, refund_on=Ended))

        def decorated(function: Any) -> Any:
            for layer in layers:
                function = layer(function)
            return function

        def ask(key: Any, cost: int, used: int | None, ending: str) -> int | None:
            if ending == "raise":
                raise Ended
            if ending == "interrupt":
                raise KeyboardInterrupt
            return used

        async def ask_async(key: Any, cost: int, used: int | None, ending: str) -> int | None:
            await asyncio.sleep(0)
            if ending == "cancel":
                raise asyncio.CancelledError
            return ask(key, cost, used, ending)

        def stream(key: Any, cost: int, used: int | None, ending: str) -> Iterator[int]:
            yield 1
            yield 2

        self.ask, self.ask_async, self.stream = decorated(ask), decorated(ask_async), decorated(stream)

    def _needs(self, cost: int) -> list[tuple[Model, int]]:
        needs = [(self.rate_model, cost), (self.budget_model, self.reserve)]
        return [*needs, (self.third, 1)] if self.third is not None else needs

    def _call(self, key: Any, cost: int, call: Callable[[], Any], *, waits: bool) -> list[tuple[Model, Charge]] | None:
        """Make a call, which must be admitted just when the model says; its charges if it was."""
        before = self.now
        rooms = [model.room_at(key, need, before) for model, need in self._needs(cost)]
        fits = all(room == before for room in rooms)
        refusal: LimitExceeded | None = None
        try:
            call()
        except LimitExceeded as error:
            refusal = error
        except (Ended, KeyboardInterrupt, asyncio.CancelledError):
            pass
        if refusal is not None:
            assert not fits, "the model admits it"
            assert refusal.key == key
            assert (refusal.reason == "too_large") == (None in rooms)
            if None not in rooms and self.now == before:
                assert refusal.retry_after == (max(room for room in rooms if room is not None) - before) / SECOND
            return None
        if not fits:
            assert waits, "the model refuses it"
            assert None not in rooms
            assert self.now == max(room for room in rooms if room is not None), "it waits no longer than it must"
            assert self.now - before <= self.wait * SECOND
        taken = [(model, need) for model, need in self._needs(cost) if need or model is self.budget_model]
        return [(model, model.charge(key, need, self.now)) for model, need in taken]

    def _settle(self, key: Any, charges: list[tuple[Model, Charge]], used: int | None, ending: str) -> None:
        for model, charge in charges:
            if ending == "raise" and model is not self.rate_model:
                model.settle(key, charge, 0, self.now)
            elif ending == "return" and model is self.budget_model and used is not None:
                model.settle(key, charge, used, self.now)

    costs = st.integers(0, 4)
    uses = st.none() | st.integers(0, 15)

    @rule(
        key=st.sampled_from(KEYS),
        cost=costs,
        used=uses,
        ending=st.sampled_from(["return", "return", "raise", "interrupt"]),
    )
    def call(self, key: Any, cost: int, used: int | None, ending: str) -> None:
        charges = self._call(key, cost, lambda: self.ask(key, cost, used, ending), waits=True)
        if charges is not None:
            self._settle(key, charges, used, ending)

    @precondition(lambda self: self.wait == 0)
    @rule(key=st.sampled_from(KEYS), cost=costs, used=uses, ending=st.sampled_from(["return", "raise", "cancel"]))
    def call_in_a_task(self, key: Any, cost: int, used: int | None, ending: str) -> None:
        call = lambda: asyncio.run(self.ask_async(key, cost, used, ending))  # noqa: E731
        charges = self._call(key, cost, call, waits=False)
        if charges is not None:
            self._settle(key, charges, used, ending)

    @precondition(lambda self: len(self.streams) < 3)
    @rule(key=st.sampled_from(KEYS), cost=costs)
    def begin_a_stream(self, key: Any, cost: int) -> None:
        made: list[Any] = []
        charges = self._call(key, cost, lambda: made.append(self.stream(key, cost, None, "")), waits=True)
        if charges is not None:
            self.streams.append((key, made[0], charges))

    @precondition(lambda self: self.streams)
    @rule(read=st.integers(0, 3))
    def close_a_stream(self, read: int) -> None:
        """Read some of a stream and leave it: what it told is charged, nothing if nobody began."""
        key, stream, charges = self.streams.pop(0)
        items = [item for _, item in zip(range(read), stream, strict=False)]
        stream.close()
        self._settle(key, charges, sum(items), "return")

    @rule(seconds=st.sampled_from([0.000001, 0.5, 3, 9.999999, 10, 60, 3_600]))
    def let_time_pass(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)

    @precondition(lambda self: self.steps_back)
    @rule(seconds=st.sampled_from([0.000001, 0.5, 9.999999, 59, 61, 3_600, 90_000]))
    def step_the_clock_back(self, seconds: float) -> None:
        """All of a limit is free again within one period all the same (rule 19), but for the debt of a bucket."""
        self.now -= round(seconds * SECOND)
        for limiter, model in self.models:
            for key in KEYS:
                model.step_back(key, self.now)
                back = limiter.peek(key).reset_us - self.now
                assert back <= model.period or model.used(key, self.now) > model.amount, (limiter, key)

    @precondition(lambda self: not self.streams)
    @rule(key=st.sampled_from(KEYS), place=st.integers(0, 2))
    def reset(self, key: Any, place: int) -> None:
        limiter, model = self.models[place % len(self.models)]
        limiter.reset(key)
        model.forget(key)

    @invariant()
    def what_is_in_use_is_what_was_charged(self) -> None:
        for limiter, model in self.models:
            for key in KEYS:
                assert limiter.peek(key).used == model.used(key, self.now), (limiter, key)
        if not self.streams:  # nothing else holds anything between two steps
            assert not any(place.open for limiter, _ in self.models for place, _ in limiter.bound().places)


def machine_on(name: str) -> Any:
    """The machine as a test case, on one store."""
    case = type(f"MachineOn{name.title()}", (Machine,), {"store_name": name}).TestCase
    case.settings = settings(deadline=None, max_examples=60 if name == "memory" else 15, stateful_step_count=30)
    return case


globals().update({f"TestMachineOn{name.title()}": machine_on(name) for name in STORES})
