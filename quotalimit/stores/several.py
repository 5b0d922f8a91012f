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
        for _, claims in turns[:-1]:
            for claim in claims:
                claim.holds = True

    def acquire(self, _claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        """Take all claims, or none of them: `Store.acquire` for several."""
        total = Total()
        try:
            for store, claims in self._turns:
                if not total.add(store, claims, store.acquire(claims, not_before=not_before, report=report)):
                    break
        except BaseException:
            total.give_back()
            raise
        return total.answer

    async def acquire_async(self, _claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        """The twin of `acquire`."""
        total = Total()
        try:
            for store, claims in self._turns:
                answer = await store.acquire_async(claims, not_before=not_before, report=report)
                if not total.add(store, claims, answer):
                    break
        except BaseException:
            total.give_back()
            raise
        return total.answer


class Total:
    """The answers of several stores to one call, as one."""

    __slots__ = ("_asked", "_taken", "answer")

    def __init__(self) -> None:
        self.answer = Answer(0)
        self._asked = 0
        self._taken: list[tuple[Store, list[Charge]]] = []

    def add(self, store: Store, claims: Sequence[Claim], answer: Answer) -> bool:
        """Add a store's answer; False if it is a refusal, which all that was taken before is given back for."""
        whole = self.answer
        whole.now = answer.now
        if answer.refusals:
            self.give_back()
            whole.refusals = {self._asked + place: refusal for place, refusal in answer.refusals.items()}
            return False
        self._taken.append((store, answer.charges))
        self._asked += len(claims)
        whole.charges += answer.charges
        whole.decisions += answer.decisions
        return True

    def give_back(self) -> None:
        """Give back what was taken."""
        for store, charges in self._taken:
            store.settle([(charge, 0) for charge in charges])
        self._taken.clear()
        self.answer.charges.clear()
        self.answer.decisions.clear()
