"""Locks for the counts in memory, and settlements that came while these were taken."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

from quotalimit import clock
from quotalimit.keys import Identity
from quotalimit.stores.base import Charge, reentered

T = TypeVar("T")

STRIPES: Final = 1_024
"""How many there are: enough to behave like a lock for each identity."""


class Stripe:
    """A lock for the identities that fall on it, and the settlements that came while it was taken.

    A finalizer or a signal handler may run anywhere, even in the thread that holds the lock, in the middle of what it
    does. So settling never waits for the lock: whoever takes it next settles what is late before anything else. And
    nothing else is done if the lock is this thread's already. `latest` is the latest time at which anything was
    counted: from then on, no state needs to be re-dated.
    """

    __slots__ = ("is_mine", "late", "latest", "lock")

    def __init__(self) -> None:
        self.late: list[tuple[Charge, int]] = []
        self.latest = 0
        self.lock: Final = threading.RLock()
        self.is_mine: Callable[[], bool] = self.lock._is_owned  # type: ignore[attr-defined]

    def settle(self, wait: bool = True) -> None:
        """Close the charges in `late`, if need be at a later time. The lock must be held."""
        now = clock.now()
        has_stepped_back = now < self.latest
        if not has_stepped_back:
            self.latest = now
        late = self.late
        for _ in range(len(late)):
            charge, used = settlement = late[0]
            try:
                if charge.open and not charge.counts.close(charge, used, now, has_stepped_back, wait):
                    late.append(settlement)
            except Exception:  # of an algorithm: it is raised once, and not for whoever comes here later
                del late[0]
                raise
            del late[0]  # only now, for an interrupt may come at any moment


def if_free(lock: Any) -> Iterable[object]:
    """One turn of a loop, with a lock taken, if that is free; none if it is not.

    Unlike a call, a loop lets no interrupt come between taking the lock and the `try` that gives it back.
    """
    return filter(lock.acquire, _WITHOUT_WAITING)


_WITHOUT_WAITING: Final = (False,)
"""The arguments with which the lock of one turn is asked for."""


def stripes_of(stripes: Sequence[Stripe], identities: Iterable[Identity]) -> list[Stripe]:
    """Those of some identities, each once, in one order for all callers."""
    return [stripes[place] for place in sorted({hash(identity) % STRIPES for identity in identities})]


def locked(stripes: Sequence[Stripe], do: Callable[[], T]) -> T:
    """Do something while all locks are held. Only `with` takes a lock so that no interrupt can leave it taken."""
    if stripes[0].is_mine():
        raise reentered()
    with stripes[0].lock:
        return do() if len(stripes) == 1 else locked(stripes[1:], do)
