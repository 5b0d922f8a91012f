"""The calendar window: N units in each minute, hour, day, week, month or year of a time zone."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Final

from quotalimit.algorithms.base import NEVER, Algorithm, Mark, State, dump_numbers, load_numbers
from quotalimit.errors import InvalidLimit
from quotalimit.rate import SECOND, UNITS, Rate

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_DAY: Final = timedelta(days=1)
_MICROSECOND: Final = timedelta(microseconds=1)
_LENGTHS: Final = {
    unit: UNITS[unit] or days * 86_400 * SECOND
    for unit, days in (("minute", 0), ("hour", 0), ("day", 0), ("week", 0), ("month", 31), ("year", 366))
}


class CalendarWindow(Algorithm):
    """At most N units in each calendar unit of a time zone: `CalendarWindow("1M/month", tz="Europe/Paris")`.

    Units are single minutes, hours, days, weeks from Monday, months and years. `tz` is an IANA name, UTC by default;
    raises `InvalidLimit` if it is unknown. Days that a zone makes 23 or 25 hours long are one window each, and the
    hour that comes twice is two.

    The state is (start, used, mark): the window in which units are used, and the name by which charges taken in it
    are adjusted. That is its start; where the clock has stepped back, of the window in which it was first opened.
    """

    __slots__ = ("_window", "_zone", "tz")

    kind = "calendar"

    def __init__(self, rate: Rate | str, *, tz: str = "UTC") -> None:
        super().__init__(rate)
        if self.rate.count != 1 or self.rate.unit not in _LENGTHS:
            single = f"CalendarWindow('{self.rate.amount}/{self.rate.unit}')"
            raise InvalidLimit(
                f"CalendarWindow counts single minutes, hours, days, weeks, months and years, not {str(self.rate)!r}: "
                f"use {single if self.rate.period is None else f'SlidingWindow({str(self.rate)!r})'}"
            )
        self.tz = tz
        self._zone = None if tz == "UTC" else _zone(tz)
        self._window = (0, 0)

    @property
    def period(self) -> int:
        return _LENGTHS[self.rate.unit]

    @property
    def count_id(self) -> tuple[str, str, str]:
        return (self.kind, self.rate.unit, self.tz)

    def window(self, now: int) -> tuple[int, int]:
        """The start and the end of the window that holds a moment, in microseconds since the epoch."""
        window = self._window
        if window[0] <= now < window[1]:
            return window
        self._window = window = self._find_window(now)
        return window

    def fits(self, state: State, need: int, now: int) -> int:
        if need > self.capacity:
            return NEVER
        start, end = self._window
        if not start <= now < end:
            start, end = self.window(now)
        if state is None or state[0] != start or state[1] + need <= self.capacity:
            return 0
        return end - now

    def take(self, state: State, cost: int, now: int) -> tuple[State, Mark]:
        start, used, mark = self._present(state, now)
        return (start, used + cost, mark), mark

    def adjust(self, state: State, mark: Mark, delta: int, now: int) -> State:
        start, used, present = self._present(state, now)
        if mark != present:
            return state
        used += delta
        return start, used if used > 0 else 0, mark

    def redate(self, state: State, now: int) -> State:
        if state is None or state[0] <= now:
            return state
        _, used, mark = state
        return self.window(now)[0], used, mark

    def used(self, state: State, now: int) -> int:
        return self._present(state, now)[1]

    def whole_at(self, state: State, now: int) -> int:
        return self.window(now)[1] if self.used(state, now) else now

    def matters(self, state: State, now: int) -> bool:
        return bool(state[0] >= self.window(now)[0])

    def dump(self, state: State) -> bytes:
        return dump_numbers(b"c1:", *state)

    def load(self, data: bytes) -> State:
        start, used, mark = load_numbers(b"c1:", data, 3)
        if used < 0:
            raise ValueError(f"not the state of a window: {data!r}")
        return start, used, mark

    def _present(self, state: State, now: int) -> tuple[int, int, Mark]:
        """The state of the present window: the one given, or that of a new window whose mark was never used."""
        start, end = self._window
        if not start <= now < end:
            start, _ = self.window(now)
        if state is None:
            return start, 0, start
        if state[0] == start:
            return state  # type: ignore[no-any-return]
        return start, 0, max(start, state[2] + 1)

    def _find_window(self, now: int) -> tuple[int, int]:
        unit = self.rate.unit
        if unit in ("minute", "hour"):
            return self._find_short_window(now, _LENGTHS[unit])
        day = (_EPOCH + timedelta(microseconds=now)).astimezone(self._zone or UTC).date()
        first = _first_day(day, unit)
        start, end = self._midnight(first), self._midnight(_next_first_day(first, unit))
        if now >= end:  # the clock has been put back over midnight: the new day has begun all the same
            first = _next_first_day(first, unit)
            start, end = end, self._midnight(_next_first_day(first, unit))
        return start, end

    def _find_short_window(self, now: int, length: int) -> tuple[int, int]:
        """A minute or an hour by the zone's offset of the moment; its change ends one and begins another."""
        offset = self._offset(now)
        start = now - (now + offset) % length
        end = start + length
        if self._offset(start) != offset:
            start = self._transition(start, now)
        if self._offset(end - 1) != offset:
            end = self._transition(now, end - 1)
        return start, end

    def _midnight(self, day: date) -> int:
        """The first moment of a day in the zone, in microseconds."""
        midnight = datetime(day.year, day.month, day.day, tzinfo=self._zone or UTC)
        early = (midnight.replace(fold=1) - _EPOCH) // _MICROSECOND
        moment = (midnight - _EPOCH) // _MICROSECOND
        if early < moment:  # midnight was skipped: the day begins with the clock's jump
            return self._transition(early, moment)
        return moment

    def _offset(self, moment: int) -> int:
        """What the zone's clocks are ahead of UTC at a moment, in microseconds."""
        if self._zone is None:
            return 0
        offset = (_EPOCH + timedelta(microseconds=moment)).astimezone(self._zone).utcoffset()
        return (offset or timedelta()) // _MICROSECOND

    def _transition(self, before: int, after: int) -> int:
        """The first moment in (before, after] that has the offset of `after`."""
        offset = self._offset(after)
        while after - before > 1:
            middle = (before + after) // 2
            if self._offset(middle) == offset:
                after = middle
            else:
                before = middle
        return after

    def _key(self) -> tuple[object, ...]:
        return (*super()._key(), self.tz)

    def __repr__(self) -> str:
        zone = "" if self.tz == "UTC" else f", tz={self.tz!r}"
        return f"CalendarWindow({str(self.rate)!r}{zone})"


def _first_day(day: date, unit: str) -> date:
    """The first day of the day, week, month or year that holds a day."""
    if unit == "week":
        return day - day.weekday() * _DAY
    if unit == "month":
        return day.replace(day=1)
    return day.replace(month=1, day=1) if unit == "year" else day


def _next_first_day(first: date, unit: str) -> date:
    if unit == "month":
        return (first + 31 * _DAY).replace(day=1)
    if unit == "year":
        return first.replace(year=first.year + 1)
    return first + (7 * _DAY if unit == "week" else _DAY)


def _zone(name: str) -> tzinfo:
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name)
    except (ValueError, OSError, LookupError, TypeError) as error:
        raise InvalidLimit(
            f"unknown time zone {name!r}: use an IANA name such as 'Europe/Paris', "
            "and install the package tzdata where the system has no time zones"
        ) from error
