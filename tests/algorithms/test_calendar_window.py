"""The calendar window: counting against a plain list of windows, and the windows against a plain look at the clock."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from functools import cache
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quotalimit import CalendarWindow, InvalidLimit
from quotalimit.algorithms import NEVER
from quotalimit.rate import SECOND

MINUTE = 60 * SECOND
START = 1_700_000_040 * SECOND
LIMITS = {capacity: CalendarWindow(f"{capacity}/minute") for capacity in (1, 2, 3, 5, 8)}
FIVE = LIMITS[5]


# Counting


class Windows:
    """The oracle: every window in which something was charged, as [start, used], and the window of each charge."""

    def __init__(self) -> None:
        self.all: list[list[int]] = []
        self.charges: list[list[int]] = []

    def is_present(self, now: int) -> bool:
        return bool(self.all) and self.all[-1][0] == now - now % MINUTE

    def used(self, now: int) -> int:
        return self.all[-1][1] if self.is_present(now) else 0

    def wait(self, capacity: int, need: int, now: int) -> int:
        if need > capacity:
            return NEVER
        return 0 if self.used(now) + need <= capacity else MINUTE - now % MINUTE

    def take(self, cost: int, now: int) -> None:
        if not self.is_present(now):
            self.all.append([now - now % MINUTE, 0])
        self.all[-1][1] += cost
        self.charges.append([len(self.all) - 1, cost])

    def settle(self, number: int, used: int, now: int) -> int:
        """Settle a charge, unless its window is gone; returns used - held."""
        window, held = self.charges[number]
        if window == len(self.all) - 1 and self.is_present(now):
            self.all[window][1] += used - held
            self.charges[number][1] = used
        return used - held

    def redate(self, now: int) -> None:
        if self.all and self.all[-1][0] > now:
            self.all[-1][0] = now - now % MINUTE


class Step(NamedTuple):
    """The clock moves, an earlier charge is settled, and a call asks."""

    elapsed: int
    settled: int | None
    used: int
    capacity: int
    need: int
    cost: int


MOMENTS = st.sampled_from([0, 0, 1, MINUTE // 3, MINUTE - 1, MINUTE, MINUTE + 1]) | st.integers(0, 2 * MINUTE)
BACK = st.sampled_from([-1, -MINUTE]) | st.integers(-4 * MINUTE, -1)
LATER = st.integers(0, 24).map(lambda quarters: quarters * MINUTE // 4 + quarters % 2)


def traces(elapsed: st.SearchStrategy[int] = MOMENTS) -> st.SearchStrategy[list[Step]]:
    units, settled = st.integers(0, 9), st.none() | st.integers(0, 30)
    step = st.builds(Step, elapsed, settled, st.integers(0, 12), st.sampled_from(sorted(LIMITS)), units, units)
    return st.lists(step, max_size=30)


class Play:
    """A trace played on the algorithm and on the oracle, which must agree at every step."""

    def __init__(self, steps: list[Step]) -> None:
        self.state: Any = None
        self.now = START
        self.oracle = Windows()
        self.marks: list[int] = []
        for step in steps:
            self.now += step.elapsed
            self.state = FIVE.redate(self.state, self.now)
            self.oracle.redate(self.now)
            if self.marks and step.settled is not None:
                number = step.settled % len(self.marks)
                delta = self.oracle.settle(number, step.used, self.now)
                self.state = FIVE.adjust(self.state, self.marks[number], delta, self.now)
            self.ask(step)

    def ask(self, step: Step) -> None:
        limit, now, used = LIMITS[step.capacity], self.now, self.oracle.used(self.now)
        assert limit.used(self.state, now) == used
        assert limit.whole_at(self.state, now) == (now - now % MINUTE + MINUTE if used else now)
        wait = limit.fits(self.state, step.need, now)
        assert wait == self.oracle.wait(step.capacity, step.need, now)
        if wait == 0:
            cost = min(step.cost, step.need)
            self.state, mark = limit.take(self.state, cost, now)
            self.oracle.take(cost, now)
            self.marks.append(mark)


def answers(state: Any, now: int) -> list[int]:
    """Everything that a state says of now and of some time from now on."""
    moments = [now, now + 1, *range(now, now + 2 * MINUTE, MINUTE // 7)]
    said = [FIVE.fits(state, need, moment) for moment in moments for need in range(7)]
    return said + [ask(state, moment) for moment in moments for ask in (FIVE.used, FIVE.whole_at)]


@given(traces())
@settings(deadline=None, max_examples=100)
def test_decides_as_a_list_of_windows(steps: list[Step]) -> None:
    """Rules 3, 9 and 14: each call is decided as by the list, and a hold settles in its window or nowhere."""
    Play(steps)


@given(traces(MOMENTS | BACK))
@settings(deadline=None, max_examples=120)
def test_a_clock_that_steps_back_keeps_the_count(steps: list[Step]) -> None:
    """Rule 19: after a step back the window becomes the present one, and marks keep their meaning."""
    Play(steps)


@given(traces(MOMENTS | BACK), st.integers(0, 10 * MINUTE))
@settings(deadline=None, max_examples=100)
def test_after_a_step_back_nobody_gains_or_is_locked_out(steps: list[Step], back: int) -> None:
    """Rule 19: what was used stays used, and nobody is refused for longer than one window."""
    play = Play(steps)
    now = play.now - back
    used_at = play.oracle.all[-1] if play.oracle.all else [now, 0]
    redated = FIVE.redate(play.state, now)
    if used_at[0] >= now - now % MINUTE:
        assert FIVE.used(redated, now) == used_at[1]
    assert all(FIVE.fits(redated, need, now) <= MINUTE for need in range(6))
    assert FIVE.used(redated, now + MINUTE) == 0


@given(traces(), LATER, LATER)
@settings(deadline=None, max_examples=100)
def test_a_state_that_does_not_matter_says_what_none_says(steps: list[Step], back: int, later: int) -> None:
    """Rules 19 and 22: what may be dropped decides like no state. (A store keeps what open charges have marked.)"""
    play = Play(steps)
    assume(play.state is not None)
    now = play.now - back
    state = FIVE.redate(play.state, now)
    now += later
    if FIVE.matters(state, now):
        return
    assert answers(state, now) == answers(None, now)


@given(traces())
@settings(deadline=None, max_examples=60)
def test_a_state_matters_for_its_window(steps: list[Step]) -> None:
    """Rule 22: while units are in use it matters, and after the window it no longer does."""
    play = Play(steps)
    assume(play.state is not None)
    assert FIVE.matters(play.state, play.now) or FIVE.used(play.state, play.now) == 0
    assert not FIVE.matters(play.state, play.now + MINUTE)


@given(traces(MOMENTS | BACK))
@settings(deadline=None, max_examples=60)
def test_a_copy_is_changed_alone(steps: list[Step]) -> None:
    """A state copied with `copy.copy` is tried out without a change of the original; questions change nothing."""
    play = Play(steps)
    before = answers(play.state, play.now)
    tried = copy.copy(play.state)
    for mark in play.marks:
        tried = FIVE.adjust(tried, mark, 4, play.now)
    tried = FIVE.redate(tried, play.now - 2 * MINUTE)
    tried, _ = FIVE.take(tried, 5, play.now + MINUTE)
    assert answers(play.state, play.now) == before


def test_a_refund_gives_back_no_more_than_was_charged() -> None:
    """Nobody gains by a refund: no more fits than the limit."""
    state, mark = FIVE.take(None, 2, START)
    state = FIVE.adjust(state, mark, -100, START)
    assert FIVE.used(state, START) == 0
    state, _ = FIVE.take(state, 5, START)
    assert FIVE.fits(state, 1, START) == MINUTE


def test_a_state_does_not_grow() -> None:
    """Rule 22: the state of a calendar window is the same few numbers after any number of calls."""
    state: Any = None
    for call in range(1_000):
        state, _ = FIVE.take(state, 10**9, START + call * SECOND)
        assert len(pickle.dumps(state)) < 100


# The windows themselves

ZONES = [
    ("UTC", 2024),
    ("Europe/Paris", 2024),
    ("America/New_York", 2024),
    ("Australia/Lord_Howe", 2024),  # half an hour of daylight saving
    ("America/Santiago", 2024),  # a day that begins at 01:00
    ("Africa/Cairo", 2024),  # a day that begins at 01:00, and one whose last hour comes twice
    ("Asia/Kathmandu", 2024),  # +05:45
    ("America/Havana", 2024),  # a day that begins at 01:00, and one whose first hour comes twice
    ("Asia/Beirut", 2024),  # a day that begins at 01:00
    ("Atlantic/Azores", 2024),  # a day that begins at 01:00
    ("America/Scoresbysund", 2024),  # changed its zone in the spring
    ("Pacific/Apia", 2024),
    ("Pacific/Apia", 2011),  # 30 December never was
    ("America/St_Johns", 2009),  # changed at 00:01, and so from 1 November back to 31 October
    ("America/St_Johns", 2010),
    ("Asia/Gaza", 2011),  # changed four times, once at 00:01
]
LONG_UNITS = ("day", "week", "month", "year")


def labels(clock: datetime, today: date) -> dict[str, tuple[Any, ...]]:
    """What tells a window of each unit from its neighbours. Midnight that comes twice begins its day the first time."""
    return {
        "minute": (clock.date(), clock.hour, clock.minute, clock.utcoffset()),
        "hour": (clock.date(), clock.hour, clock.utcoffset()),
        "day": (today,),
        "week": tuple(today.isocalendar())[:2],
        "month": (today.year, today.month),
        "year": (today.year,),
    }


@cache
def scan(zone: str, year: int) -> dict[str, list[int]]:
    """Where windows begin, in microseconds, by a look at the clock on the wall: each minute within a quarter of an hour
    in which it changes, else each quarter of an hour. Minutes are noted where each one is looked at."""
    tz = ZoneInfo(zone)
    first = int(datetime(year - 1, 12, 20, tzinfo=UTC).timestamp())
    last = int(datetime(year + 1, 1, 12, tzinfo=UTC).timestamp())
    starts: dict[str, list[int]] = {unit: [] for unit in labels(datetime.now(tz), date.today())}
    starts["change"] = []
    present: dict[str, tuple[Any, ...]] = {}
    today = date.min
    for quarter in range(first, last, 900):
        changes = offset(tz, quarter) != offset(tz, quarter + 900) or offset(tz, quarter) != offset(tz, quarter - 900)
        for moment in range(quarter, quarter + 900, 60 if changes else 900):
            clock = datetime.fromtimestamp(moment, tz)
            today = max(today, clock.date())
            for unit, label in labels(clock, today).items():
                if label != present.get(unit) and (unit != "minute" or changes):
                    starts[unit].append(moment * SECOND)
                present[unit] = label
            if offset(tz, moment) != offset(tz, moment - 60):
                starts["change"].append(moment * SECOND)
    return starts


def offset(tz: ZoneInfo, moment: int) -> timedelta | None:
    return datetime.fromtimestamp(moment, tz).utcoffset()


def wrong_windows(zone: str, unit: str, windows: list[tuple[int, int]]) -> Iterator[str]:
    """Where the algorithm sees other windows, whatever it was asked before."""
    limit = CalendarWindow(f"1/{unit}", tz=zone)
    probes = [(now, window) for window in windows for now in (window[0], sum(window) // 2, window[1] - 1)]
    for now, window in probes + Random(0).sample(probes, min(len(probes), 2_000)):
        seen = limit.window(now)
        if seen != window:
            yield f"{utc(now)}: is in {utc(window[0])} to {utc(window[1])}, not {utc(seen[0])} to {utc(seen[1])}"


def utc(moment: int) -> str:
    return str(datetime(1970, 1, 1) + timedelta(microseconds=moment))


@pytest.mark.parametrize("unit", ["hour", *LONG_UNITS])
@pytest.mark.parametrize(("zone", "year"), ZONES)
def test_windows_of_a_year(zone: str, year: int, unit: str) -> None:
    """Rule 20: the windows of a year are where the clock on the wall changes, and partition its time."""
    windows = list(pairwise(scan(zone, year)[unit]))[1:]  # the scan begins within the first one
    assert len(windows) >= {"hour": 8_800, "day": 380, "week": 53, "month": 11, "year": 1}[unit]
    assert list(wrong_windows(zone, unit, windows))[:5] == []


@pytest.mark.parametrize(("zone", "year"), ZONES)
def test_minutes_around_changes(zone: str, year: int) -> None:
    """Rule 20: each minute on the wall is a window, also where the clock changes."""
    windows = [(start, end) for start, end in pairwise(scan(zone, year)["minute"]) if end - start == MINUTE]
    assert len(windows) >= 14 * len(scan(zone, year)["change"])
    assert list(wrong_windows(zone, "minute", windows))[:5] == []


WINDOWS_BY_HAND = [
    ("Europe/Paris", "day", "2024-03-31 12:00", "2024-03-30 23:00", "2024-03-31 22:00"),  # 23 hours
    ("Europe/Paris", "day", "2024-10-27 12:00", "2024-10-26 22:00", "2024-10-27 23:00"),  # 25 hours
    ("Europe/Paris", "hour", "2024-10-27 00:30", "2024-10-27 00:00", "2024-10-27 01:00"),  # 02:00, and once more
    ("Europe/Paris", "hour", "2024-10-27 01:30", "2024-10-27 01:00", "2024-10-27 02:00"),
    ("Europe/Paris", "month", "2024-03-15 00:00", "2024-02-29 23:00", "2024-03-31 22:00"),
    ("Europe/Paris", "year", "2024-07-01 00:00", "2023-12-31 23:00", "2024-12-31 23:00"),
    ("UTC", "week", "2024-01-01 00:00", "2024-01-01 00:00", "2024-01-08 00:00"),  # a Monday
    ("UTC", "week", "2024-01-07 23:59", "2024-01-01 00:00", "2024-01-08 00:00"),
    ("UTC", "month", "2024-02-29 23:59", "2024-02-01 00:00", "2024-03-01 00:00"),
    ("UTC", "year", "2024-12-31 23:59", "2024-01-01 00:00", "2025-01-01 00:00"),
    ("America/New_York", "week", "2024-03-11 03:59", "2024-03-04 05:00", "2024-03-11 04:00"),
    ("Asia/Kathmandu", "hour", "2024-05-05 12:00", "2024-05-05 11:15", "2024-05-05 12:15"),
    ("Asia/Kathmandu", "day", "2024-05-05 18:14", "2024-05-04 18:15", "2024-05-05 18:15"),
    ("Africa/Cairo", "day", "2024-04-26 12:00", "2024-04-25 22:00", "2024-04-26 21:00"),  # begins at 01:00
    ("Pacific/Apia", "day", "2011-12-30 09:59", "2011-12-29 10:00", "2011-12-30 10:00"),  # the 29th
    ("Pacific/Apia", "day", "2011-12-30 10:00", "2011-12-30 10:00", "2011-12-31 10:00"),  # the 31st
    ("America/St_Johns", "month", "2009-11-01 02:29", "2009-10-01 02:30", "2009-11-01 02:30"),
    ("America/St_Johns", "month", "2009-11-01 03:00", "2009-11-01 02:30", "2009-12-01 03:30"),  # 23:30 once more
    ("America/Toronto", "day", "1919-03-31 12:00", "1919-03-31 04:30", "1919-04-01 04:00"),  # 23:30 became 00:30
    ("Australia/Lord_Howe", "day", "2024-04-07 00:00", "2024-04-06 13:00", "2024-04-07 13:30"),  # 24.5 hours
]


@pytest.mark.parametrize(("zone", "unit", "moment", "start", "end"), WINDOWS_BY_HAND)
def test_windows_computed_by_hand(zone: str, unit: str, moment: str, start: str, end: str) -> None:
    """Rule 20: days of 23 and 25 hours are one window, an hour that comes twice is two, weeks begin on Monday."""
    now, first, last = (round(datetime.fromisoformat(f"{text}+00:00").timestamp()) for text in (moment, start, end))
    assert CalendarWindow(f"1/{unit}", tz=zone).window(now * SECOND) == (first * SECOND, last * SECOND)


@pytest.mark.parametrize("unit", ["minute", "hour", "day"])
@pytest.mark.parametrize(("zone", "year"), [("America/St_Johns", 2009), ("Australia/Lord_Howe", 2024)])
def test_a_window_is_the_same_from_each_of_its_moments(zone: str, year: int, unit: str) -> None:
    """Rule 20: also where the clock changes in the middle of an hour, windows partition the time to the microsecond."""
    random = Random(0)
    for change in scan(zone, year)["change"]:
        moments = [change, change - 1, *(change + random.randint(-30 * MINUTE, 30 * MINUTE) for _ in range(60))]
        windows = {CalendarWindow(f"1/{unit}", tz=zone).window(now) for now in moments}
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(windows)))


@pytest.fixture
def far_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose own clock is 05:45 ahead of UTC."""
    with monkeypatch.context() as changes:
        changes.setenv("TZ", "Asia/Kathmandu")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize("unit", ["minute", "hour", *LONG_UNITS])
def test_windows_are_those_of_utc_wherever_the_machine_is(unit: str, far_machine: None) -> None:
    """Rule 20: without a zone, windows are those of UTC, and machines that share a store agree on them."""
    assert datetime.fromtimestamp(0).hour == 5
    windows = list(pairwise(scan("UTC", 2024)[unit]))[1:]
    assert list(wrong_windows("UTC", unit, windows))[:5] == []
    assert CalendarWindow(f"1/{unit}").window(START + 1) == CalendarWindow(f"1/{unit}", tz="Etc/UTC").window(START + 1)


@pytest.mark.parametrize("unit", ["minute", "hour", *LONG_UNITS])
def test_the_period_is_the_longest_that_a_unit_can_be(unit: str) -> None:
    """What a store plans by: in UTC no window is longer, and one is as long."""
    limit = CalendarWindow(f"1/{unit}")
    windows = [limit.window(START + days * 86_400 * SECOND) for days in range(5 * 366)]
    assert max(end - start for start, end in windows) == limit.period


@pytest.mark.parametrize("unit", ["minute", "hour", *LONG_UNITS])
@pytest.mark.parametrize(("zone", "year"), ZONES)
def test_waiting_as_told_admits_and_less_refuses(zone: str, year: int, unit: str) -> None:
    """Rule 3: also across any change of the clock, after the wait it fits, and a microsecond earlier it does not."""
    limit = CalendarWindow(f"5/{unit}", tz=zone)
    for change in [START, *scan(zone, year)["change"]]:
        for now in range(change - 90 * MINUTE, change + 90 * MINUTE, MINUTE):
            state, _ = limit.take(None, 3, now)
            assert [limit.fits(state, need, now) for need in (0, 2, 6)] == [0, 0, NEVER]
            wait = limit.fits(state, 3, now)
            waits = [limit.fits(state, 3, now + wait), limit.fits(state, 3, now + wait - 1)]
            assert (utc(now), waits) == (utc(now), [0, 1])


@given(traces(), st.sampled_from(sorted(LIMITS)), st.integers(0, 10))
@settings(deadline=None, max_examples=100)
def test_waits_of_traces_are_honest(steps: list[Step], capacity: int, need: int) -> None:
    """Rule 3: after any trace, and in debt; NEVER iff it never could."""
    play = Play(steps)
    limit, state, now = LIMITS[capacity], play.state, play.now
    wait = limit.fits(state, need, now)
    assert (wait == NEVER) == (need > capacity)
    if 0 < wait < NEVER:
        assert limit.fits(state, need, now + wait) == 0
        assert limit.fits(state, need, now + wait - 1) == 1


@pytest.mark.parametrize(
    "tz",
    ["Nowhere/City", "Europe", "", "../UTC", "/etc/localtime", "Europe/Paris\x00", "x" * 5_000, None, 1, b"UTC", []],
)
def test_an_unknown_zone_is_refused(tz: Any) -> None:
    """Rule 20: an unknown zone raises InvalidLimit, which names it, shows a right one and names tzdata."""
    with pytest.raises(InvalidLimit, match="tzdata") as caught:
        CalendarWindow("1/day", tz=tz)
    assert repr(tz)[:100] in str(caught.value)
    assert "Europe/Paris" in str(caught.value)


@pytest.mark.parametrize("limit", [CalendarWindow("5/day"), CalendarWindow("1M/month", tz="Europe/Paris")])
def test_a_window_shows_itself_as_it_is_made(limit: CalendarWindow) -> None:
    assert eval(repr(limit)) == limit
    assert ("tz" in repr(limit)) == (limit.tz != "UTC")
