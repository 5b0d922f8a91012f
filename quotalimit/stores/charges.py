"""What every store does alike with the claims and charges of its process: judging, lending and closing them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from copy import copy

from quotalimit.algorithms.base import NEVER, Algorithm, State
from quotalimit.decision import Decision, Reason
from quotalimit.keys import Identity
from quotalimit.stores.base import Charge, Claim, decide


class OpenCharges(dict[Identity, Charge | set[Charge]]):
    """The charges that are open on the counts of a limit, by identity. One by itself, as mostly, is in no set."""

    def of(self, identity: Identity) -> Collection[Charge]:
        """The open charges of an identity."""
        charges = self.get(identity)
        if charges is None:
            return ()
        return charges if isinstance(charges, set) else (charges,)

    def all(self) -> list[Charge]:
        """The open charges of everybody."""
        return [charge for identity in tuple(self) for charge in tuple(self.of(identity))]  # others may be at work

    def hold(self, identity: Identity, charge: Charge) -> None:
        """Note that a charge is open."""
        charges = self.setdefault(identity, charge)
        if isinstance(charges, set):
            charges.add(charge)
        elif charges is not charge:
            self[identity] = {charges, charge}

    def release(self, identity: Identity, charge: Charge) -> None:
        """Note that a charge is open no longer."""
        charges = self.get(identity)
        if charges is charge:
            del self[identity]
        elif isinstance(charges, set):
            charges.discard(charge)
            if not charges:
                del self[identity]

    def forget(self, identity: Identity) -> None:
        """Close the charges of an identity: their settlements will do nothing."""
        for charge in self.of(identity):
            charge.open = False
            charge.held = 0
        self.pop(identity, None)


def needed(claim: Claim) -> int:
    """The units that must fit: those that earlier claims of the call take, too, less what its lenders hold."""
    return _less_held(claim, claim.need + claim.before)


def taken(claim: Claim) -> int:
    """The units that the count is charged for a claim and for earlier ones of the call."""
    return _less_held(claim, claim.cost + claim.before)


def _less_held(claim: Claim, units: int) -> int:
    """What of the units is left when the lenders have given what they hold."""
    if claim.lenders:
        units -= min(units, sum(lender.held for lender in claim.lenders))
    return units


def refusal_of(claim: Claim, state: State, now: int, charges: Iterable[Charge] = ()) -> Decision | None:
    """The refusal of a claim that does not fit; None for one that does. `charges` are the open ones on its count."""
    need = needed(claim)
    if need == 0 and claim.lenders:
        return None
    limit = claim.limit
    wait = limit.fits(state, need, now)
    reason: Reason = "exhausted"
    if wait == 0:
        wait = _delay(claim, state, need, now) if claim.heads else 0
        if wait == 0:
            return None
    elif wait >= NEVER:
        return decide(claim, state, now, None, "too_large")
    else:
        if claim.ahead:
            wait = max(wait, limit.fits(state, min(need + claim.ahead, limit.capacity), now))
        if charges and _fits_without(charges, limit, state, need, now):
            reason = "busy"
    return decide(claim, state, now, wait, reason)


def lend(claim: Claim) -> dict[Charge, int]:
    """Take the claim's cost from its lenders, nearest first, as far as they go; what each of them lent."""
    borrowed: dict[Charge, int] = {}
    cost = claim.cost
    for lender in claim.lenders:
        lent = min(cost, lender.held)
        if lent:
            lender.held -= lent
            cost -= lent
            borrowed[lender] = lent
    return borrowed


def close(charge: Charge, used: int) -> list[tuple[Charge, int]]:
    """Close a charge at the units that were used; at which charges' marks the count is then to be adjusted.

    Of what is left, the lenders get theirs back first.
    """
    charge.open = False
    over, charge.held = used - charge.held, 0
    return [(charge, over)] if over > 0 else give_back(charge, -over)


def give_back(charge: Charge, units: int) -> list[tuple[Charge, int]]:
    """Return units to whom a charge borrowed from, as far as they still run; the adjustments for the rest.

    Where calls begin one another, and end before those that they began, who borrowed from whom is a long chain.
    """
    changes: list[tuple[Charge, int]] = []
    todo = [(charge, units)]
    while todo:
        charge, units = todo.pop()
        if charge.open:
            charge.held += units
            continue
        returned: list[tuple[Charge, int]] = []
        for lender, lent in list(charge.borrowed.items()):
            if not units:
                break
            back = min(lent, units)
            units -= back
            returned.append((lender, back))
            if back == lent:
                del charge.borrowed[lender]  # it need not be kept for this any longer
            else:
                charge.borrowed[lender] -= back
        todo += reversed(returned)
        if units:
            changes.append((charge, -units))
    return changes


def unused(charges: Iterable[Charge]) -> list[tuple[Charge, int]]:
    """The adjustments of the count if every open charge came to use nothing."""
    changes: list[tuple[Charge, int]] = []
    for charge in charges:
        changes.append((charge, -charge.taken))
        changes += [(lender, -units) for lender, units in charge.borrowed.items() if not lender.open]
    return changes


def _delay(claim: Claim, state: State, need: int, now: int) -> int:
    """How long a claim that fits must wait all the same, not to delay the waiting calls in front of it."""
    limit = claim.limit
    for head_need, due in claim.heads:
        start = max(now, due)
        after, _ = limit.take(copy(state), taken(claim), now)
        if limit.fits(after, head_need, start):
            wait = limit.fits(state, min(need + claim.ahead, limit.capacity), now)
            return max(wait, start - now, 1)
    return 0


def _fits_without(charges: Iterable[Charge], limit: Algorithm, state: State, need: int, now: int) -> bool:
    """Whether the need would fit if every open charge came to use nothing."""
    state = copy(state)
    for charge, change in unused(charges):
        state = limit.adjust(state, charge.mark, change, now)
    return limit.fits(state, need, now) == 0
