"""Counts in this process's memory: the default store."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from quotalimit import clock
from quotalimit.algorithms.base import Algorithm, State
from quotalimit.decision import Decision
from quotalimit.errors import StoreFull
from quotalimit.keys import Identity
from quotalimit.stores.base import Answer, Charge, Claim, Store, decide
from quotalimit.stores.charges import close, lend, refusal_of
from quotalimit.stores.names import Owner

_STRIPES: Final = 1_024
_SWEEP: Final = 4
"""Retired states looked at in each call: more than can be added, so that no sweep ever pauses a call."""
_SWEEP_WHEN_FULL: Final = 256


class MemoryStore(Store):
    """Counts in memory, exact among the threads and tasks of one process. Processes share nothing.

    `max_keys` bounds the identities that one limit counts for; a limiter that is full raises `StoreFull` for a new
    one. State that no longer matters is dropped as calls come.
    """

    blocking = False
    shared = False

    def __init__(self, *, max_keys: int = 1_000_000) -> None:
        super().__init__()
        if type(max_keys) is not int or max_keys < 1:
            raise ValueError(f"max_keys must be a positive whole number, not {max_keys!r}")
        self._max_keys = max_keys
        self._stripes = [Stripe() for _ in range(_STRIPES)]

    def counts(self, owner: Owner, position: int, limit: Algorithm) -> MemoryCounts:
        counts: MemoryCounts = self.names.find(owner, position, limit, lambda: MemoryCounts(owner.name, self._max_keys))
        counts.serve(limit)
        return counts

    def acquire(self, claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        stripes = self._lock(claims)
        try:
            now = max(clock.now(), not_before)
            answer = Answer(now)
            states = [self._ask(claim, place, now, answer) for place, claim in enumerate(claims)]
            if not answer.refusals:
                for claim, state in zip(claims, states, strict=True):
                    self._take(claim, state, now, answer, report)
            return answer
        finally:
            _unlock(stripes)

    def admits(self, counts: MemoryCounts, identity: Identity, limit: Algorithm) -> bool:
        if self.lines and self.lines.stands_at(counts, identity):
            return False
        stripe = self._stripes[hash(identity) % _STRIPES]
        with stripe.lock:
            if stripe.late:
                stripe.settle()
            now = clock.now()
            state = counts.load(identity, now)
            if state is None:
                counts.make_room(now, 1)
            else:
                state = limit.redate(state, now)
            if limit.fits(state, 1, now):
                return False
            counts.save(identity, limit.take(state, 1, now)[0])
            return True

    def peek(self, claims: Sequence[Claim]) -> list[Decision]:
        stripes = self._lock(claims)
        try:
            now = clock.now()
            answer = Answer(now)
            for place, claim in enumerate(claims):
                state = self._ask(claim, place, now, answer)
                refusal = answer.refusals.get(place)
                answer.decisions.append(decide(claim, state, now, 0, None) if refusal is None else refusal)
            return answer.decisions
        finally:
            _unlock(stripes)

    def settle(self, settlements: Sequence[tuple[Charge, int]]) -> None:
        for charge, used in settlements:
            stripe = self._stripe(charge.identity)
            stripe.late.append((charge, used))
            if stripe.lock.acquire(blocking=False):
                try:
                    stripe.settle(wait=False)
                finally:
                    stripe.lock.release()
        if self.lines:
            for charge, _ in settlements:
                self.lines.ring(charge.counts, charge.identity)

    def reset(self, places: Sequence[tuple[MemoryCounts, Identity]]) -> None:
        for counts, identity in places:
            stripe = self._stripe(identity)
            with stripe.lock:
                stripe.settle()
                counts.forget(identity)
            self.lines.ring(counts, identity)

    def _stripe(self, identity: Identity) -> Stripe:
        return self._stripes[hash(identity) % _STRIPES]

    def _lock(self, claims: Sequence[Claim]) -> list[Stripe]:
        """Lock the stripes of all identities, in one order for all callers."""
        if len(claims) == 1:
            locked = [self._stripe(claims[0].identity)]
        else:
            places = sorted({hash(claim.identity) % _STRIPES for claim in claims})
            locked = [self._stripes[place] for place in places]
        held: list[Stripe] = []
        try:
            for stripe in locked:
                stripe.lock.acquire()
                held.append(stripe)
                if stripe.late:
                    stripe.settle()
        except BaseException:
            _unlock(held)
            raise
        return locked

    def _ask(self, claim: Claim, place: int, now: int, answer: Answer) -> State:
        """The claim's state, as of now; adds a refusal to the answer if the claim does not fit."""
        limit = claim.limit
        state = claim.counts.load(claim.identity, now)
        if state is not None:
            dated = limit.redate(state, now)
            if dated is not state:
                claim.counts.save(claim.identity, dated)
                state = dated
        elif claim.cost or claim.holds:
            answer.new.add((claim.counts, claim.identity))
            claim.counts.make_room(now, sum(counts is claim.counts for counts, _ in answer.new))
        refusal = refusal_of(claim, state, now, claim.counts.open.get(claim.identity, ()))
        if refusal is not None:
            answer.refusals[place] = refusal
        return state

    def _take(self, claim: Claim, state: State, now: int, answer: Answer, report: bool) -> None:
        counts, cost = claim.counts, claim.cost
        borrowed = lend(claim) if claim.lenders else {}
        cost -= sum(borrowed.values())
        if cost or claim.holds:
            if claim.before:
                state = counts.load(claim.identity, now)
            state, mark = claim.limit.take(state, cost, now)
            if state is not None:
                counts.save(claim.identity, state)
            if claim.holds:
                charge = Charge(claim, mark, cost, borrowed)
                counts.open.setdefault(claim.identity, set()).add(charge)
                answer.charges.append(charge)
        if report:
            answer.decisions.append(decide(claim, state, now, 0, None))


class Stripe:
    """A lock for the identities that fall on it, and the settlements that came while it was taken.

    A finalizer may settle anywhere, even in the thread that holds the lock: so settling never waits for it. Whoever
    takes the lock next settles what is late before anything else.
    """

    __slots__ = ("late", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.late: list[tuple[Charge, int]] = []

    def settle(self, *, wait: bool = True) -> None:
        """Close the charges in `late`, if need be at a later time. The lock must be held."""
        for _ in range(len(self.late)):
            charge, used = self.late.pop(0)
            if charge.open and not _close(charge, used, wait):
                self.late.append((charge, used))


class MemoryCounts:
    """The counts of one limit, one for each identity, in two generations.

    States are used in `_young`. Once a period at most, it retires to `_old`; there each call looks at a few states
    and drops those that no longer matter, so that no thread and no long pause is needed. A state that is used moves
    back. A caller holds the lock of its identity's stripe; `_moving` guards what moves between the generations.
    """

    __slots__ = (
        "_max_keys",
        "_moving",
        "_old",
        "_retire_at",
        "_slowest",
        "_sweep_at",
        "_swept_at",
        "_young",
        "name",
        "open",
    )

    def __init__(self, name: str, max_keys: int) -> None:
        self.name = name
        self.open: dict[Identity, set[Charge]] = {}
        self._slowest: Algorithm | None = None
        self._max_keys = max_keys
        self._young: dict[Identity, State] = {}
        self._old: dict[Identity, State] = {}
        self._moving = threading.Lock()
        self._retire_at = 0
        self._sweep_at = 0
        self._swept_at = 0

    def serve(self, limit: Algorithm) -> None:
        """Count for this limit too: limits of other amounts may share the counts, and the lowest clears last."""
        with self._moving:
            if self._slowest is None or limit.rate.amount < self._slowest.rate.amount:
                self._slowest = limit

    def load(self, identity: Identity, now: int) -> State:
        if not self._swept_at <= now < self._sweep_at:
            self._sweep(now, _SWEEP)
        state = self._young.get(identity)
        if state is None:
            with self._moving:
                state = self._bring_back(identity)
        return state

    def try_load(self, identity: Identity) -> tuple[bool, State]:
        """The same without waiting for a sweep; False if that would be needed."""
        state = self._young.get(identity)
        if state is not None:
            return True, state
        if not self._moving.acquire(blocking=False):
            return False, None
        try:
            return True, self._bring_back(identity)
        finally:
            self._moving.release()

    def _bring_back(self, identity: Identity) -> State:
        state = self._old.pop(identity, None)
        return self._young.get(identity) if state is None else self._young.setdefault(identity, state)

    def save(self, identity: Identity, state: State) -> None:
        self._young[identity] = state

    def forget(self, identity: Identity) -> None:
        """Drop an identity's state and close its charges."""
        for charge in self.open.pop(identity, ()):
            charge.open = False
            charge.held = 0
        with self._moving:
            self._old.pop(identity, None)
            self._young.pop(identity, None)

    def make_room(self, now: int, new: int) -> None:
        """Check that so many new identities may be counted. Raises `StoreFull`."""
        most = self._max_keys - new
        if len(self) <= most:
            return
        if not self._old:
            self._retire_at = 0
        self._sweep(now, _SWEEP_WHEN_FULL)
        self._sweep(now, _SWEEP_WHEN_FULL)
        if len(self) > most:
            raise StoreFull(
                f"{self.name}: already counting for {self._max_keys} identities, so a new one is refused: "
                "raise max_keys of the MemoryStore, or limit by a coarser key in front"
            )

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def _sweep(self, now: int, batch: int) -> None:
        limit = self._slowest
        if limit is None or not self._moving.acquire(blocking=False):
            return
        try:
            for _ in range(min(batch, len(self._old))):
                identity, state = self._old.popitem()
                state = limit.redate(state, now)
                if identity in self.open or limit.matters(state, now):
                    self._young.setdefault(identity, state)
            period = limit.period
            if not self._old and not now < self._retire_at <= now + period:
                self._old, self._young = self._young, {}
                self._retire_at = now + period
            self._swept_at = now
            self._sweep_at = now if self._old else self._retire_at
        finally:
            self._moving.release()


def _unlock(stripes: list[Stripe]) -> None:
    for stripe in stripes:
        stripe.lock.release()


def _close(charge: Charge, used: int, wait: bool) -> bool:
    """Adjust the count to what a charge's call used.

    False, with nothing done, if that would have to wait for a sweep.
    """
    counts, identity, now = charge.counts, charge.identity, clock.now()
    loaded, state = (True, counts.load(identity, now)) if wait else counts.try_load(identity)
    if not loaded:
        return False
    charges = counts.open.get(identity)
    if charges is not None:
        charges.discard(charge)
        if not charges:
            del counts.open[identity]
    if state is not None:
        state = charge.limit.redate(state, now)
    for lender, change in close(charge, used):
        state = charge.limit.adjust(state, lender.mark, change, now)
    if state is not None:
        counts.save(identity, state)
    return True
