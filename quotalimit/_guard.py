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
from quotalimit.limiters import Limiter, hand_over
from quotalimit.recording import running
from quotalimit.stores.base import Answer, Claim, Store
from quotalimit.stores.several import Several

Entry: TypeAlias = tuple[Call | None, Callable[[], Awaitable[Call | None]] | None]
"""An admitted call, or how to admit one that must wait."""


class Guard:
    """The layers of one function, the outermost first, and the questions that they ask of a call."""

    def __init__(self, function: Callable[..., Any], layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.questions = [question for layer in layers for question in layer.questions.items()]
        self._answer = compile_questions(function, self.questions)
        self.common = _common(self.layers)
        """The limiter whose gate admits the common call: one limit, one unit, nothing to settle, no waiting."""

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Admit a call, or raise `LimitExceeded`. Returns it if something of it is to be settled."""
        return admit(Asked(self.layers, self._answer(*args, **kwargs), (*args, *kwargs.values())))

    async def enter_async(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The twin of `enter`."""
        return await admit_async(Asked(self.layers, self._answer(*args, **kwargs), (*args, *kwargs.values())))

    def enter_now_or_later(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """Admit a call now, or know how to admit it later if it must wait. Raises `LimitExceeded` if that is no use."""
        asked = Asked(self.layers, self._answer(*args, **kwargs), (*args, *kwargs.values()))
        if asked.store is None:
            return admit(asked), None
        if not asked.store.blocking:
            answer = acquire(asked.store, asked.claims, [0] * len(asked.claims), bool(collectors()))
            if not is_worth_waiting(answer, asked.patience):
                return asked.admitted(answer), None
        return None, partial(admit_async, asked)

    def admit_common(self, key: Key) -> None:
        """Admit a common call in the way of all others, or raise `LimitExceeded`."""
        admit(Asked(self.layers, (key,), ()))

    async def admit_common_async(self, key: Key) -> None:
        """The twin of `admit_common`."""
        await admit_async(Asked(self.layers, (key,), ()))


def _common(layers: Sequence[Layer]) -> Limiter | None:
    layer = layers[0]
    simple = len(layers) == 1 and isinstance(layer, RateLayer) and layer.costs_one and not layer.holds
    return layer.limiter if simple and not layer.patience and len(layer.limiter.limits) == 1 else None


class Asked:
    """One call with all its keys and costs computed, before any store is asked."""

    __slots__ = ("_arguments", "_enclosing", "_keys", "_layers", "_owners", "_parts", "claims", "patience", "store")

    def __init__(self, layers: Sequence[Layer], answers: Sequence[Any], arguments: Sequence[object]) -> None:
        self._layers = layers
        self._arguments = arguments
        self._enclosing = enclosing = running()
        self._keys: list[Key] = []
        self._parts: dict[int, Part] = {}
        turns: dict[Store, list[tuple[Claim, int]]] = {}
        rest = iter(answers)
        for number, layer in enumerate(layers):
            key, identity, binding, places, need, cost = layer.hear(rest)
            self._keys.append(key)
            if layer.holds:
                self._parts[number] = Part(layer, binding.store, cost)
            turn = turns.setdefault(binding.store, []) if places else []
            for counts, limit in places:
                claim = Claim(counts, identity, limit, need, cost, layer.holds)
                if enclosing is not None and isinstance(layer, TokenLayer):
                    claim.lenders = lenders(enclosing, counts, identity)
                claim.before = sum(c.cost for c, _ in turn if c.counts is counts and c.identity == identity)
                turn.append((claim, number))
        asked = [pair for turn in turns.values() for pair in turn]
        self.claims = [claim for claim, _ in asked]
        self._owners = [number for _, number in asked]
        self.patience = [layers[number].patience for number in self._owners]
        self.store: Store | Several | None = next(iter(turns), None)
        """The store, or several; None for a call without a limit."""
        if len(turns) > 1:
            self.store = Several([(store, [claim for claim, _ in turn]) for store, turn in turns.items()])

    def admitted(self, answer: Answer) -> Call | None:
        """The call, if something of it is to be settled. Raises `LimitExceeded` if the answer is a refusal."""
        if answer.refusals:
            raise self._refusal(answer)
        self._label(enumerate(answer.decisions))
        hand_over(answer.decisions)
        charges = iter(answer.charges)
        for claim, number in zip(self.claims, self._owners, strict=True):
            if number in self._parts:
                self._parts[number].charges.append(next(charges))
            elif claim.holds:  # only until every store had admitted the call
                self._layers[number].limiter.bound().store.settle([(charge := next(charges), charge.held)])
        for number, decision in zip(self._owners, answer.decisions, strict=False):
            if number in self._parts:
                self._parts[number].decisions.append(decision)
        return Call(self._enclosing, tuple(self._parts.values()), self._arguments) if self._parts else None

    def _label(self, decisions: Iterable[tuple[int, Decision]]) -> None:
        """Say on decisions, each at the place of its claim, whose they are."""
        for place, decision in decisions:
            number = self._owners[place]
            self._layers[number].limiter.label((decision,), alone=self._owners.count(number) == 1)

    def _refusal(self, answer: Answer) -> LimitExceeded:
        """The exception of the layer that takes longest to clear; of the outermost where several do."""
        self._label(answer.refusals.items())
        hand_over(answer.refusals.values())
        place, decision = max(answer.refusals.items(), key=lambda refusal: refusal[1].patience)
        number = self._owners[place]
        violations = tuple(answer.refusals.values())
        return self._layers[number].limiter.exceeded(decision, self._keys[number], violations)


def admit(asked: Asked, *, report: bool = False) -> Call | None:
    """Ask the store for a call. Raises `LimitExceeded`, charging nothing, if it refuses."""
    if asked.store is None:
        return asked.admitted(Answer(0))
    return asked.admitted(acquire(asked.store, asked.claims, asked.patience, report or bool(collectors())))


async def admit_async(asked: Asked, *, report: bool = False) -> Call | None:
    """The twin of `admit`."""
    if asked.store is None:
        return asked.admitted(Answer(0))
    return asked.admitted(await acquire_async(asked.store, asked.claims, asked.patience, report or bool(collectors())))
