"""The Lua twins of the algorithms, against the Python, on a real server: the same numbers on random traces."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from struct import pack
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quotalimit import CalendarWindow, Rate, SlidingWindow, TokenBucket
from quotalimit.algorithms import NEVER, Algorithm
from quotalimit.rate import MAX_AMOUNT, SECOND
from quotalimit.stores.scripts import assembled, twin_of

from ..stores import servers

START = 1_774_746_000 * SECOND
"""Half an hour before Paris puts its clocks forward, in microseconds."""

DRIVER = """
local algorithm = algorithms[ARGV[1]]
local results = {}
local function tell(...)
  local told = {}
  for _, number in ipairs({...}) do told[#told + 1] = string.format('%.0f', number) end
  results[#results + 1] = table.concat(told, ' ')
end
for at = 2, #ARGV do
  local op, capacity, period, amount, one, two, three, now, first, second, third =
    struct.unpack('<ddddddddddd', ARGV[at])
  local limit = {capacity = capacity, period = period, amount = amount, edges = {one, two, three}}
  local count = algorithm.load(KEYS[1])
  local changed = algorithm.redate(count, limit, now)
  if op == 1 then
    local low, high = algorithm.fits(count, limit, first, now, now + third, second)
    if low then tell(low, high) else tell(-1) end
  elseif op == 2 then
    tell(algorithm.take(count, limit, first, now, second == 1))
    changed = true
  elseif op == 3 then
    algorithm.adjust(count, limit, first, second, now)
    tell(0)
    changed = true
  elseif op == 4 then
    tell(algorithm.used(count, limit, now), algorithm.whole_in(count, limit, now))
  end
  if changed then algorithm.save(count, limit, now, 3600000) end
end
return results
"""

Op = tuple[str, int, int, int, int]
"""What is done after how many microseconds, and its numbers."""


class Twins:
    """One count in Python and what Lua is to be asked, in the same order."""

    def __init__(self, limit: Algorithm) -> None:
        self.limit = limit
        self.state: Any = None
        self.now = START
        self.marks: list[int] = []
        self.asked: list[bytes] = []
        self.expected: list[str] = []

    def do(self, name: str, step: int, first: int, second: int, third: int) -> None:
        self.now = max(0, self.now + step)
        limit, now = self.limit, self.now
        state = limit.redate(self.state, now)
        if name == "fits":
            state_then = state
            if second:
                state_then, _ = limit.take(copy(state), second, now)
            wait = limit.fits(state_then, first, now + third)
            self.expect(1, first, second, third, "-1" if wait == NEVER else wait)
        elif name in ("take", "hold"):
            holds = name == "hold"
            cost = first if holds else max(1, first)
            state, mark = limit.take(state, cost, now)
            self.marks.append(mark)
            self.expect(2, cost, holds, 0, str(mark))
        elif name == "adjust" and self.marks:
            mark = self.marks[-1 - first % len(self.marks)]
            state = limit.adjust(state, mark, second, now)
            self.expect(3, mark, second, 0, "0")
        elif name == "look":
            used = limit.used(state, now)
            self.expect(4, 0, 0, 0, f"{used} {in_words(limit.whole_at(state, now) - now)}")
        self.state = state

    def expect(self, op: int, first: int, second: int, third: int, result: str | int) -> None:
        limit, now = self.limit, self.now
        edges = (0, 0, 0)
        if isinstance(limit, CalendarWindow):
            start, end = limit.window(now)
            edges = (start, end, limit.window(end)[1])
        self.asked.append(
            pack("<11d", op, limit.capacity, limit.period, limit.rate.amount, *edges, now, first, second, third)
        )
        self.expected.append(result if isinstance(result, str) else in_words(result))


def in_words(number: int) -> str:
    """As the twins give what may have more than 53 bits."""
    return f"{number & MAX_AMOUNT} {number >> 53}"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with servers.server().client() as client:
        yield client


def play(server: Any, limit: Algorithm, ops: list[Op]) -> None:
    twins = Twins(limit)
    for op in ops:
        twins.do(*op)
    source = assembled([twin_of(limit)]) + DRIVER
    server.delete("lua")
    results = [line.decode() for line in server.eval(source, 1, "lua", limit.kind, *twins.asked)]
    clamped = [clamp(line) for line in results]
    assert clamped == twins.expected


def clamp(line: str) -> str:
    """A wait as the client reads it: the Python never says more than NEVER - 1."""
    words = line.split()
    if len(words) == 2 and int(words[1]) >= 1 << 9:
        return in_words(NEVER - 1)
    return line


def ops_of(steps: st.SearchStrategy[int], units: st.SearchStrategy[int], most: int = 60) -> st.SearchStrategy[list[Op]]:
    zero = st.just(0)
    fits = st.tuples(st.just("fits"), steps, units, zero | units, steps.map(abs))
    take = st.tuples(st.sampled_from(["take", "hold"]), steps, units, zero, zero)
    adjust = st.tuples(st.just("adjust"), steps, st.integers(0, 9), units | units.map(lambda n: -n), zero)
    look = st.tuples(st.just("look"), steps, zero, zero, zero)
    return st.lists(fits | take | take | adjust | look, min_size=1, max_size=most)


small_steps = st.integers(0, 3 * SECOND) | st.sampled_from([0, 1, SECOND, 10 * SECOND]) | st.integers(-3 * SECOND, -1)
small_units = st.sampled_from([1, 1, 1, 0, 2, 3]) | st.integers(0, 12)


ZERO_HELD_BEFORE_A_STEP_BACK: list[Op] = [
    ("take", 0, 1, 0, 0),
    ("hold", SECOND, 0, 0, 0),
    ("take", -SECOND // 2, 1, 0, 0),
    ("adjust", 2 * SECOND, 1, 2, 0),
    ("fits", 0, 2, 0, 0),
]


@given(ops_of(small_steps, small_units), st.integers(1, 12))
@settings(max_examples=400, deadline=None)
@example(ZERO_HELD_BEFORE_A_STEP_BACK, 4)
def test_sliding_windows(server: Any, ops: list[Op], amount: int) -> None:
    play(server, SlidingWindow(Rate(amount, "second", 10)), ops)


@given(ops_of(small_steps, small_units), st.integers(1, 12), st.sampled_from(["UTC", "Europe/Paris", "Asia/Kolkata"]))
@settings(max_examples=200, deadline=None)
def test_calendar_windows(server: Any, ops: list[Op], amount: int, tz: str) -> None:
    ops = [(name, step * 60, first, second, third * 60) for name, step, first, second, third in ops]
    for unit in ("minute", "hour", "day", "month"):
        play(server, CalendarWindow(Rate(amount, unit), tz=tz), ops)


@given(ops_of(small_steps, small_units), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_token_buckets(server: Any, ops: list[Op], amount: int, burst: int) -> None:
    play(server, TokenBucket(Rate(amount, "second", 7), burst=burst), ops)


large = st.sampled_from([1, 3, 10**6, 10**9 + 7, 2**52 + 1, MAX_AMOUNT // 3, MAX_AMOUNT - 1, MAX_AMOUNT])
counts = st.sampled_from([1, 7, 60, 86_400, 10**9, 9 * 10**9])


@given(
    ops_of(st.integers(0, 10**6) | st.sampled_from([0, 10**9, 10**12, 2**48]), large, most=3),
    large,
    large,
    counts,
)
@settings(max_examples=150, deadline=None)
@example([("take", 0, MAX_AMOUNT, 0, 0), ("fits", 3, MAX_AMOUNT, 0, 0)], 1, MAX_AMOUNT, 9 * 10**9)
@example([("take", 0, MAX_AMOUNT, 0, 0), ("look", 2**48, 0, 0, 0)], MAX_AMOUNT, MAX_AMOUNT, 9 * 10**9)
@example([("take", 0, MAX_AMOUNT, 0, 0), ("look", 86_400 * SECOND, 0, 0, 0)], 2**52 + 1, MAX_AMOUNT, 86_400)
@example([("take", 0, MAX_AMOUNT, 0, 0), ("look", 300_001, 0, 0, 0)], 86_400 * SECOND // 2, MAX_AMOUNT, 86_400)
@example([("take", 0, MAX_AMOUNT, 0, 0), ("look", 86_399 * SECOND, 0, 0, 0)], 2**52 + 1, MAX_AMOUNT, 86_400)
def test_token_buckets_are_exact_up_to_the_largest_amounts_and_the_longest_periods(
    server: Any, ops: list[Op], amount: int, burst: int, seconds: int
) -> None:
    """Products of 106 bits: units * period, and amount * time."""
    charged = 0
    kept = []
    for name, step, first, second, third in ops:
        more = first if name in ("take", "hold") else second if name in ("adjust", "fits") else 0
        if charged + abs(more) <= MAX_AMOUNT:  # what is in use is counted exactly up to here
            kept.append((name, step, first, second, third))
            charged += abs(more)
    play(server, TokenBucket(Rate(amount, "second", seconds), burst=burst), kept)


@given(ops_of(st.integers(0, 4), st.sampled_from([1, 1, 2, 5]), most=20), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
@example([("take", 0, 1, 0, 0), ("take", 1, 2, 0, 0), ("adjust", 0, 1, 3, 0), ("look", 1, 0, 0, 0)], 4)
@example([("take", 1, 2, 0, 0), ("adjust", 0, 129, 3, 0), ("look", 1, 0, 0, 0)] + [("take", 0, 1, 0, 0)] * 70, 4)
def test_long_logs_of_a_sliding_window(server: Any, ops: list[Op], repeats: int) -> None:
    """Enough charges for the log to be of many chunks, which split, empty and leave."""
    ops = ops * (30 * repeats)
    play(server, SlidingWindow(Rate(400, "second", 1)), [(name, 1_000 * step, *rest) for name, step, *rest in ops])


def test_a_list_of_units_becomes_a_log_and_keeps_its_charges(server: Any) -> None:
    units: list[Op] = [("take", 700, 1, 0, 0)] * 1_500
    then: list[Op] = [("look", 0, 0, 0, 0), ("hold", 1, 3, 0, 0), ("look", 0, 0, 0, 0)]
    back: list[Op] = [("adjust", 0, number, -1, 0) for number in range(1_400)]
    play(server, SlidingWindow("1_000/second"), [*units, *then, *back, ("look", 0, 0, 0, 0), ("fits", 9, 500, 0, 0)])
