"""A guard: all layers of one function, asked together, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quotalimit._arguments import compile_questions
from quotalimit._calls import Call, Part, lenders
from quotalimit._layers import Layer
from quotalimit._waiting import acquire, acquire_async
from quotalimit.decision import Decision, collector
from quotalimit.errors import LimitExceeded
from quotalimit.keys import Key
from quotalimit.limiters import report
from quotalimit.stores.base import Answer, Charge, Claim, Store
from quotalimit.usage import running


class Guard:
    """The layers of one function, the outermost first, and the questions that they ask of a call."""

    def __init__(self, function: Callable[..., Any], layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.holds = any(layer.holds for layer in layers)
        self.patient = any(layer.patience for layer in layers)
        self.blocks = False
        self._answer = compile_questions(function, [q for layer in layers for q in layer.questions.values()])

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Admit a call, or raise `LimitExceeded`. Returns it if something of it is to be settled."""
        return admit(Asked(self.layers, self._answer(*args, **kwargs), (args, kwargs)))

    async def enter_async(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The twin of `enter`."""
        return await admit_async(Asked(self.layers, self._answer(*args, **kwargs), (args, kwargs)))

    def enter_unless_it_must_wait(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Call | None]:
        """Admit a call now, if that needs no waiting; else say so, having charged nothing."""
        asked = Asked(self.layers, self._answer(*args, **kwargs), (args, kwargs))
        try:
            return True, admit(asked, patient=False)
        except LimitExceeded:
            if not self.patient:
                raise
            return False, None


class Turn:
    """The claims of a call on one store, asked together."""

    __slots__ = ("claims", "owners", "patience", "store")

    def __init__(self, store: Store) -> None:
        self.store = store
        self.claims: list[Claim] = []
        self.patience: list[int] = []
        self.owners: list[int] = []
        """The place of each claim's layer."""


class Asked:
    """One call with all its keys and costs computed, before any store is asked."""

    __slots__ = ("_arguments", "_enclosing", "_keys", "_layers", "_parts", "_provisional", "decisions", "turns")

    def __init__(self, layers: Sequence[Layer], answers: Sequence[Any], arguments: object) -> None:
        self._layers = layers
        self._arguments = arguments
        self._enclosing = enclosing = running()
        self._keys: list[Key] = []
        self._parts: dict[int, Part] = {}
        self._provisional: list[tuple[Store, Charge]] = []
        self.decisions: list[Decision] = []
        self.turns: list[Turn] = []
        rest = iter(answers)
        for number, layer in enumerate(layers):
            key, identity, places, need, cost = layer.read(rest)
            self._keys.append(key)
            if not places:
                continue
            store = layer.limiter.bound().store
            turn = self._turn(store)
            if layer.holds:
                self._parts[number] = Part(layer, store, cost)
            for counts, limit in places:
                claim = Claim(counts, identity, limit, need, cost, layer.holds)
                if enclosing is not None:
                    claim.lenders = lenders(enclosing, counts, identity)
                claim.before = sum(
                    other.cost for other in turn.claims if other.counts is counts and other.identity == identity
                )
                turn.claims.append(claim)
                turn.patience.append(layer.patience)
                turn.owners.append(number)
        for turn in self.turns[:-1]:
            for claim in turn.claims:  # held until the last store has admitted the call too
                claim.holds = True

    def _turn(self, store: Store) -> Turn:
        for turn in self.turns:
            if turn.store is store:
                return turn
        self.turns.append(Turn(store))
        return self.turns[-1]

    def hear(self, turn: Turn, answer: Answer) -> None:
        """Take a store's answer. A refusal gives back what other stores have admitted, and raises."""
        if answer.refusals:
            self._give_back()
            raise self._refusal(turn, answer)
        self.decisions += answer.decisions
        charges = iter(answer.charges)
        for claim, number in zip(turn.claims, turn.owners, strict=True):
            part = self._parts.get(number)
            if claim.holds:
                charge = next(charges)
                if part is None:
                    self._provisional.append((turn.store, charge))
                else:
                    part.charges.append(charge)
        for number, decision in zip(turn.owners, answer.decisions, strict=False):
            if number in self._parts:
                self._parts[number].decisions.append(decision)

    def admitted(self) -> Call | None:
        """The call, if something of it is to be settled."""
        report(self.decisions)
        for store, charge in self._provisional:
            store.settle([(charge, charge.held)])
        return Call(self._enclosing, tuple(self._parts.values()), self._arguments) if self._parts else None

    def _give_back(self) -> None:
        for store, charge in self._provisional:
            store.settle([(charge, 0)])
        for part in self._parts.values():
            part.store.settle([(charge, 0) for charge in part.charges])

    def _refusal(self, turn: Turn, answer: Answer) -> LimitExceeded:
        """The exception of the layer that takes longest to clear; of the outermost where several do."""
        report(answer.refusals.values())
        place, decision = max(answer.refusals.items(), key=lambda refusal: refusal[1].patience)
        number = turn.owners[place]
        violations = tuple(answer.refusals.values())
        return self._layers[number].limiter.exceeded(decision, self._keys[number], violations)


def admit(asked: Asked, *, patient: bool = True, report: bool = False) -> Call | None:
    """Ask every store for its part of a call. Raises `LimitExceeded`, charging nothing, if one refuses."""
    report = report or collector() is not None
    for turn in asked.turns:
        patience = turn.patience if patient else [0] * len(turn.claims)
        asked.hear(turn, acquire(turn.store, turn.claims, patience, report))
    return asked.admitted()


async def admit_async(asked: Asked, *, report: bool = False) -> Call | None:
    """The twin of `admit`."""
    report = report or collector() is not None
    for turn in asked.turns:
        asked.hear(turn, await acquire_async(turn.store, turn.claims, turn.patience, report))
    return asked.admitted()
