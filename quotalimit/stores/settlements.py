"""What was settled on a store that waits for I/O, until it is written there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import count
from typing import Any, NamedTuple

from quotalimit.algorithms.base import Algorithm, Mark
from quotalimit.keys import Identity
from quotalimit.stores.base import Charge, Claim
from quotalimit.stores.charges import close


class SharedCharge(Charge):
    """A charge on a store that processes share.

    `epoch` tells the count in which it was taken from the one after a reset, which perhaps another process made.
    """

    def __init__(self, claim: Claim, mark: Mark, taken: int, borrowed: dict[Charge, int], epoch: int) -> None:
        super().__init__(claim.counts, claim.identity, claim.limit, mark, taken)
        self.borrow(borrowed)
        self.epoch = epoch


class Change(NamedTuple):
    """An adjustment of one count that is to be written: `delta` units at `mark`, if the count's epoch is still this."""

    counts: Any
    identity: Identity
    limit: Algorithm
    mark: Mark
    epoch: int
    delta: int


class Settlements:
    """Settlements in the order in which they came, and the changes of counts that they amount to.

    What adds to them takes no lock, since a finalizer may do so anywhere; all else is called under the store's lock.
    Each change has a serial, and stays until it is known to be written. An interrupt may come at any moment: what is
    queued is removed only once it has become a change.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Charge, int]] = deque()
        self._bare: deque[Change] = deque()
        self._changes: dict[int, Change] = {}
        self._serials = count(1)

    def __bool__(self) -> bool:
        """Whether anything is not written yet."""
        return bool(self._queue or self._bare or self._changes)

    def add(self, charge: Charge, used: int) -> None:
        """Queue a settlement."""
        self._queue.append((charge, used))

    def add_changes(self, changes: Iterable[Change]) -> None:
        """Queue changes that no charge stands for."""
        self._bare += changes

    def due(self) -> dict[int, Change]:
        """Close the charges that are queued; all changes that are not written, by their serials, the oldest first."""
        while self._queue:
            charge, used = self._queue[0]
            if charge.open:
                charge.counts.closed(charge)
                self._close(charge, used)
            del self._queue[0]
        while self._bare:
            serial = next(self._serials)
            self._changes[serial] = self._bare[0]
            del self._bare[0]
        return self._changes

    def _close(self, charge: Charge, used: int) -> None:
        if charge.borrowed and used < charge.held:  # an interrupt may keep some from being given back
            for each, delta in close(charge, used):
                self._changes[next(self._serials)] = change_of(each, delta)
            return
        serial, change = next(self._serials), change_of(charge, used - charge.held)
        if change.delta:  # no function is called from here on, so that no interrupt comes between
            self._changes[serial] = change
        charge.open = False
        charge.held = 0

    def written(self, serials: Iterable[int]) -> None:
        """Forget changes that are kept by the store now."""
        for serial in tuple(serials):
            self._changes.pop(serial, None)

    def forget(self) -> None:
        """Forget everything: after a fork, it is the parent's to write."""
        self._queue.clear()
        self._bare.clear()
        self._changes.clear()


def change_of(charge: Charge, delta: int) -> Change:
    """The change by which a charge of a shared store is adjusted."""
    assert isinstance(charge, SharedCharge)
    return Change(charge.counts, charge.identity, charge.limit, charge.mark, charge.epoch, delta)
