"""The sliding window against an oracle that keeps every charge in a plain list."""

from __future__ import annotations

import copy
import pickle
import sys
from array import array
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quotalimit import SlidingWindow
from quotalimit.algorithms import NEVER
from quotalimit.algorithms.sliding_window import Log
from quotalimit.rate import MAX_AMOUNT, SECOND

PERIOD = 10 * SECOND
START = 1_700_000_000 * SECOND
LIMITS = {capacity: SlidingWindow(f"{capacity}/10 seconds") for capacity in (1, 2, 3, 5, 8)}
FIVE = LIMITS[5]


class Charges:
    """The oracle: every charge ever taken, as [time, units]."""

    def __init__(self) -> None:
        self.all: list[list[int]] = []

    def used(self, moment: int) -> int:
        return sum(units for time, units in self.all if time > moment - PERIOD)

    def wait(self, capacity: int, need: int, now: int) -> int:
        if need > capacity:
            return NEVER
        moments = sorted({now} | {time + PERIOD for time, _ in self.all if time + PERIOD > now})
        return next(moment - now for moment in moments if self.used(moment) + need <= capacity)

    def whole_at(self, now: int) -> int:
        return max([now] + [time + PERIOD for time, units in self.all if units])

    def settle(self, number: int, used: int, now: int) -> int:
        """Settle a charge, unless its window is gone; returns used - held."""
        time, held = self.all[number]
        if time > now - PERIOD:
            self.all[number][1] = used
        return used - held

    def redate(self, now: int) -> None:
        step_back = max((time for time, _ in self.all), default=now) - now
        if step_back > 0:
            self.all = [[time - step_back, units] for time, units in self.all]


class Step(NamedTuple):
    """The clock moves, an earlier charge is settled, and a call asks."""

    elapsed: int
    settled: int | None
    used: int
    capacity: int
    need: int
    cost: int


MOMENTS = st.sampled_from([0, 0, 1, PERIOD // 3, PERIOD - 1, PERIOD, PERIOD + 1]) | st.integers(0, 2 * PERIOD)
BACK = st.sampled_from([-1, -PERIOD + 1, -PERIOD]) | st.integers(-4 * PERIOD, -1)
LATER = st.integers(0, 24).map(lambda quarters: quarters * PERIOD // 4 + quarters % 2)


def traces(
    elapsed: st.SearchStrategy[int] = MOMENTS,
    capacities: tuple[int, ...] = tuple(LIMITS),
    needs: st.SearchStrategy[int] | None = None,
    least_cost: int = 0,
    most_used: int = 12,
) -> st.SearchStrategy[list[Step]]:
    """Random traces. Costs of 0 are left out where the clock steps back: what is not charged has no date."""
    needs = st.integers(least_cost, 9) if needs is None else needs
    settled = st.none() | st.integers(0, 30)
    step = st.builds(Step, elapsed, settled, st.integers(0, most_used), st.sampled_from(capacities), needs, needs)
    return st.lists(step, max_size=30)


UNITS_ONLY = {"needs": st.just(1), "least_cost": 1}
"""For traces of calls that cost 1, for which the state is kept in a smaller form."""


class Play:
    """A trace played on the algorithm and on the oracle, which must agree at every step."""

    def __init__(self, steps: list[Step], refunds_only: bool = False) -> None:
        self.state: Any = None
        self.now = START
        self.oracle = Charges()
        self.marks: list[int] = []
        for step in steps:
            self.now += step.elapsed
            self.state = FIVE.redate(self.state, self.now)
            self.oracle.redate(self.now)
            if self.marks and step.settled is not None:
                number = step.settled % len(self.marks)
                held = self.oracle.all[number][1]
                used = min(step.used, held) if refunds_only else step.used
                delta = self.oracle.settle(number, used, self.now)
                self.state = FIVE.adjust(self.state, self.marks[number], delta, self.now)
            self.ask(step)

    def ask(self, step: Step) -> None:
        limit, now = LIMITS[step.capacity], self.now
        assert limit.used(self.state, now) == self.oracle.used(now)
        assert limit.whole_at(self.state, now) == self.oracle.whole_at(now)
        wait = limit.fits(self.state, step.need, now)
        assert wait == self.oracle.wait(step.capacity, step.need, now)
        if wait == 0:
            cost = min(step.cost, step.need)
            self.state, mark = limit.take(self.state, cost, now)
            self.oracle.all.append([now, cost])
            self.marks.append(mark)
            assert self.oracle.used(now) <= step.capacity


def answers(state: Any, now: int) -> list[int]:
    """Everything that a state says of now and of two periods from now on."""
    moments = [now, now + 1, *range(now, now + 2 * PERIOD, PERIOD // 7)]
    said = [LIMITS[8].fits(state, need, moment) for moment in moments for need in range(10)]
    return said + [ask(state, moment) for moment in moments for ask in (FIVE.used, FIVE.whole_at)]


@given(traces() | traces(**UNITS_ONLY))
@settings(deadline=None, max_examples=80)
def test_decides_as_a_list_of_charges(steps: list[Step]) -> None:
    """Rules 1, 9 and 14: each call is decided as by the list, whatever is settled, and whatever amount asks."""
    Play(steps)


@given(traces(capacities=(5,), most_used=5) | traces(capacities=(5,), most_used=1, **UNITS_ONLY))
@settings(deadline=None, max_examples=70)
def test_no_interval_holds_more_than_the_amount(steps: list[Step]) -> None:
    """Rule 1: in no half-open interval of one period, however placed, are more than N units admitted and kept."""
    charges = Play(steps, refunds_only=True).oracle.all
    for start, _ in charges:
        assert sum(units for time, units in charges if start <= time < start + PERIOD) <= 5


@pytest.mark.parametrize("costs", [(1,), (1, 1, 1, 7), (0, 2, 5)])
def test_long_traces_decide_as_a_list_of_charges(costs: tuple[int, ...]) -> None:
    """Rule 1: also where old charges are dropped, hundreds of calls a period at the limit."""
    random = Random(sum(costs))
    limit = SlidingWindow("100/10 seconds")
    oracle = Charges()
    state: Any = None
    now, refused = START, 0
    for _ in range(1_500):
        now += random.choice([0, 1, PERIOD // 100, PERIOD if random.random() < 0.02 else PERIOD // 200])
        cost = random.choice(costs)
        fits = limit.fits(state, cost, now) == 0
        assert fits == (oracle.used(now) + cost <= 100)
        refused += not fits
        if fits:
            state, _ = limit.take(state, cost, now)
            oracle.all.append([now, cost])
        assert limit.used(state, now) == oracle.used(now)
    assert 0 < refused < 1_400


@pytest.mark.parametrize("capacity", [1, 5, 100, 500])
def test_single_units_are_admitted_as_by_a_list_of_charges(capacity: int) -> None:
    """Rule 1: asked and taken in one step too, also by limits that were of another amount before, or another cost."""
    random = Random(capacity)
    limit, larger = SlidingWindow(f"{capacity}/10 seconds"), SlidingWindow(f"{2 * capacity + 9}/10 seconds")
    oracle = Charges()
    state: Any = None
    now, admitted = START, 0
    for call in range(2_000):
        now += random.choice([0, 1, PERIOD // capacity, PERIOD // capacity // 2])
        asked, cost = (larger, 1) if call % 400 > 300 else (limit, 2 if call in (600, 1_400) and capacity > 1 else 1)
        if call == 1_000:
            state, oracle.all = None, []
        fits = oracle.used(now) + cost <= asked.capacity
        before = pickle.dumps(state)
        after = asked.admit(state, now) if cost == 1 else asked.take(state, cost, now)[0] if fits else None
        assert (after is not None) == fits
        if after is None:
            assert pickle.dumps(state) == before
        else:
            state, admitted = after, admitted + 1
            oracle.all.append([now, cost])
        assert limit.used(state, now) == oracle.used(now)
        oracle.all = [charge for charge in oracle.all if charge[0] > now - PERIOD]
    assert 50 < admitted < 1_900


@given(traces() | traces(**UNITS_ONLY), st.sampled_from(sorted(LIMITS)), st.integers(0, 10))
@settings(deadline=None, max_examples=70)
def test_waiting_as_told_admits_and_less_refuses(steps: list[Step], capacity: int, need: int) -> None:
    """Rule 3: after exactly the wait it fits, a microsecond earlier it does not; NEVER iff it never could."""
    play = Play(steps)
    limit, state, now = LIMITS[capacity], play.state, play.now
    wait = limit.fits(state, need, now)
    assert (wait == NEVER) == (need > capacity)
    if 0 < wait < NEVER:
        assert limit.fits(state, need, now + wait) == 0
        assert limit.fits(state, need, now + wait - 1) == 1


@given(traces(MOMENTS | BACK, least_cost=1) | traces(MOMENTS | BACK, **UNITS_ONLY))
@settings(deadline=None, max_examples=80)
def test_a_clock_that_steps_back_moves_all_charges_alike(steps: list[Step]) -> None:
    """Rule 19: charges keep their distances and marks their meaning, through any number of steps back."""
    Play(steps)


@given(traces(least_cost=1, most_used=5) | traces(**UNITS_ONLY), st.integers(1, 10 * PERIOD))
@settings(deadline=None, max_examples=70)
def test_after_a_step_back_all_is_as_it_was(steps: list[Step], back: int) -> None:
    """Rule 19: a re-dated state says what it said when its newest charge was taken: none gains, none loses."""
    play = Play(steps)
    assume(play.marks)
    newest = play.marks[-1]
    earlier = newest - back
    before = answers(play.state, newest)
    assert FIVE.redate(play.state, newest) is play.state
    redated = FIVE.redate(play.state, earlier)
    after = answers(redated, earlier)
    assert [said + back if said > START // 2 and said < NEVER else said for said in after] == before
    assert max(LIMITS[8].fits(redated, need, earlier) for need in range(9)) <= PERIOD
    assert answers(FIVE.redate(redated, earlier), earlier) == after
    assert not FIVE.matters(redated, earlier + PERIOD)
    assert answers(FIVE.redate(redated, earlier + 5), earlier + 5) == answers(redated, earlier + 5)


@given(traces(), st.integers(1, 5 * PERIOD), st.integers(0, 2 * PERIOD), st.integers(1, 12))
@settings(deadline=None, max_examples=70)
def test_after_a_step_back_no_hold_gains_or_locks_out(steps: list[Step], back: int, later: int, used: int) -> None:
    """Rule 19: also where calls that hold nothing are open, a step back refuses nobody for longer than a period."""
    play = Play(steps)
    now = play.now - back
    state = FIVE.redate(play.state, now)
    now += later
    before = FIVE.used(state, now)
    for mark in play.marks:
        state = FIVE.adjust(state, mark, used, now)
        assert before <= FIVE.used(state, now) <= before + used
        before = FIVE.used(state, now)
    assert FIVE.fits(state, 5, now) <= PERIOD
    assert FIVE.whole_at(state, now) <= now + PERIOD


@given(
    traces(least_cost=1) | traces(**UNITS_ONLY),
    LATER,
    LATER,
)
@settings(deadline=None, max_examples=70)
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


@given(traces() | traces(**UNITS_ONLY))
@settings(deadline=None, max_examples=60)
def test_a_state_matters_for_one_period(steps: list[Step]) -> None:
    """Rule 22: while units are in use it matters, and one period after the last charge it no longer does."""
    play = Play(steps)
    assume(play.state is not None)
    for now in (play.now, play.now + PERIOD - 1):
        assert FIVE.matters(play.state, now) or FIVE.used(play.state, now) == 0
    assert not FIVE.matters(play.state, play.marks[-1] + PERIOD)


@given(traces() | traces(**UNITS_ONLY), traces())
@settings(deadline=None, max_examples=60)
def test_a_copy_is_changed_alone(steps: list[Step], more: list[Step]) -> None:
    """A state copied with `copy.copy` is tried out without a change of the original; questions change nothing."""
    play = Play(steps)
    before = answers(play.state, play.now)
    tried = copy.copy(play.state)
    for mark in play.marks:
        tried = FIVE.adjust(tried, mark, 4, play.now)
    tried = FIVE.redate(tried, play.now - PERIOD)
    for step in more:
        tried, _ = FIVE.take(tried, step.cost, play.now + 3 * PERIOD)
    assert answers(play.state, play.now) == before


@pytest.mark.parametrize(("cost", "per_entry"), [(1, 10), (2, 20)])
def test_memory_is_that_of_the_charges_of_one_period(cost: int, per_entry: int) -> None:
    """Rule 22: one entry a call, about 9 bytes where a call is one unit, and charges of the past are dropped."""
    limit = SlidingWindow(f"{1_000 * cost}/10 seconds")
    state: Any = None
    most = 0
    for call in range(20_000):
        now = START + call * PERIOD // 1_000
        assert limit.fits(state, cost, now) == 0
        state, _ = limit.take(state, cost, now)
        most = max(most, len(pickle.dumps(state)) if call % 97 == 0 else 0)
    assert most < 1_000 * per_entry + 1_000


@pytest.mark.parametrize("amount", [1_000, 10_000])
@pytest.mark.parametrize(("cost", "in_one_step"), [(1, True), (1, False), (2, False)])
def test_charges_of_the_past_are_dropped_some_at_a_time(amount: int, cost: int, in_one_step: bool) -> None:
    """Rule 22: about 9 bytes an entry where a call is one unit, and seldom the work of moving the entries that stay."""
    limit = SlidingWindow(f"{amount * cost}/10 seconds")
    state: Any = None
    sizes = []
    for call in range(3 * amount):
        now = START + call * PERIOD // amount
        state = limit.admit(state, now) if in_one_step else limit.take(state, cost, now)[0]
        sizes.append(len(state if cost == 1 else state.times))
    assert max(sizes) <= amount * 17 / 16
    drops = sum(later < earlier for earlier, later in pairwise(sizes))
    assert 0 < drops < 100


def test_a_charge_of_nothing_takes_no_memory() -> None:
    """Cost 0 is checked and charges nothing: no state is kept for it, and none grows by it."""
    assert FIVE.take(None, 0, START) == (None, START)
    state, _ = FIVE.take(None, 1, START)
    before = pickle.dumps(state)
    for call in range(100):
        state, mark = FIVE.take(state, 0, START + call)
        assert mark == START + call
    assert pickle.dumps(state) == before


@pytest.mark.parametrize("cost", [1, 2])
def test_bytes_are_of_one_order_on_all_machines(cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that share a store read each other's states: what they keep is turned round on some of them."""
    state, _ = FIVE.take(None, cost, START)
    state, _ = FIVE.take(state, cost, START + 1)
    here = FIVE.dump(state)
    monkeypatch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
    there = FIVE.dump(state)
    turned = [number[::-1] for number in zip(*[iter(here[3:])] * 8, strict=True)]
    assert there == here[:3] + b"".join(map(bytes, turned))
    assert answers(FIVE.load(there), START + 2) == answers(state, START + 2)
    assert FIVE.dump(FIVE.load(there)) == there


@pytest.mark.parametrize("cost", [2, 10_000, 10**12, MAX_AMOUNT])
def test_one_entry_a_call_and_never_one_a_unit(cost: int) -> None:
    """A call of any cost takes the memory of one call."""
    state, mark = SlidingWindow(f"{MAX_AMOUNT}/day").take(None, cost, START)
    state = SlidingWindow(f"{MAX_AMOUNT}/day").adjust(state, mark, cost - 1, START)
    assert len(pickle.dumps(state)) < 500


@given(traces(least_cost=1) | traces(**UNITS_ONLY), st.integers(-9, 9), st.integers(0, 2 * PERIOD))
@settings(deadline=None, max_examples=60)
def test_a_hold_whose_window_is_gone_changes_nothing(steps: list[Step], delta: int, later: int) -> None:
    """Rules 11 and 14: once a hold's window is gone, its settlement leaves the state as it is."""
    play = Play(steps)
    assume(play.marks)
    state, now = play.state, play.marks[-1] + PERIOD + later
    before = pickle.dumps(state)
    for mark in play.marks:
        state = FIVE.adjust(state, mark, delta, now)
    assert pickle.dumps(state) == before


def test_a_refund_gives_back_no_more_than_was_charged_then() -> None:
    """Nobody gains by a refund: it takes nothing from the charges of others."""
    state, first = FIVE.take(None, 2, START)
    state, _ = FIVE.take(state, 3, START + 1)
    state = FIVE.adjust(state, first, -100, START + 2)
    assert FIVE.used(state, START + 2) == 3
    assert FIVE.fits(state, 3, START + 2) == PERIOD - 1


def test_a_refund_of_what_is_no_longer_charged_changes_nothing() -> None:
    """Rule 11: what has been given back, or was never charged, is not taken from the charges around it."""
    state, nothing = FIVE.take(None, 0, START)
    state, _ = FIVE.take(state, 1, START + 1)
    state, given_back = FIVE.take(state, 2, START + 2)
    state, _ = FIVE.take(state, 2, START + 3)
    state = FIVE.adjust(state, given_back, -2, START + 4)
    before = pickle.dumps(state)
    for mark in (nothing, given_back):
        for units in (1, 2, 9):
            state = FIVE.adjust(state, mark, -units, START + 5)
            assert pickle.dumps(state) == before
    assert FIVE.used(state, START + 5) == 3


@pytest.mark.parametrize("used", [1, 2, 5])
def test_what_a_call_that_held_nothing_used_counts_from_when_it_began(used: int) -> None:
    """Rule 14: a hold settles in the window in which it was taken, also where others have been charged since."""
    state, mark = FIVE.take(None, 0, START)
    state, _ = FIVE.take(state, 2, START + PERIOD // 2)
    state = FIVE.adjust(state, mark, used, START + PERIOD // 2 + 1)
    assert FIVE.used(state, START + PERIOD - 1) == used + 2
    assert FIVE.used(state, START + PERIOD) == 2


def test_units_that_do_not_fit_are_charged_all_the_same() -> None:
    """Rule 9: what was used is counted to the last unit for one period, however far above the limit."""
    state: Any = None
    for call in range(60):
        state, _ = FIVE.take(state, 1, START + call)
    assert FIVE.used(state, START + 60) == 60
    assert FIVE.used(state, START + PERIOD) == 59
    assert FIVE.fits(state, 5, START + 60) == PERIOD - 1


def test_holds_that_are_given_back_leave_nothing() -> None:
    """Rule 22: the memory of a state does not grow by holds that come to use nothing."""
    state: Any = None
    sizes = set()
    for call in range(500):
        now = START + call
        state, mark = FIVE.take(state, 5, now)
        state = FIVE.adjust(state, mark, -5, now)
        sizes.add(len(pickle.dumps(state)))
    assert FIVE.used(state, START + 500) == 0
    assert max(sizes) < 500


@pytest.mark.parametrize("periods", [100, 2_000])
def test_the_largest_amounts_are_counted_for_ever(periods: int) -> None:
    """Amounts up to 2**53 - 1 are counted, however many of them there have been."""
    limit = SlidingWindow(f"{MAX_AMOUNT}/10 seconds")
    state: Any = None
    for call in range(periods):
        now = START + call * PERIOD
        assert limit.fits(state, MAX_AMOUNT, now) == 0
        state, _ = limit.take(state, MAX_AMOUNT, now)
        assert limit.used(state, now) == MAX_AMOUNT
        assert limit.fits(state, 1, now + PERIOD - 1) == 1


class Interrupting(array):  # type: ignore[type-arg]
    """Numbers of which one more makes an interrupt come, before or after it is there."""

    late = False

    def append(self, number: int) -> None:
        self.insert(len(self), number)

    def insert(self, place: int, number: int) -> None:
        if self.late:
            super().insert(place, number)
        raise KeyboardInterrupt


@pytest.mark.parametrize("time", [10, 25, 40], ids=["first", "between", "last"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("struck", ["times", "sums"])
def test_an_interrupt_as_a_charge_is_noted_leaves_a_log_that_is_whole(struck: str, late: bool, time: int) -> None:
    """Rule 11: the charge is in it or not, and every other one is."""
    numbers = {"times": array("q", [20, 30]), "sums": array("q", [0, 5, 12])}
    numbers[struck] = Interrupting("q", numbers[struck])
    numbers[struck].late = late  # type: ignore[attr-defined]
    log = Log(numbers["times"], numbers["sums"], 0, 30)
    with pytest.raises(KeyboardInterrupt):
        log.add(time, 3)
    assert len(log.sums) == len(log.times) + 1
    assert [log.since(horizon) for horizon in (19, 20)] in ([12, 7], [15, 10])
    assert log.since(time) == {10: 12, 25: 7, 40: 0}[time]
