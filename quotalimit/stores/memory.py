"""Counts in this process's memory: the default store."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container, Hashable, Sequence
from functools import partial
from itertools import repeat, starmap
from typing import Final, TypeVar
from weakref import WeakSet

from quotalimit import clock
from quotalimit.algorithms.base import Algorithm, State
from quotalimit.decision import Decision, collectors
from quotalimit.errors import StoreFull, StoreUnavailable
from quotalimit.keys import PLAIN, Identity, Key
from quotalimit.stores.base import (
    NOTHING,
    Answer,
    Ask,
    Charge,
    Claim,
    Gate,
    Gates,
    Store,
    checked_max_keys,
    decide,
    decision,
)
from quotalimit.stores.charges import OpenCharges, close, lend, refusal_of
from quotalimit.stores.names import Owner

T = TypeVar("T")

_STRIPES: Final = 1_024
_SWEEP: Final = 4
"""Retired states looked at in each call: more than can be added, so that no sweep ever pauses a call."""
_SWEEP_WHEN_FULL: Final = 256
_WITHOUT_WAITING: Final = (False,)
"""The arguments with which the locks of one turn are asked for."""


class MemoryStore(Store):
    """Counts in memory, exact among the threads and tasks of one process. Processes share nothing.

    `max_keys` bounds the identities that one limit counts for; a limiter that is full raises `StoreFull` for a new
    one. State that no longer matters is dropped as calls come.
    """

    blocking = False
    shared = False

    def __init__(self, *, max_keys: int = 1_000_000) -> None:
        super().__init__()
        self._max_keys = checked_max_keys(max_keys)
        self._stripes = [Stripe() for _ in range(_STRIPES)]
        self._places: WeakSet[MemoryCounts] = WeakSet()
        _stores.add(self)

    def counts(self, owner: Owner, position: int, limit: Algorithm) -> MemoryCounts:
        def make() -> MemoryCounts:
            self._places.add(counts := MemoryCounts(owner.name, self._max_keys))
            return counts

        counts: MemoryCounts = self.names.find(owner, position, limit, make)
        counts.serve(limit)
        return counts

    def after_fork(self) -> None:
        """In the child of a fork: a lock that a thread of the parent held at that moment would stay taken for ever."""
        for stripe in self._stripes:
            stripe.renew_lock()
        self.names.renew_lock()
        for counts in tuple(self._places):
            counts.after_fork()

    def acquire(self, claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        stripes = self._stripes_of(claims)
        return _locked(stripes, lambda: _acquire(claims, stripes, not_before, report))

    def gate(self, counts: MemoryCounts, limit: Algorithm) -> Gate:
        stripes, standing, admit = self._stripes, self.lines.standing, limit.admit

        def admits(key: Key) -> Decision | bool:
            if type(key) not in PLAIN or collectors() or (standing and (counts, key) in standing):
                return False
            stripe = stripes[hash(key) % _STRIPES]
            if stripe.is_mine():
                return False
            with stripe.lock:
                now = clock.now()
                if stripe.late or now < stripe.latest:
                    return False
                stripe.latest = now
                before = counts.young.get(key)
                if before is None or not counts.swept_at <= now < counts.sweep_at:
                    before = counts.load(key, now)
                    if before is None:
                        counts.make_room(1)
                after = admit(before, now)
                if after is None:
                    if key in counts.open:
                        return False
                    return decision(counts.name, limit, 1, before, now, limit.fits(before, 1, now), "exhausted")
                counts.young[key] = after
                return True

        return admits

    def gates(self, asks: Sequence[Ask]) -> Gates:
        stripes, standing = self._stripes, self.lines.standing
        # As plain tuples, which are unpacked in two thirds of the time.
        wanted = [(ask.counts, ask.limit, ask.need, ask.cost, ask.holds) for ask in asks]

        def admits(keys: Sequence[Key], charges: list[Charge]) -> bool:
            if collectors() or (standing and _somebody_waits(standing, asks, keys)):
                return False
            first = keys[0]
            for key in keys:
                if key is not first:
                    return admits_apart(keys, charges)
            if type(first) not in PLAIN:
                return False
            stripe = stripes[hash(first) % _STRIPES]
            if stripe.is_mine():
                return False
            with stripe.lock:
                return _take_common(wanted, keys, (stripe,), charges)

        def admits_apart(keys: Sequence[Key], charges: list[Charge]) -> bool:
            for key in keys:
                if type(key) not in PLAIN:
                    return False
            locked = [stripes[place] for place in sorted({hash(key) % _STRIPES for key in keys})]
            return _locked(locked, lambda: _take_common(wanted, keys, locked, charges))

        return admits

    def peek(self, claims: Sequence[Claim]) -> list[Decision]:
        stripes = self._stripes_of(claims)
        return _locked(stripes, lambda: _peek(claims, stripes))

    def settle(self, settlements: Sequence[tuple[Charge, int]], *, ring: bool = True) -> None:
        for settlement in settlements:
            stripe = self._stripes[hash(settlement[0].identity) % _STRIPES]
            stripe.late.append(settlement)
            if stripe.is_mine():
                continue
            # One turn if the lock is free, none if it is taken. Unlike a call, a loop lets no interrupt come between
            # taking it and the `try`.
            for _ in filter(stripe.lock.acquire, _WITHOUT_WAITING):
                try:
                    stripe.settle(False)
                finally:
                    stripe.lock.release()
        if ring and self.lines.standing:
            for charge, _ in settlements:
                self.lines.ring(charge.counts, charge.identity)

    def reset(self, places: Sequence[tuple[MemoryCounts, Identity]]) -> None:
        for counts, identity in places:
            stripe = self._stripe(identity)
            _locked([stripe], partial(_reset, stripe, counts, identity))
            self.lines.ring(counts, identity)

    def _stripe(self, identity: Identity) -> Stripe:
        return self._stripes[hash(identity) % _STRIPES]

    def _stripes_of(self, claims: Sequence[Claim]) -> list[Stripe]:
        """The stripes of all identities, in one order for all callers."""
        identity = claims[0].identity
        for claim in claims:
            if claim.identity is not identity:
                return [self._stripes[place] for place in sorted({hash(claim.identity) % _STRIPES for claim in claims})]
        return [self._stripe(identity)]


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
        self.renew_lock()

    def renew_lock(self) -> None:
        self.lock = threading.RLock()
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
                if charge.open and not _close(charge, used, now, has_stepped_back, wait):
                    late.append(settlement)
            except Exception:  # of an algorithm: it is raised once, and not for whoever comes here later
                del late[0]
                raise
            del late[0]  # only now, for an interrupt may come at any moment


def _locked(stripes: Sequence[Stripe], do: Callable[[], T]) -> T:
    """Do something while all locks are held. Only `with` takes a lock so that no interrupt can leave it taken."""
    if stripes[0].is_mine():
        raise _reentered()
    with stripes[0].lock:
        return do() if len(stripes) == 1 else _locked(stripes[1:], do)


def _reentered() -> StoreUnavailable:
    return StoreUnavailable(
        "a finalizer or a signal handler made a limited call, or a peek or reset, while its thread was in the middle "
        "of counting another: let it only note what is to be done, and call later"
    )


def _reset(stripe: Stripe, counts: MemoryCounts, identity: Identity) -> None:
    stripe.settle()
    counts.forget(identity)


def _now(stripes: Sequence[Stripe], not_before: int = 0) -> tuple[int, bool]:
    """The time at which stripes are asked, once all is settled, and whether a state may be newer than that."""
    for stripe in stripes:
        if stripe.late:
            stripe.settle()
    now = clock.now()
    if now < not_before:
        now = not_before
    has_stepped_back = False
    for stripe in stripes:
        if now < stripe.latest:
            has_stepped_back = True
        else:
            stripe.latest = now
    return now, has_stepped_back


def _acquire(claims: Sequence[Claim], stripes: Sequence[Stripe], not_before: int, report: bool) -> Answer:
    """Take all claims, or none of them. The locks must be held."""
    now, has_stepped_back = _now(stripes, not_before)
    answer = Answer(now)
    states: list[State] = []
    new: list[int] = []
    for place, claim in enumerate(claims):
        counts, identity = claim.counts, claim.identity
        state = counts.load(identity, now)
        if state is None:
            new.append(place)
        elif has_stepped_back:
            state = counts.redate(identity, state, claim.limit, now)
        states.append(state)
        if claim.heads or claim.limit.fits(state, claim.need + claim.before, now):
            refusal = refusal_of(claim, state, now, counts.open.get(identity, ()))
            if refusal is not None:
                answer.refusals[place] = refusal
    if not answer.refusals:
        for place in new:
            if claims[place].cost or claims[place].holds:
                _make_room(claims[: place + 1], now)
        for claim, state in zip(claims, states):  # noqa: B905 - a check costs a tenth of the loop
            counts, identity, cost = claim.counts, claim.identity, claim.cost
            borrowed = lend(claim) if claim.lenders else NOTHING
            if borrowed:
                cost -= sum(borrowed.values())
            if cost or claim.holds:
                if claim.before:
                    state = counts.load(identity, now)
                after, mark = claim.limit.take(state, cost, now)
                if after is not None:
                    counts.young[identity] = state = after
                if claim.holds:
                    claim.charge = charge = Charge(counts, identity, claim.limit, mark, cost)
                    if borrowed:
                        charge.borrow(borrowed)
                    counts.open.hold(identity, charge)
                    answer.charges.append(charge)
            if report:
                answer.decisions.append(decide(claim, state, now, 0, None))
    return answer


def _somebody_waits(standing: Container[Hashable], asks: Sequence[Ask], keys: Sequence[Key]) -> bool:
    """Whether a call stands in line where common calls ask."""
    return any((ask.counts, key) in standing for ask, key in zip(asks, keys, strict=True))


def _take_common(
    asks: Sequence[tuple[MemoryCounts, Algorithm, int, int, bool]],
    keys: Sequence[Key],
    stripes: Sequence[Stripe],
    charges: list[Charge],
) -> bool:
    """Take what common calls ask for, if it all fits and nothing is special; what is held of it is added to `charges`.

    The locks must be held.
    """
    now = clock.now()
    for stripe in stripes:
        if stripe.late or now < stripe.latest:
            return False
        stripe.latest = now
    states: list[State] = []
    for key, (counts, limit, need, _, _) in zip(keys, asks):  # noqa: B905 - a check costs a tenth of the loop
        state = counts.young.get(key)
        if state is None or not counts.swept_at <= now < counts.sweep_at:
            state = counts.load(key, now)
            if state is None:
                return False
        if limit.fits(state, need, now):
            return False
        states.append(state)
    for key, state, (counts, limit, _, cost, holds) in zip(keys, states, asks):  # noqa: B905
        after, mark = limit.take(state, cost, now)
        counts.young[key] = after
        if holds:
            charge = Charge(counts, key, limit, mark, cost)
            charges.append(charge)
            counts.open.hold(key, charge)
    return True


def _make_room(claims: Sequence[Claim], now: int) -> None:
    """Check that the last of the claims, for which nothing is counted yet, may be counted. Raises `StoreFull`."""
    counts = claims[-1].counts
    new = {claim.identity for claim in claims if claim.counts is counts and counts.load(claim.identity, now) is None}
    counts.make_room(len(new))


def _peek(claims: Sequence[Claim], stripes: Sequence[Stripe]) -> list[Decision]:
    now, has_stepped_back = _now(stripes)
    decisions: list[Decision] = []
    for claim in claims:
        counts, identity = claim.counts, claim.identity
        state = counts.load(identity, now)
        if has_stepped_back and state is not None:
            state = counts.redate(identity, state, claim.limit, now)
        refusal = refusal_of(claim, state, now, counts.open.get(identity, ()))
        decisions.append(decide(claim, state, now, 0, None) if refusal is None else refusal)
    return decisions


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
        self.young: dict[Identity, State] = {}
        self._old: dict[Identity, State] = {}
        self._sweeping = False
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
        self._moving = threading.RLock()
        self._sweeping = False
        self._put_back()

    def load(self, identity: Identity, now: int) -> State:
        if not self.swept_at <= now < self.sweep_at:
            self.sweep()
        state = self.young.get(identity)
        if state is None:
            if self._moving._is_owned():  # type: ignore[attr-defined]
                raise _reentered()
            with self._moving:
                state = self._bring_back(identity)
        return state

    def _put_back(self) -> None:
        for identity, state in self._looked_at:
            self.young.setdefault(identity, state)
        self._looked_at.clear()

    def try_load(self, identity: Identity) -> tuple[bool, State]:
        """The same without waiting for anybody; False if that would be needed."""
        state = self.young.get(identity)
        if state is not None:
            return True, state
        if self._sweeping:  # by this thread, perhaps
            return False, None
        for _ in filter(self._moving.acquire, _WITHOUT_WAITING):
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
        looked_at = self._looked_at
        try:
            looked_at += starmap(self._old.popitem, repeat((), min(batch, len(self._old))))
            while looked_at:
                identity, state = looked_at[-1]
                state = limit.redate(state, now)
                if identity in self.open or limit.matters(state, now):
                    self.young.setdefault(identity, state)
                del looked_at[-1]
        finally:  # an interrupt may come at any moment: what was not looked at stays
            self._put_back()
        period = limit.period
        if not self._old and not now < self._retire_at <= now + period:
            self._old, self.young = self.young, {}
            self._retire_at = now + period
        self.swept_at = now
        self.sweep_at = now if self._old else self._retire_at


def _close(charge: Charge, used: int, now: int, has_stepped_back: bool, wait: bool) -> bool:
    """Adjust the count to what a charge's call used.

    False, with nothing done, if that would have to wait for a sweep.
    """
    counts, identity, limit = charge.counts, charge.identity, charge.limit
    before = counts.young.get(identity)
    if before is None:
        loaded, before = (True, counts.load(identity, now)) if wait else counts.try_load(identity)
        if not loaded:
            return False
    counts.open.release(identity, charge)
    state = limit.redate(before, now) if has_stepped_back else before
    if charge.borrowed:
        for lender, change in close(charge, used):
            state = limit.adjust(state, lender.mark, change, now)
    else:
        change = used - charge.held
        if change > 0:  # before the charge is closed: an interrupt between the two must not forget it
            state = limit.adjust(state, charge.mark, change, now)
            if state is not None:  # as it is where all of it was charged in a window that has passed
                counts.young[identity] = state
        charge.open, charge.held = False, 0
        if change < 0:
            state = limit.adjust(state, charge.mark, change, now)
    if state is not None:
        counts.young[identity] = state
    return True


_stores: Final[WeakSet[MemoryStore]] = WeakSet()


def _after_fork() -> None:
    for store in tuple(_stores):
        store.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
