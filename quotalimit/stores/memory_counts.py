"""The counts of one limit in memory, in two generations: what is idle is dropped as calls come."""

from __future__ import annotations

import threading
from itertools import repeat, starmap
from typing import Final, TypeAlias

from quotalimit import clock
from quotalimit._forks import let_go
from quotalimit.algorithms.base import Algorithm, State
from quotalimit.errors import StoreFull
from quotalimit.keys import Identity
from quotalimit.stores.base import Charge, reentered
from quotalimit.stores.charges import OpenCharges, close
from quotalimit.stores.sharded_dict import ShardedDict
from quotalimit.stores.stripes import if_free

_SWEEP: Final = 4
"""Retired states looked at in each call: more than can be added, so that no sweep ever pauses a call."""
_SWEEP_WHEN_FULL: Final = 256
_MANY: Final = 1 << 16
"""States of which a dict grows, and is freed, in less than a millisecond."""

States: TypeAlias = "dict[Identity, State] | ShardedDict[Identity, State]"


class MemoryCounts:
    """The counts of one limit, one for each identity, in two generations.

    States are used in `young`. Once a period at most, it retires to `_old`; there each call looks at a few states
    and drops those that no longer matter, so that no thread and no long pause is needed. A state that is used moves
    back. A caller holds the lock of its identity's stripe; `_moving` guards what moves between the generations, and
    is re-entrant for the reason that the stripes' locks are.
    """

    __slots__ = (
        "__weakref__",
        "_looked_at",
        "_max_keys",
        "_moving",
        "_old",
        "_retire_at",
        "_slowest",
        "_sweeping",
        "name",
        "open",
        "sweep_at",
        "swept_at",
        "young",
    )

    def __init__(self, name: str, max_keys: int) -> None:
        self.name = name
        self.open = OpenCharges()
        self._slowest: Algorithm | None = None
        self._max_keys = max_keys
        self._moving = threading.RLock()
        self._sweeping = False
        self._looked_at: list[tuple[Identity, State]] = []
        """Retired states on their way to `young`, or out."""
        self.young: States = {}
        self._old: States = {}
        self._retire_at = 0
        self.sweep_at = 0
        self.swept_at = 0

    def serve(self, limit: Algorithm) -> None:
        """Count for this limit too: limits of other amounts may share the counts, and the lowest clears last."""
        with self._moving:
            if self._slowest is None or limit.rate.amount < self._slowest.rate.amount:
                self._slowest = limit

    def after_fork(self) -> None:
        """In the child of a fork, where the sweeps of the parent's other threads will never end."""
        let_go(self._moving)
        self._sweeping = False
        self._put_back()

    def load(self, identity: Identity, now: int) -> State:
        if not self.swept_at <= now < self.sweep_at:
            self.sweep()
        state = self.young.get(identity)
        if state is None:
            if self._moving._is_owned():  # type: ignore[attr-defined]
                raise reentered()
            with self._moving:
                state = self._bring_back(identity)
        return state

    def try_load(self, identity: Identity) -> tuple[bool, State]:
        """The state as `load` finds it, without waiting for anybody; False if that would be needed."""
        state = self.young.get(identity)
        if state is not None:
            return True, state
        if self._sweeping:  # by this thread, perhaps
            return False, None
        for _ in if_free(self._moving):
            try:
                return True, self._bring_back(identity)
            finally:
                self._moving.release()
        return False, None

    def _bring_back(self, identity: Identity) -> State:
        state = self._old.get(identity)
        if state is None:
            return self.young.get(identity)
        state = self.young.setdefault(identity, state)
        del self._old[identity]  # only now, for an interrupt may come at any moment
        return state

    def _put_back(self) -> None:
        for identity, state in self._looked_at:
            self.young.setdefault(identity, state)
        self._looked_at.clear()

    def redate(self, identity: Identity, state: State, limit: Algorithm, now: int) -> State:
        """A state as of now, and kept so."""
        dated = limit.redate(state, now)
        if dated is not state:
            self.young[identity] = dated
        return dated

    def forget(self, identity: Identity) -> None:
        """Drop an identity's state and close its charges."""
        self.open.forget(identity)
        with self._moving:
            self._old.pop(identity, None)
            self.young.pop(identity, None)

    def make_room(self, new: int) -> None:
        """Check that so many new identities may be counted. Raises `StoreFull`."""
        if isinstance(self.young, dict) and len(self.young) > _MANY:
            self._retire_at = 0
            self.sweep()
        most = self._max_keys - new
        if len(self) <= most:
            return
        if not self._old:
            self._retire_at = 0
        self.sweep(_SWEEP_WHEN_FULL)
        self.sweep(_SWEEP_WHEN_FULL)
        if len(self) > most:
            raise StoreFull(
                f"{self.name}: already counting for {self._max_keys} identities, so a new one is refused: "
                "raise max_keys of the MemoryStore, or limit by a coarser key in front"
            )

    def __len__(self) -> int:
        return len(self.young) + len(self._old)

    def sweep(self, batch: int = _SWEEP) -> None:
        """Look at some retired states and drop those that no longer matter; retire all others once a period."""
        limit = self._slowest
        if limit is None or self._sweeping:
            return
        with self._moving:
            self._sweeping = True
            try:
                self._sweep(limit, batch)
            finally:
                self._sweeping = False

    def _sweep(self, limit: Algorithm, batch: int) -> None:
        now = clock.now()  # late: what was charged while this thread was not running is not of the future
        if self._old:
            self._look_at_old(limit, batch, now)
            if not self._old:
                self._old = {}  # for one that was emptied keeps its memory
        period = limit.period
        if not self._old and not now < self._retire_at <= now + period:
            if not self._are_few_and_used(limit, now):
                self._old, self.young = self.young, ShardedDict() if len(self.young) > _MANY // 2 else {}
            self._retire_at = now + period
        self.swept_at = now
        self.sweep_at = now if self._old else self._retire_at

    def _look_at_old(self, limit: Algorithm, batch: int, now: int) -> None:
        looked_at = self._looked_at
        old = self._old if isinstance(self._old, dict) else self._old.some()
        try:
            looked_at += starmap(old.popitem, repeat((), min(batch, len(old))))
            while looked_at:
                identity, state = looked_at[-1]
                state = limit.redate(state, now)
                if identity in self.open or limit.matters(state, now):
                    self.young.setdefault(identity, state)
                del looked_at[-1]
        finally:  # an interrupt may come at any moment: what was not looked at stays
            self._put_back()

    def _are_few_and_used(self, limit: Algorithm, now: int) -> bool:
        """Whether the young may as well stay: they would be looked at in the next call, and kept."""
        if not isinstance(self.young, dict) or len(self.young) > _SWEEP:
            return False
        for state in [*self.young.values()]:
            if limit.redate(state, now) is not state or not limit.matters(state, now):
                return False
        return True

    def close(self, charge: Charge, used: int, now: int, has_stepped_back: bool, wait: bool) -> bool:
        """Adjust the count to what a charge's call used.

        False, with nothing done, if that would have to wait for a sweep.
        """
        identity, limit = charge.identity, charge.limit
        before = self.young.get(identity)
        if before is None:
            loaded, before = (True, self.load(identity, now)) if wait else self.try_load(identity)
            if not loaded:
                return False
        self.open.release(identity, charge)
        state = limit.redate(before, now) if has_stepped_back else before
        if charge.borrowed:
            for lender, change in close(charge, used):
                state = limit.adjust(state, lender.mark, change, now)
        else:
            change = used - charge.held
            if change > 0:  # before the charge is closed: an interrupt between the two must not forget it
                state = limit.adjust(state, charge.mark, change, now)
                if state is not None:  # as it is where all of it was charged in a window that has passed
                    self.young[identity] = state
            charge.open, charge.held = False, 0
            if change < 0:
                state = limit.adjust(state, charge.mark, change, now)
        if state is not None:
            self.young[identity] = state
        return True
