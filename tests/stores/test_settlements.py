"""Rule 11 for the queue of what is to be written: each settlement once, in order, whatever fails on the way."""

from __future__ import annotations

from collections.abc import Mapping
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


def marks(changes: Mapping[int, Change]) -> list[Any]:
    return [change.mark for change in changes.values()]


@pytest.fixture
def settlements() -> Settlements:
    return Settlements()


def test_rule_11_a_charge_is_settled_once_however_often_it_is_queued(settlements: Settlements) -> None:
    once = charge(1)
    for used in (4, 7):
        settlements.add(once, used)
    due = settlements.due()
    assert [(change.mark, change.delta) for change in due.values()] == [(1, -6)]
    assert once.counts.told is once
    assert settlements
    settlements.written(due)
    assert not settlements


def test_rule_11_what_is_not_written_is_due_before_all_that_came_since(settlements: Settlements) -> None:
    settlements.add_changes([change(1), change(2)])
    first, _ = settlements.due()
    settlements.add_changes([change(3)])
    assert marks(settlements.due()) == [1, 2, 3]
    settlements.written([first])
    settlements.written([first])
    settlements.add(charge(4), 4)
    assert marks(settlements.due()) == [2, 3, 4]


def test_rule_11_a_charge_that_used_what_it_held_asks_for_no_change(settlements: Settlements) -> None:
    exact = charge(1)
    settlements.add(exact, 10)
    assert not settlements.due()
    assert not settlements
    assert not exact.open


@pytest.mark.parametrize("used", [4, 17])
@pytest.mark.parametrize("where", [f"{__name__}.Counts.closed", "quotalimit.stores.settlements.change_of"])
def test_rule_11_a_settlement_that_is_interrupted_is_made_the_next_time(
    settlements: Settlements, monkeypatch: pytest.MonkeyPatch, used: int, where: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    one = charge(1)
    settlements.add(one, used)
    settlements.add_changes([change(2)])
    with monkeypatch.context() as patched:
        patched.setattr(where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            settlements.due()
    assert [(change.mark, change.delta) for change in settlements.due().values()] == [(1, used - 10), (2, -1)]
    assert (one.open, one.held) == (False, 0)


@pytest.mark.parametrize("where", ["queued", "bare", "due"])
def test_rule_11_the_child_of_a_fork_writes_nothing_of_its_parents(settlements: Settlements, where: str) -> None:
    if where == "queued":
        settlements.add(charge(1), 4)
    else:
        settlements.add_changes([change(1)])
    if where == "due":
        settlements.due()
    assert settlements
    settlements.forget()
    assert not settlements
    assert not settlements.due()
