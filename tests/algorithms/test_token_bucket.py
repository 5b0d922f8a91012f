"""The token bucket against an oracle that counts in exact fractions."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quotalimit import InvalidLimit, TokenBucket
from quotalimit.algorithms import NEVER
from quotalimit.rate import MAX_AMOUNT, SECOND

PERIOD = 10 * SECOND
START = 1_700_000_000 * SECOND
LIMITS = [
    TokenBucket(f"{amount}/10 seconds", burst=burst) for amount, burst in ((3, 5), (1, 5), (3, 1), (7, 2), (7, 12))
]
THREE = LIMITS[0]


def rate(limit: TokenBucket) -> Fraction:
    return Fraction(limit.rate.amount, PERIOD)


class Bucket:
    """The oracle: what is missing as an exact fraction, and the charges as [time, units].

    Its time never runs back: `past` is by how much the clock has stepped back so far.
    """

    def __init__(self) -> None:
        self.missing = Fraction(0)
        self.time = START
        self.past = 0
        self.charges: list[list[int]] = []

    def missing_at(self, limit: TokenBucket, now: int) -> Fraction:
        return max(Fraction(0), self.missing - rate(limit) * (now - self.time)) if self.charges else Fraction(0)

    def wait(self, limit: TokenBucket, need: int, now: int) -> int:
        if need > limit.burst:
            return NEVER
        return max(0, math.ceil((self.missing_at(limit, now) + need - limit.burst) / rate(limit)))

    def take(self, limit: TokenBucket, cost: int, now: int) -> None:
        self.missing, self.time = self.missing_at(limit, now) + cost, now
        self.charges.append([now + self.past, cost])

    def settle(self, limit: TokenBucket, number: int, used: int, now: int) -> int:
        """Settle a charge; returns used - held."""
        time, held = self.charges[number]
        self.missing, self.time = self.missing_at(limit, now), now
        if used > held:
            self.missing += used - held
        else:
            refilled = rate(limit) * (now + self.past - time)
            self.missing = max(Fraction(0), self.missing - max(Fraction(0), held - used - refilled))
        self.charges[number][1] = used
        return used - held

    def redate(self, now: int) -> None:
        if self.charges and self.time > now:
            self.past += self.time - now
            self.time = now


class Step(NamedTuple):
    """The clock moves, an earlier charge is settled, and a call asks."""

    elapsed: int
    settled: int | None
    used: int
    limit: TokenBucket
    need: int
    cost: int


FILL = PERIOD * 5 // 3
MOMENTS = st.sampled_from([0, 0, 1, PERIOD // 3, PERIOD // 3 + 1, PERIOD, FILL, FILL + 1]) | st.integers(0, 2 * FILL)
BACK = st.sampled_from([-1, -PERIOD]) | st.integers(-4 * FILL, -1)
LATER = st.integers(0, 24).map(lambda quarters: quarters * FILL // 4 + quarters % 2)


def traces(
    elapsed: st.SearchStrategy[int] = MOMENTS, limits: list[TokenBucket] | None = None
) -> st.SearchStrategy[list[Step]]:
    units, settled = st.integers(0, 8), st.none() | st.integers(0, 30)
    limit = st.sampled_from(limits or [THREE])
    return st.lists(st.builds(Step, elapsed, settled, st.integers(0, 30), limit, units, units), max_size=30)


class Play:
    """A trace played on the algorithm and on the oracle, which must agree at every step."""

    def __init__(self, steps: list[Step]) -> None:
        self.state: Any = None
        self.now = START
        self.oracle = Bucket()
        self.marks: list[int] = []
        for step in steps:
            limit = step.limit
            self.now += step.elapsed
            self.state = limit.redate(self.state, self.now)
            self.oracle.redate(self.now)
            if self.marks and step.settled is not None:
                number = step.settled % len(self.marks)
                delta = self.oracle.settle(limit, number, step.used, self.now)
                self.state = limit.adjust(self.state, self.marks[number], delta, self.now)
            self.ask(limit, step.need, step.cost)

    def ask(self, limit: TokenBucket, need: int, cost: int) -> None:
        now, missing = self.now, self.oracle.missing_at(limit, self.now)
        assert limit.used(self.state, now) == math.ceil(missing)
        assert limit.whole_at(self.state, now) == now + math.ceil(missing / rate(limit))
        wait = limit.fits(self.state, need, now)
        assert wait == self.oracle.wait(limit, need, now)
        if wait == 0:
            self.state, mark = limit.take(self.state, min(cost, need), now)
            self.oracle.take(limit, min(cost, need), now)
            self.marks.append(mark)
            self.admitted(limit)

    def admitted(self, limit: TokenBucket) -> None:
        """What is to hold whenever a call has been admitted."""


class PlayWithinBounds(Play):
    """A trace on one bucket, in which no interval may hold more than the bucket and what refills in it."""

    def admitted(self, limit: TokenBucket) -> None:
        last, units = self.oracle.charges[-1][0], 0
        for time, used in reversed(self.oracle.charges):
            units += used
            assert units <= limit.burst + rate(limit) * (last - time)


def answers(state: Any, now: int) -> list[int]:
    """Everything that a state says of now and of some time from now on, in times from now."""
    moments = [now, now + 1, *range(now, now + 3 * FILL, FILL // 7)]
    said = [THREE.fits(state, need, moment) for moment in moments for need in range(7)]
    said += [THREE.used(state, moment) for moment in moments]
    return said + [THREE.whole_at(state, moment) - now for moment in moments]


@given(traces(limits=LIMITS) | traces())
@settings(deadline=None, max_examples=80)
def test_decides_as_exact_fractions(steps: list[Step]) -> None:
    """Rules 3, 9 and 14: each call is decided as in fractions, whatever is settled, whatever rate and burst ask."""
    Play(steps)


@given(traces() | traces(MOMENTS | BACK))
@settings(deadline=None, max_examples=80)
def test_no_interval_holds_more_than_the_burst_and_what_refills(steps: list[Step]) -> None:
    """In any T never more than burst + rate * T units are admitted and kept, with refunds, debts and steps back."""
    PlayWithinBounds(steps)


@given(traces(MOMENTS | BACK, limits=LIMITS))
@settings(deadline=None, max_examples=80)
def test_a_clock_that_steps_back_stops_for_the_bucket(steps: list[Step]) -> None:
    """Rule 19: a step back neither fills nor empties the bucket, and marks keep their meaning."""
    Play(steps)


@given(traces(), st.sampled_from(LIMITS), st.integers(0, 13))
@settings(deadline=None, max_examples=70)
def test_waiting_as_told_admits_and_less_refuses(steps: list[Step], limit: TokenBucket, need: int) -> None:
    """Rule 3: after exactly the wait it fits, a microsecond earlier it does not; NEVER iff it never could."""
    play = Play(steps)
    wait = limit.fits(play.state, need, play.now)
    assert (wait == NEVER) == (need > limit.burst)
    if 0 < wait < NEVER:
        assert limit.fits(play.state, need, play.now + wait) == 0
        assert limit.fits(play.state, need, play.now + wait - 1) == 1


@given(st.integers(1, 5), st.integers(0, 10_000), st.integers(0, 5), st.integers(0, 3 * FILL))
@settings(deadline=None, max_examples=70)
def test_debt_is_refilled_never_forgiven(held: int, over: int, need: int, elapsed: int) -> None:
    """Rule 14: a call that used more than it held is paid back at the rate to the last unit, however long it takes."""
    state, mark = THREE.take(None, held, START)
    state = THREE.adjust(state, mark, over, START)
    settled = START + math.ceil((held + over + need - 5) / rate(THREE))
    assert THREE.fits(state, need, START) == max(0, settled - START)
    assert THREE.fits(state, need, START + elapsed) == max(0, settled - START - elapsed)
    assert THREE.used(state, START) == held + over


@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 2 * FILL))
@settings(deadline=None, max_examples=70)
def test_a_refund_is_less_what_has_refilled(held: int, used: int, elapsed: int) -> None:
    """Rule 14: the bucket gives back what was not used less what has refilled since, and so is never fuller for it."""
    assume(used <= held)
    now = START + elapsed
    state, mark = THREE.take(None, held, START)
    refilled = rate(THREE) * elapsed
    back = max(Fraction(0), held - used - refilled)
    missing = max(Fraction(0), held - refilled - back)
    state = THREE.adjust(state, mark, used - held, now)
    assert THREE.whole_at(state, now) == now + math.ceil(missing / rate(THREE))
    if elapsed == 0:
        assert THREE.used(state, now) == used


def test_a_refund_after_the_refill_gives_nothing_twice() -> None:
    """Rule 14: a hold that refilled while its call ran does not fill the bucket again for the next caller."""
    bucket = TokenBucket("1/second", burst=10)
    state, first = bucket.take(None, 10, START)
    state, _ = bucket.take(state, 10, START + 10 * SECOND)
    state = bucket.adjust(state, first, -10, START + 10 * SECOND)
    assert bucket.fits(state, 1, START + 10 * SECOND) == SECOND
    assert bucket.fits(state, 10, START + 10 * SECOND) == 10 * SECOND


def test_a_refund_never_overfills() -> None:
    """Nobody gains by a refund: the bucket is never fuller than full."""
    state, mark = THREE.take(None, 2, START)
    state = THREE.adjust(state, mark, -100, START)
    assert THREE.used(state, START) == 0
    state, _ = THREE.take(state, 5, START)
    assert THREE.fits(state, 5, START) == FILL + 1


@given(traces(), st.integers(1, 10 * FILL))
@settings(deadline=None, max_examples=70)
def test_after_a_step_back_all_is_as_it_was(steps: list[Step], back: int) -> None:
    """Rule 19: a re-dated state says what it said when it was last charged: none gains, none loses."""
    play = Play(steps)
    assume(play.state is not None)
    newest = play.oracle.time
    redated = THREE.redate(play.state, newest - back)
    assert answers(redated, newest - back) == answers(play.state, newest)
    assert THREE.redate(play.state, newest) == play.state
    if play.oracle.missing_at(THREE, newest) <= THREE.burst:
        assert THREE.fits(redated, THREE.burst, newest - back) <= FILL + 1


@given(traces(), LATER, LATER)
@settings(deadline=None, max_examples=70)
def test_a_state_that_does_not_matter_says_what_none_says(steps: list[Step], back: int, later: int) -> None:
    """Rules 19 and 22: what may be dropped decides like no state. (A store keeps what open charges have marked.)"""
    play = Play(steps)
    assume(play.state is not None)
    now = play.now - back
    state = THREE.redate(play.state, now)
    now += later
    if THREE.matters(state, now):
        return
    assert answers(state, now) == answers(None, now)


@given(traces())
@settings(deadline=None, max_examples=60)
def test_a_state_matters_while_anything_is_missing(steps: list[Step]) -> None:
    """Rule 22: while units are missing it matters; once all has refilled, and any hold could have, it does not."""
    play = Play(steps)
    assume(play.state is not None)
    assert THREE.matters(play.state, play.now) or THREE.used(play.state, play.now) == 0
    whole = THREE.whole_at(play.state, play.now)
    assert whole == play.now or THREE.matters(play.state, whole - 1)
    assert not THREE.matters(play.state, whole + FILL + 1)


@given(traces())
@settings(deadline=None, max_examples=60)
def test_a_copy_is_changed_alone(steps: list[Step]) -> None:
    """A state copied with `copy.copy` is tried out without a change of the original; questions change nothing."""
    play = Play(steps)
    before = answers(play.state, play.now)
    tried = copy.copy(play.state)
    for mark in play.marks:
        tried = THREE.adjust(tried, mark, 4, play.now)
    tried = THREE.redate(tried, play.now - PERIOD)
    tried, _ = THREE.take(tried, 5, play.now)
    assert answers(play.state, play.now) == before


def test_a_state_does_not_grow() -> None:
    """Rule 22: the state of a bucket is the same few numbers after any number of calls."""
    bucket = TokenBucket(f"{MAX_AMOUNT}/second")
    state: Any = None
    sizes = []
    for call in range(1_000):
        now = START + call * SECOND
        assert bucket.fits(state, MAX_AMOUNT, now) == 0
        state, mark = bucket.take(state, MAX_AMOUNT, now)
        if call % 3 == 0:
            state = bucket.adjust(state, mark, -call, now)
        sizes.append(len(pickle.dumps(state)))
    assert max(sizes) < 200


@pytest.mark.parametrize("burst", [0, -1, True, 1.5, "5", MAX_AMOUNT + 1])
def test_a_burst_that_is_no_amount_is_refused(burst: Any) -> None:
    with pytest.raises(InvalidLimit, match="burst must be a whole number from 1"):
        TokenBucket("20/minute", burst=burst)
