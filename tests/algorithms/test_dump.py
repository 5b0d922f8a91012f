"""States as bytes: what an algorithm wrote it reads again, and decides the same by it; other bytes it refuses."""

from __future__ import annotations

from array import array
from copy import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quotalimit import CalendarWindow, SlidingWindow, TokenBucket
from quotalimit.algorithms.base import Algorithm

T0 = 1_800_000_000_000_000
LIMITS: list[Algorithm] = [
    SlidingWindow("5/minute"),
    CalendarWindow("5/minute"),
    CalendarWindow("5/month", tz="Europe/Paris"),
    TokenBucket("5/minute"),
    TokenBucket("1000/minute", burst=3),
    TokenBucket("10M/week"),
]
limits = pytest.mark.parametrize("limit", LIMITS, ids=repr)

steps = st.lists(
    st.tuples(st.sampled_from(["take", "adjust"]), st.integers(0, 7), st.integers(-90_000_000, 90_000_000)), max_size=12
)


def answers(limit: Algorithm, state: Any, now: int) -> list[object]:
    """All that a state says."""
    future = [limit.fits(state, need, now + later) for need in (0, 1, 5, 6) for later in (0, 1_000_000, 59_999_999)]
    return [*future, limit.used(state, now), limit.whole_at(state, now), limit.matters(state, now)]


@limits
@given(steps=steps)
def test_a_state_that_was_written_and_read_decides_as_it_did(
    limit: Algorithm, steps: list[tuple[str, int, int]]
) -> None:
    state, now, marks = None, T0, [T0]
    for kind, units, move in steps:
        now += move
        state = limit.redate(state, now)
        if kind == "take":
            state, mark = limit.take(state, units, now)
            marks.append(mark)
        else:
            state = limit.adjust(state, marks[units % len(marks)], units - 3, now)
        if state is None:
            continue
        again = limit.load(limit.dump(state))
        assert answers(limit, again, now) == answers(limit, state, now)
        assert limit.dump(again) == limit.dump(state)
        for mark in marks:
            changed = limit.adjust(copy(again), mark, 2, now)
            assert answers(limit, changed, now) == answers(limit, limit.adjust(copy(state), mark, 2, now), now)
        state = again


@limits
def test_bytes_that_are_no_state_are_refused(limit: Algorithm) -> None:
    state, _ = limit.take(None, 2, T0)
    good = limit.dump(state)
    other = next(other for other in LIMITS if other.kind != limit.kind)
    for bad in (
        b"",
        b"x",
        good[:3],
        good[:3] + bytes(8),
        good[:3] + bytes(16),
        b"l1:" + bytes(8),
        good[:-1] + b"xx",
        good[1:],
        good + b",",
        b"z9:" + good[3:],
        other.dump(other.take(None, 1, T0)[0]),
    ):
        with pytest.raises(ValueError, match=r"not a state|not the |invalid literal|not a multiple"):
            limit.load(bad)


def test_a_log_out_of_order_is_refused() -> None:
    limit = SlidingWindow("5/minute")
    with pytest.raises(ValueError, match="log"):
        limit.load(b"s1:" + array("q", (2, 1)).tobytes())


@pytest.mark.parametrize(("limit", "data"), [(LIMITS[1], b"c1:%d,-1,0" % T0), (LIMITS[3], b"b1:-1,%d,0" % T0)])
def test_a_negative_count_is_refused(limit: Algorithm, data: bytes) -> None:
    """Nobody is given more than the limit by what somebody wrote into a store."""
    assert limit.load(data.replace(b"-1", b"1"))
    with pytest.raises(ValueError, match="not the state"):
        limit.load(data)


def test_an_entry_takes_eight_bytes() -> None:
    limit = SlidingWindow("1000/minute")
    state = None
    for number in range(1000):
        state, _ = limit.take(state, 1, T0 + number)
    assert len(limit.dump(state)) == 8 * 1000 + 3
