"""The exact sliding window: in no half-open interval of one period are more than N units admitted."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from itertools import accumulate
from operator import le
from typing import Final

from quotalimit.algorithms.base import NEVER, Algorithm, Mark, State
from quotalimit.rate import Rate

_SLACK: Final = 5
"""In bits, the part of a log that may be out of the window: a thirty-second. What stays is then copied rather than
moved, for an array that is never copied keeps all the room that it ever had."""

_REBASE: Final = 1 << 60
_MOST: Final = (1 << 63) - 1


class SlidingWindow(Algorithm):
    """At most N units in any interval of one period, however placed: `SlidingWindow("20/minute")`.

    A charge counts for exactly one period. The state is a log of the charges: while each is one unit, an array of
    their times (8 bytes a call); from the first other cost on, a `Log`. Its mark is the time of the charge.
    """

    __slots__ = ("_most", "_period")

    kind = "sliding"

    def __init__(self, rate: Rate | str) -> None:
        super().__init__(rate)
        self._period = self._needs_fixed_period()
        self._most = self.capacity + max(8, self.capacity >> _SLACK)
        """How many calls are kept before those out of the window are dropped, some at a time."""

    @property
    def period(self) -> int:
        return self._period

    def fits(self, state: State, need: int, now: int) -> int:
        spare = self.capacity - need  # units that may stay
        if spare < 0:
            return NEVER
        if state is None:
            return 0
        if type(state) is array:
            if len(state) <= spare:
                return 0
            wait: int = state[-1 - spare] + self._period - now
        else:
            wait = state.over(spare) + self._period - now - state.shift
        return wait if wait > 0 else 0

    def take(self, state: State, cost: int, now: int) -> tuple[State, Mark]:
        if state is None or type(state) is array:
            if cost == 1:
                if state is None:
                    return array("q", (now,)), now
                if len(state) > self._most:
                    state = state[min(len(state) - self.capacity, bisect_right(state, now - self._period)) :]
                state.append(now)
                return state, now
            if cost == 0:
                return state, now
        log = Log.of(state)
        mark = now + log.shift
        log.trim(mark - self._period)
        log.add(mark, cost)
        return log, mark

    def admit(self, state: State, now: int) -> State | None:
        if type(state) is not array:
            return super().admit(state, now)
        spare = len(state) - self.capacity
        if spare >= 0:
            if state[spare] > now - self._period:
                return None
            if len(state) > self._most:
                state = state[spare:]
        state.append(now)
        return state

    def adjust(self, state: State, mark: Mark, delta: int, now: int) -> State:
        log = Log.of(state)
        at = now + log.shift
        if delta == 0 or mark <= at - self._period:
            return state
        log.add(min(mark, at), delta)
        return log

    def redate(self, state: State, now: int) -> State:
        if state is None:
            return None
        newest: int = state[-1] if type(state) is array else state.newest - state.shift
        if newest <= now:
            return state
        log = Log.of(state)
        return Log(log.times, log.sums, log.shift + newest - now, log.newest)

    def used(self, state: State, now: int) -> int:
        if state is None:
            return 0
        if type(state) is array:
            horizon = now - self._period
            return len(state) if state[0] > horizon else len(state) - bisect_right(state, horizon)
        return int(state.since(now + state.shift - self._period))

    def whole_at(self, state: State, now: int) -> int:
        if type(state) is array:
            return max(now, int(state[-1]) + self._period)
        if self.used(state, now) == 0:
            return now
        newest: int = state.times[-1] - state.shift
        return newest + self._period

    def matters(self, state: State, now: int) -> bool:
        newest: int = state[-1] if type(state) is array else state.newest - state.shift
        return newest > now - self._period

    def dump(self, state: State) -> bytes:
        if type(state) is array:
            return b"s1:" + _to_bytes(state)
        return b"l1:" + _to_bytes(array("q", (state.shift, state.newest)) + state.times + state.sums)

    def load(self, data: bytes) -> State:
        numbers = _from_bytes(data[3:])
        if data.startswith(b"s1:") and _is_sorted(numbers):
            return numbers
        entries = (len(numbers) - 3) // 2
        times, sums = numbers[2 : 2 + entries], numbers[2 + entries :]
        if data.startswith(b"l1:") and len(sums) == entries + 1 > 0 and _is_sorted(times) and _is_sorted(sums):
            return Log(times, sums, numbers[0], numbers[1])
        raise ValueError(f"not the log of a sliding window: {data[:40]!r}")


class Log:
    """Charges of any cost, oldest first, one entry for each moment at which something was charged.

    `sums[i]` counts the units charged before `times[i]`, and `sums[-1]` all of them, so that any question is one
    binary search; an adjustment costs an addition for each entry after its own, which are the calls in flight.

    Times are on a timeline of the log's own, which never runs back: that of the clock plus `shift`. A clock that
    steps back moves `shift` alone, so that charges keep their distances and marks their meaning.
    """

    __slots__ = ("newest", "shift", "sums", "times")

    def __init__(self, times: array[int], sums: array[int], shift: int, newest: int) -> None:
        self.times = times
        self.sums = sums
        self.shift = shift
        self.newest = newest

    @classmethod
    def of(cls, state: State) -> Log:
        """The state as a log: itself, or made of the times of single units."""
        if isinstance(state, Log):
            return state
        charges: Counter[int] = Counter(state)
        sums = accumulate(charges.values(), initial=0)
        return cls(array("q", charges), array("q", sums), 0, state[-1] if state else 0)

    def over(self, spare: int) -> int:
        """The time of the youngest charge that must leave for no more than `spare` units to stay."""
        bound = self.sums[-1] - spare
        first = bisect_left(self.sums, bound)
        return self.times[first - 1] if first else -NEVER

    def since(self, horizon: int) -> int:
        """Units charged after the horizon."""
        return self.sums[-1] - self.sums[bisect_right(self.times, horizon)]

    def add(self, time: int, delta: int) -> None:
        """Charge `delta` units at a time, or give back up to what was charged then."""
        times, sums = self.times, self.sums
        self.newest = max(self.newest, time)
        if delta > _MOST - sums[-1]:  # a thousand calls that used all that can be told, and more
            delta = _MOST - sums[-1]
        if delta == 0:
            return
        if not times or time > times[-1]:
            if delta > 0:
                try:
                    times.append(time)
                    sums.append(sums[-1] + delta)
                except BaseException:  # an interrupt between the two
                    del times[len(sums) - 1 :]
                    raise
            return
        index = bisect_left(times, time)
        known = times[index] == time
        cost = sums[index + 1] - sums[index] if known else 0
        delta = max(delta, -cost)
        if not known and delta > 0:
            try:
                times.insert(index, time)
                sums.insert(index, sums[index])
            except BaseException:
                if len(times) == len(sums):
                    del times[index]
                raise
        elif cost + delta == 0:
            if known:
                del times[index], sums[index]
            index -= 1
        if delta:
            sums[index + 1 :] = array("q", [units + delta for units in sums[index + 1 :]])

    def trim(self, horizon: int) -> None:
        """Drop what is out of the window once that is a thirty-second part of the log."""
        if self.times and self.times[len(self.times) >> _SLACK] <= horizon:
            gone = bisect_right(self.times, horizon)
            self.times, self.sums = self.times[gone:], self.sums[gone:]
            if self.sums[0] > _REBASE:
                self.sums = array("q", [units - self.sums[0] for units in self.sums])

    def __copy__(self) -> Log:
        return Log(self.times[:], self.sums[:], self.shift, self.newest)


def _to_bytes(numbers: array[int]) -> bytes:
    """Numbers as 8 bytes each, in the order of bytes that most machines have."""
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()


def _from_bytes(data: bytes) -> array[int]:
    numbers = array("q", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _is_sorted(numbers: array[int]) -> bool:
    return all(map(le, numbers, numbers[1:]))
