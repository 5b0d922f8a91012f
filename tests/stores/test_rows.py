"""Rule 22 for the rows of a file: how long one stays for the holds of other processes, and that it goes after that."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import time_machine

from quotalimit import (
    CalendarWindow,
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    SQLiteStore,
    TokenBucket,
    TokenBudget,
    rate_limited,
)
from quotalimit.algorithms.base import Algorithm
from tests.helpers import used

pytestmark = pytest.mark.usefixtures("time")
LIMITS = [SlidingWindow("100/minute"), CalendarWindow("100/minute"), TokenBucket("100/minute")]


class Process:
    """A store of its own on the file, as another process has it."""

    def __init__(self, path: Path, limit: Algorithm) -> None:
        self.store = SQLiteStore(path)
        self.budget = TokenBudget(limit, name="tokens", store=self.store)
        self._other = RateLimiter("1M/second", name="other", store=self.store)
        self._path = path

    def sweep(self) -> None:
        """Call for somebody else as often as it takes to look at every row."""
        for _ in range(5):
            self._other.acquire("somebody else")

    def keys(self) -> int:
        """The identities for which the file counts tokens."""
        with sqlite3.connect(self._path) as file:
            (keys,) = file.execute("SELECT keys FROM counts WHERE name = ?", (b"tokens",)).fetchone()
            (rows,) = file.execute(
                "SELECT count(*) FROM states WHERE place = (SELECT id FROM counts WHERE name = ?)", (b"tokens",)
            ).fetchone()
        file.close()
        assert keys == rows
        return int(rows)


@pytest.fixture(params=LIMITS, ids=str)
def processes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Process, Process]]:
    one, other = (Process(tmp_path / "counts.db", request.param) for _ in range(2))
    yield one, other
    one.store.close()
    other.store.close()


def test_rule_11_a_hold_that_took_nothing_is_settled_though_other_processes_swept(
    processes: tuple[Process, Process], time: time_machine.Traveller
) -> None:
    one, other = processes
    hold = one.budget.reserve("alice", 0)
    time.shift(20)
    other.sweep()
    hold.settle(50)
    one.store.flush()
    assert used(one.budget) == used(other.budget) == 50


@pytest.mark.parametrize(
    ("processes", "before", "late"),
    [
        (SlidingWindow("100/minute"), 0, 30),
        (SlidingWindow("1_000/minute"), 130, 30),  # which are in a journal
        (TokenBucket("100/minute"), 0, 30),
        (TokenBucket("100/week"), 0, 2 * 86_400),
    ],
    ids=str,
    indirect=["processes"],
)
def test_rule_11_a_hold_that_took_nothing_is_settled_though_the_row_of_a_reset_was_to_go(
    processes: tuple[Process, Process], before: int, late: int, time: time_machine.Traveller
) -> None:
    one, other = processes
    one.budget.reset("alice")
    time.shift(86_330)
    for _ in range(before):
        time.shift(0.01)
        one.budget.charge("alice", 1)
    time.shift(58)
    hold = one.budget.reserve("alice", 0)
    time.shift(late)
    other.sweep()
    hold.settle(50)
    one.store.flush()
    assert used(one.budget) == used(other.budget) == 50


@pytest.mark.parametrize("processes", [TokenBucket("100/minute")], ids=str, indirect=True)
def test_rule_11_a_hold_of_after_a_reset_is_settled_however_late_by_a_process_that_kept_its_row(
    processes: tuple[Process, Process], time: time_machine.Traveller
) -> None:
    one, _ = processes
    one.budget.reset("alice")
    hold = one.budget.reserve("alice", 10)
    time.shift(timedelta(days=2))
    one.sweep()
    assert one.keys() == 1
    hold.settle(60)
    assert used(one.budget) == 50
    time.shift(timedelta(days=2))
    one.sweep()
    assert one.keys() == 0


def test_rule_9_what_a_hold_did_not_use_is_given_back(processes: tuple[Process, Process]) -> None:
    one, other = processes
    one.budget.reserve("alice", 10).settle(0)
    one.store.flush()
    assert used(one.budget) == used(other.budget) == 0


def test_a_hold_of_before_a_reset_settles_nothing_for_as_long_as_a_long_call_runs(
    processes: tuple[Process, Process], time: time_machine.Traveller
) -> None:
    one, other = processes
    hold = one.budget.reserve("alice", 10)
    other.budget.reset("alice")
    time.shift(timedelta(hours=23))
    other.sweep()
    hold.settle(150)
    one.store.flush()
    assert used(one.budget) == used(other.budget) == 0


@pytest.mark.parametrize("processes", [SlidingWindow("1_000/minute")], ids=str, indirect=True)
def test_a_hold_of_before_a_reset_settles_nothing_though_a_large_window_was_given_back_since(
    processes: tuple[Process, Process], time: time_machine.Traveller
) -> None:
    one, other = processes
    hold = one.budget.reserve("alice", 10)
    other.budget.reset("alice")
    later = []
    for _ in range(130):
        time.shift(0.01)
        later.append(other.budget.reserve("alice", 1))
    for given_back in later:
        given_back.settle(0)
    other.store.flush()
    time.shift(20)
    other.sweep()
    hold.settle(50)
    one.store.flush()
    assert used(one.budget) == used(other.budget) == 0


def test_rule_22_a_row_goes_when_nothing_can_come_of_it(
    processes: tuple[Process, Process], time: time_machine.Traveller
) -> None:
    one, other = processes
    one.budget.reserve("alice", 10).settle(5)
    one.store.flush()
    time.shift(59)
    other.sweep()
    assert other.keys() == 1
    time.shift(2)
    other.sweep()
    assert other.keys() == 0


def test_rule_22_what_is_given_back_late_makes_no_row(
    processes: tuple[Process, Process], time: time_machine.Traveller
) -> None:
    one, other = processes
    hold = one.budget.reserve("alice", 10)
    time.shift(120)
    other.sweep()
    assert other.keys() == 0
    hold.settle(0)
    one.store.flush()
    assert other.keys() == 0


def test_rule_22_the_row_of_a_reset_goes_a_day_later(
    processes: tuple[Process, Process], time: time_machine.Traveller
) -> None:
    one, other = processes
    one.budget.charge("alice", 10)
    one.budget.reset("alice")
    time.shift(86_399)
    other.sweep()
    assert other.keys() == 1
    time.shift(1)
    other.sweep()
    assert other.keys() == 0


@pytest.mark.parametrize("processes", [TokenBucket("100/minute")], ids=str, indirect=True)
def test_rule_22_the_row_of_what_is_not_held_goes_when_that_no_longer_counts(
    processes: tuple[Process, Process], time: time_machine.Traveller
) -> None:
    one, other = processes
    one.budget.charge("alice", 50)
    time.shift(29)
    one.budget.charge("alice", 1)
    other.sweep()
    assert other.keys() == 1
    time.shift(2)
    other.sweep()
    assert other.keys() == 0


@pytest.mark.parametrize("processes", [SlidingWindow("1_000/minute")], ids=str, indirect=True)
def test_rule_22_a_large_window_stays_as_long_as_it_counts(
    processes: tuple[Process, Process], time: time_machine.Traveller
) -> None:
    one, other = processes
    for _ in range(130):
        time.shift(0.01)
        one.budget.charge("alice", 1)
    time.shift(50)
    one.budget.charge("alice", 1)
    time.shift(59)
    other.sweep()
    assert used(one.budget) == used(other.budget) == 1
    time.shift(17)  # a quarter of its time longer
    other.sweep()
    assert other.keys() == 0


@pytest.mark.parametrize("plans", [("slow", "fast"), ("fast", "slow")])
def test_rule_22_a_row_is_kept_for_the_slowest_of_the_limits_that_share_it(
    tmp_path: Path, plans: tuple[str, str], time: time_machine.Traveller
) -> None:
    limits = {"slow": TokenBucket("6/hour"), "fast": TokenBucket("3600/hour", burst=6)}
    process = Process(tmp_path / "counts.db", limits["slow"])

    @rate_limited(lambda plan: limits[plan], key="user", cost=lambda cost: cost, name="calls", store=process.store)
    def ask(user: str, plan: str, cost: int) -> None: ...

    for plan in plans:
        ask("bob", plan, 0)
    ask("alice", "slow", 6)
    time.shift(10)  # seconds, in which the fast one fills again
    process.sweep()
    with pytest.raises(RateLimitExceeded):
        ask("alice", "slow", 1)
    process.store.close()
