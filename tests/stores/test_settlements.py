"""Rule 11 for the queue of what is to be written: each settlement once, in order, whatever fails on the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from quotalimit import SlidingWindow
from quotalimit.stores.base import Claim
from quotalimit.stores.settlements import Change, Settlements, SharedCharge

LIMIT = SlidingWindow("100/day")


class Counts(SimpleNamespace):
    """What a charge tells that it is closed."""

    def closed(self, charge: SharedCharge) -> None:
        self.told = charge


def charge(mark: int) -> SharedCharge:
    return SharedCharge(Claim(Counts(), "alice", LIMIT, 10, 10, True), mark, 10, {}, 0)


def change(mark: int) -> Change:
    return Change(None, "alice", LIMIT, mark, 0, -1)


def marks(changes: list[Change]) -> list[Any]:
    return [change.mark for change in changes]


@pytest.fixture
def settlements() -> Settlements:
    return Settlements()


def test_rule_11_a_charge_is_settled_once_however_often_it_is_queued(settlements: Settlements) -> None:
    once = charge(1)
    for used in (4, 7):
        settlements.add(once, used)
    changes = settlements.take()
    assert [(change.mark, change.delta) for change in changes] == [(1, -6)]
    assert once.counts.told is once
    assert settlements
    settlements.written(changes)
    assert not settlements


def test_rule_11_what_could_not_be_written_is_written_before_all_that_came_since(settlements: Settlements) -> None:
    settlements.add_changes([change(1), change(2)])
    first = settlements.take()
    settlements.add_changes([change(3)])
    second = settlements.take()
    settlements.put_back(second)
    settlements.put_back(first)
    settlements.add_changes([change(4)])
    assert marks(settlements.take()) == [1, 2, 3, 4]


@pytest.mark.parametrize("where", ["queued", "bare", "put back", "under way"])
def test_rule_11_the_child_of_a_fork_writes_nothing_of_its_parents(settlements: Settlements, where: str) -> None:
    if where == "queued":
        settlements.add(charge(1), 4)
    else:
        settlements.add_changes([change(1)])
    if where in ("put back", "under way"):
        changes = settlements.take()
        if where == "put back":
            settlements.put_back(changes)
    assert settlements
    settlements.forget()
    assert not settlements
    assert settlements.take() == []
