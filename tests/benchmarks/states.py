"""The states in which limits are measured: a full window that slides, and a window that fills."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, repeat
from timeit import repeat as time_repeatedly
from typing import Any

from quotalimit import limiters_of

PERIOD = 3_600
"""Seconds of the windows that are measured: an hour, in which nothing expires by the real clock."""

_GRAIN = 2**-16
"""Steps of a moved clock are a multiple of this many seconds, which floats of the present time add up exactly."""


class Pace:
    """A clock that moves on at each call by one N-th of a period, so that each call is admitted as the oldest expires.

    It stands in for `time.time`, which quotalimit looks up at each call: each reading is a step. So a call that reads
    the clock twice makes steps of half the size.
    """

    def __init__(self, call: Callable[[], object], amount: int) -> None:
        start, trials = int(time.time()), min(amount, 64)
        self._ticks: Callable[[], float] = count(start).__next__
        with self.running():
            for _ in range(trials):
                call()
        self.reads = (int(self._ticks()) - start) // trials
        """How often a call reads the clock."""
        if self.reads == 0:
            raise RuntimeError("a call did not look up time.time: it cannot be measured by a clock that moves")
        step = (PERIOD / amount / self.reads // _GRAIN + 1) * _GRAIN
        self._ticks = count(start + 2 * trials * self.reads + PERIOD, step).__next__
        with self.running():
            for _ in range(amount + amount // 8):
                call()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Put this clock in the place of the real one."""
        real, time.time = time.time, self._ticks
        try:
            yield
        finally:
            time.time = real

    def saved_ns(self) -> float:
        """By how many nanoseconds a call's readings of this clock are cheaper than those of the real one."""

        def price(clock: Callable[[], object]) -> float:
            return min(time_repeatedly("clock()", globals={"clock": clock}, number=100_000, repeat=5)) * 1e4

        return self.reads * (price(time.time) - price(count(0.0, _GRAIN).__next__))

    def check_full(self, function: Callable[..., Any], amount: int) -> None:
        """Make sure that what was measured is a window that is full, or as good as."""
        with self.running():
            used = limiters_of(function)[0].peek("alice").used
        # The oldest may go as the clock is read for this; and in each window, sweeps read it a few times more.
        if used < 0.97 * (amount - 1) - 3:
            raise RuntimeError(f"the window was to be full, but only {used} of {amount} are in it")


class HandClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = float(int(time.time()))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Put this clock in the place of the real one."""
        real, time.time = time.time, lambda: self.now
        try:
            yield
        finally:
            time.time = real


def half_full(hit: Callable[[Any], object], amount: int, argument: Callable[[str], Any] = str) -> Iterator[Any]:
    """Keys for calls that are admitted by the real clock: the window of each is half full when it is handed out, and
    it is handed out until the window is full."""
    for number in count():
        for _ in range(amount - amount // 2):
            hit(argument(f"user {number}"))
        if argument is str:
            yield from repeat(f"user {number}", amount // 2)
        else:
            yield from (argument(f"user {number}") for _ in range(amount // 2))
