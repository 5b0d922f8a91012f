"""Several stores asked as one: in order, giving back what was taken if a later one refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from quotalimit.stores.base import Answer, Charge, Claim, Store

Turn: TypeAlias = tuple[Store, Sequence[Claim]]
"""A store, and what it is asked for."""


class Several:
    """Stores on which the layers of one function are, each asked in its turn.

    Claims and answers are in the order of the turns. Every claim but those of the last store is made to hold, so that
    it can be given back. What one store took is held while the next is asked, never while the call waits.
    """

    def __init__(self, turns: Sequence[Turn]) -> None:
        self._turns = turns
        self.lines = turns[0][0].lines
        self.blocking = any(store.blocking for store, _ in turns)
        self._provisional = {claim for _, claims in turns[:-1] for claim in claims if not claim.holds}
        for claim in self._provisional:
            claim.holds = True

    def settle(self, settlements: Sequence[tuple[Charge, int]]) -> None:
        """Close charges, each on its store: `Store.settle` for several."""
        for store, claims in self._turns:
            places = {claim.counts for claim in claims}
            store.settle([settlement for settlement in settlements if settlement[0].counts in places])

    def acquire(self, _claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        """Take all claims, or none of them: `Store.acquire` for several."""
        total = Total(self._provisional)
        try:
            for store, claims in self._turns:
                if not total.add(store, claims, store.acquire(claims, not_before=not_before, report=report)):
                    break
        except BaseException:
            total.give_back()
            raise
        return total.whole()

    async def acquire_async(self, _claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        """The twin of `acquire`."""
        total = Total(self._provisional)
        try:
            for store, claims in self._turns:
                answer = await store.acquire_async(claims, not_before=not_before, report=report)
                if not total.add(store, claims, answer):
                    break
        except BaseException:
            total.give_back()
            raise
        return total.whole()


class Total:
    """The answers of several stores to one call, as one."""

    __slots__ = ("_answer", "_asked", "_provisional", "_taken")

    def __init__(self, provisional: set[Claim]) -> None:
        self._answer = Answer(0)
        self._asked = 0
        self._provisional = provisional
        self._taken: list[tuple[Store, Sequence[Claim], list[Charge]]] = []

    def add(self, store: Store, claims: Sequence[Claim], answer: Answer) -> bool:
        """Add a store's answer; False if it is a refusal, which all that was taken before is given back for."""
        whole = self._answer
        whole.now = answer.now
        if answer.refusals:
            self.give_back()
            whole.refusals = {self._asked + place: refusal for place, refusal in answer.refusals.items()}
            return False
        self._taken.append((store, claims, answer.charges))
        self._asked += len(claims)
        whole.decisions += answer.decisions
        return True

    def whole(self) -> Answer:
        """The answer, with the charges that are held on; those that were only held until here are settled."""
        for store, claims, charges in self._taken:
            for claim, charge in zip([claim for claim in claims if claim.holds], charges, strict=True):
                if claim in self._provisional:
                    store.settle([(charge, claim.cost)])
                else:
                    self._answer.charges.append(charge)
        return self._answer

    def give_back(self) -> None:
        """Give back what was taken. Who stands at the head of a line is not woken by what it gives back itself."""
        for store, claims, charges in self._taken:
            store.settle([(charge, 0) for charge in charges], ring=any(claim.heads for claim in claims))
        self._taken.clear()
        self._answer.decisions.clear()
