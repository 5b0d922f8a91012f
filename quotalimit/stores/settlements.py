"""What was settled on a store that waits for I/O, until it is written there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
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
    What was taken to be written stays known until it is `written`, or `put_back` to be written first the next time.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Charge, int]] = deque()
        self._bare: deque[Change] = deque()
        self._changes: list[Change] = []
        self._under_way = 0

    def __bool__(self) -> bool:
        """Whether anything is not written yet."""
        return bool(self._queue or self._bare or self._changes or self._under_way)

    def add(self, charge: Charge, used: int) -> None:
        """Queue a settlement."""
        self._queue.append((charge, used))

    def add_changes(self, changes: Iterable[Change]) -> None:
        """Queue changes that no charge stands for."""
        self._bare += changes

    def take(self) -> list[Change]:
        """Close the charges that are queued; all changes that are to be written now, the oldest first."""
        while self._queue:
            charge, used = self._queue.popleft()
            if charge.open:
                charge.counts.closed(charge)
                self._changes += [change_of(*adjusted) for adjusted in close(charge, used) if adjusted[1]]
        while self._bare:
            self._changes.append(self._bare.popleft())
        changes, self._changes = self._changes, []
        self._under_way += len(changes)
        return changes

    def written(self, changes: list[Change]) -> None:
        """Forget changes that are kept by the store now."""
        self._under_way -= len(changes)

    def put_back(self, changes: list[Change]) -> None:
        """Keep changes that could not be written, to be written before all others."""
        self._under_way -= len(changes)
        self._changes[:0] = changes

    def forget(self) -> None:
        """Forget everything: after a fork, it is the parent's to write."""
        self._queue.clear()
        self._bare.clear()
        self._changes.clear()
        self._under_way = 0


def change_of(charge: Charge, delta: int) -> Change:
    """The change by which a charge of a shared store is adjusted."""
    assert isinstance(charge, SharedCharge)
    return Change(charge.counts, charge.identity, charge.limit, charge.mark, charge.epoch, delta)
