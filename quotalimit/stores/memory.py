"""Counts in this process's memory: the default store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final
from weakref import WeakSet

from quotalimit import clock
from quotalimit._forks import in_child, let_go
from quotalimit.algorithms.base import Algorithm, State
from quotalimit.decision import Decision
from quotalimit.keys import Identity
from quotalimit.stores.base import (
    NOTHING,
    Answer,
    Charge,
    Claim,
    CommonClaim,
    Gate,
    Gates,
    Store,
    checked_max_keys,
    decide,
)
from quotalimit.stores.charges import lend, refusal_of
from quotalimit.stores.memory_counts import MemoryCounts
from quotalimit.stores.memory_gates import gate_of_one, gate_of_several
from quotalimit.stores.names import Owner
from quotalimit.stores.stripes import STRIPES, Stripe, if_free, locked, stripes_of


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
        self._stripes = [Stripe() for _ in range(STRIPES)]
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
        """In the child of a fork."""
        for stripe in self._stripes:
            let_go(stripe.lock)
        self.names.after_fork()
        for counts in tuple(self._places):
            counts.after_fork()

    def acquire(self, claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        stripes = self._stripes_of(claims)
        return locked(stripes, lambda: _acquire(claims, stripes, not_before, report))

    def gate(self, counts: MemoryCounts, limit: Algorithm) -> Gate:
        return gate_of_one(self._stripes, self.lines.standing, counts, limit)

    def gates(self, asks: Sequence[CommonClaim]) -> Gates:
        return gate_of_several(self._stripes, self.lines.standing, asks)

    def peek(self, claims: Sequence[Claim]) -> list[Decision]:
        stripes = self._stripes_of(claims)
        return locked(stripes, lambda: _peek(claims, stripes))

    def settle(self, settlements: Sequence[tuple[Charge, int]], *, ring: bool = True) -> None:
        for settlement in settlements:
            stripe = self._stripes[hash(settlement[0].identity) % STRIPES]
            stripe.late.append(settlement)
            if stripe.is_mine():
                continue
            for _ in if_free(stripe.lock):
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
            locked([stripe], partial(_reset, stripe, counts, identity))
            self.lines.ring(counts, identity)

    def _stripe(self, identity: Identity) -> Stripe:
        return self._stripes[hash(identity) % STRIPES]

    def _stripes_of(self, claims: Sequence[Claim]) -> list[Stripe]:
        """The stripes of all identities, in one order for all callers."""
        identity = claims[0].identity
        for claim in claims:
            if claim.identity is not identity:
                return stripes_of(self._stripes, [claim.identity for claim in claims])
        return [self._stripe(identity)]


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
            refusal = refusal_of(claim, state, now, counts.open.of(identity))
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
        refusal = refusal_of(claim, state, now, counts.open.of(identity))
        decisions.append(decide(claim, state, now, 0, None) if refusal is None else refusal)
    return decisions


_stores: Final[WeakSet[MemoryStore]] = WeakSet()


def _after_fork() -> None:
    for store in tuple(_stores):
        store.after_fork()


in_child(_after_fork)
