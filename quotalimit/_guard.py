"""A guard: all layers of one function, asked together, all or nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

from quotalimit._arguments import compile_questions
from quotalimit._calls import Call, Part, lenders
from quotalimit._layers import Layer, RateLayer, TokenLayer
from quotalimit._waiting import acquire, acquire_async, is_worth_waiting
from quotalimit.decision import Decision, collectors
from quotalimit.errors import LimitExceeded
from quotalimit.keys import Key
from quotalimit.limiters import hand_over
from quotalimit.recording import running
from quotalimit.stores.base import Answer, Charge, Claim, Store

Entry: TypeAlias = tuple[Call | None, Callable[[], Awaitable[Call | None]] | None]
"""An admitted call, or how to admit one that must wait."""


class Guard:
    """The layers of one function, the outermost first, and the questions that they ask of a call."""

    def __init__(self, function: Callable[..., Any], layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self._fast = FastPath(self.layers[0]) if FastPath.serves(self.layers) else None
        self._answer = compile_questions(function, [q for layer in layers for q in layer.questions.items()])

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Admit a call, or raise `LimitExceeded`. Returns it if something of it is to be settled."""
        answers = self._answer(*args, **kwargs)
        if self._fast is not None and self._fast.admits(answers[0]):
            return None
        return admit(Asked(self.layers, answers, (*args, *kwargs.values())))

    async def enter_async(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The twin of `enter`."""
        answers = self._answer(*args, **kwargs)
        if self._fast is not None and self._fast.admits(answers[0]):
            return None
        return await admit_async(Asked(self.layers, answers, (*args, *kwargs.values())))

    def enter_now_or_later(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """Admit a call now, or know how to admit it later if it must wait. Raises `LimitExceeded` if that is no use."""
        asked = Asked(self.layers, self._answer(*args, **kwargs), (*args, *kwargs.values()))
        if admit_now(asked):
            return asked.admitted(), None
        return None, partial(admit_async, asked)


class FastPath:
    """The common call, one limit of a fixed cost with nothing to settle, asked without the machinery of the others.

    It only ever admits. Whatever is special about a call, a refusal first of all, is left to the general path.
    """

    __slots__ = ("_limiter",)

    def __init__(self, layer: Layer) -> None:
        assert isinstance(layer, RateLayer)
        self._limiter = layer.limiter

    @staticmethod
    def serves(layers: Sequence[Layer]) -> bool:
        """Whether a function's layers are of the common kind."""
        layer = layers[0]
        return (
            len(layers) == 1
            and isinstance(layer, RateLayer)
            and not layer.holds
            and layer.costs_one
            and len(layer.limiter.limits) == 1
        )

    def admits(self, key: object) -> bool:
        """Admit a call of this key at once; False, with nothing charged, if the general path is to decide."""
        binding = self._limiter.binding
        if binding is None or (type(key) is not str and type(key) is not int) or collectors():
            return False
        counts, limit = binding.places[0]
        return binding.store.admits(counts, key, limit)


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

    def __init__(self, layers: Sequence[Layer], answers: Sequence[Any], arguments: Sequence[object]) -> None:
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
            key, identity, binding, places, need, cost = layer.hear(rest)
            self._keys.append(key)
            store = binding.store
            if layer.holds:
                self._parts[number] = Part(layer, store, cost)
            if not places:
                continue
            turn = self._turn(store)
            for counts, limit in places:
                claim = Claim(counts, identity, limit, need, cost, layer.holds)
                if enclosing is not None and isinstance(layer, TokenLayer):
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
        """Take a store's answer. Raises `LimitExceeded` if it is a refusal."""
        if answer.refusals:
            raise self._refusal(turn, answer)
        self._label(turn, enumerate(answer.decisions))
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
        hand_over(self.decisions)
        for store, charge in self._provisional:
            store.settle([(charge, charge.held)])
        return Call(self._enclosing, tuple(self._parts.values()), self._arguments) if self._parts else None

    def give_back(self) -> None:
        """Give back what stores have admitted of a call that does not start."""
        for store, charge in self._provisional:
            store.settle([(charge, 0)])
        self._provisional.clear()
        for part in self._parts.values():
            part.store.settle([(charge, 0) for charge in part.charges])
            part.charges.clear()
            part.decisions.clear()
        self.decisions.clear()

    def _label(self, turn: Turn, decisions: Iterable[tuple[int, Decision]]) -> None:
        """Say on decisions, each at the place of its claim, whose they are."""
        for place, decision in decisions:
            number = turn.owners[place]
            self._layers[number].limiter.label((decision,), alone=turn.owners.count(number) == 1)

    def _refusal(self, turn: Turn, answer: Answer) -> LimitExceeded:
        """The exception of the layer that takes longest to clear; of the outermost where several do."""
        self._label(turn, answer.refusals.items())
        hand_over(answer.refusals.values())
        place, decision = max(answer.refusals.items(), key=lambda refusal: refusal[1].patience)
        number = turn.owners[place]
        violations = tuple(answer.refusals.values())
        return self._layers[number].limiter.exceeded(decision, self._keys[number], violations)


def admit(asked: Asked, *, report: bool = False) -> Call | None:
    """Ask every store for its part of a call. Raises `LimitExceeded`, charging nothing, if one refuses."""
    report = report or bool(collectors())
    try:
        for turn in asked.turns:
            asked.hear(turn, acquire(turn.store, turn.claims, turn.patience, report))
    except BaseException:
        asked.give_back()
        raise
    return asked.admitted()


async def admit_async(asked: Asked, *, report: bool = False) -> Call | None:
    """The twin of `admit`."""
    report = report or bool(collectors())
    try:
        for turn in asked.turns:
            asked.hear(turn, await acquire_async(turn.store, turn.claims, turn.patience, report))
    except BaseException:
        asked.give_back()
        raise
    return asked.admitted()


def admit_now(asked: Asked) -> bool:
    """Ask every store without waiting; False, with nothing charged, if a call must wait and that may help."""
    report = bool(collectors())
    try:
        for turn in asked.turns:
            answer = acquire(turn.store, turn.claims, [0] * len(turn.claims), report)
            if answer.refusals and is_worth_waiting(answer, turn.patience):
                asked.give_back()
                return False
            asked.hear(turn, answer)
    except BaseException:
        asked.give_back()
        raise
    return True
