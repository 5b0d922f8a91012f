"""A guard: all layers of one function, asked together, all or nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeAlias

from quotalimit._calls import Call, Part, lenders
from quotalimit._fast_path import AdmitAtOnce, Gatekeeper, never
from quotalimit._layers import Layer
from quotalimit._waiting import acquire, acquire_async, is_worth_waiting
from quotalimit.decision import Decision, collectors, slowest
from quotalimit.errors import LimitExceeded
from quotalimit.events import Event, Kind, events_of, listeners, tell
from quotalimit.keys import PLAIN, Key
from quotalimit.limiters import Limiter, hand_over
from quotalimit.recording import running
from quotalimit.stores.base import Answer, Charge, Claim, Store
from quotalimit.stores.several import Several

Entry: TypeAlias = tuple[Call | None, Callable[[], Awaitable[Call | None]] | None]
"""An admitted call, or how to admit one that must wait."""


class Guard:
    """The layers of one function, the outermost first, and the questions that they ask of a call."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.questions = [question for layer in layers for question in layer.questions.items()]
        """What is asked about a call: the answers, in this order, are what it is entered with."""
        self.gated = _gated(self.layers)
        """The limiter whose gate admits the common call: one limit, one unit, nothing to settle, no waiting."""
        self.admit_at_once: AdmitAtOnce = Gatekeeper(self.layers).admit if Gatekeeper.serves(self.layers) else never
        """Admits a common call that is to be settled; None, with nothing charged, for any other."""

    def enter(self, answers: Sequence[Any], arguments: Sequence[object]) -> Call | None:
        """Admit a call, or raise `LimitExceeded`. Returns it if something of it is to be settled."""
        return admit(Asked(self.layers, answers, arguments))

    async def enter_async(self, answers: Sequence[Any], arguments: Sequence[object]) -> Call | None:
        """The twin of `enter`."""
        return await admit_async(Asked(self.layers, answers, arguments))

    def enter_now_or_later(self, answers: Sequence[Any], arguments: Sequence[object]) -> Entry:
        """Admit a call now, or know how to admit it later if it must wait. Raises `LimitExceeded` if that is no use."""
        asked = Asked(self.layers, answers, arguments)
        if asked.store is None:
            return admit(asked), None
        if not asked.store.blocking:
            try:
                asked.store.lines.announce(asked.claims)
                answer = asked.store.acquire(asked.claims, report=is_reported())
                if not is_worth_waiting(answer, asked.claims):
                    return asked.admitted(answer), None
            except BaseException:
                asked.give_back()
                raise
            for claim in asked.claims:  # when it is asked again, others wait
                claim.heads, claim.ahead = (), 0
        return None, partial(admit_async, asked)

    def admit_ungated(self, key: Key) -> None:
        """Admit a common call in the way of all others, or raise `LimitExceeded`."""
        admit(Asked(self.layers, (key,), ()))

    async def admit_ungated_async(self, key: Key) -> None:
        """The twin of `admit_ungated`."""
        await admit_async(Asked(self.layers, (key,), ()))


def _gated(layers: Sequence[Layer]) -> Limiter | None:
    if len(layers) != 1:
        return None
    (layer,) = layers
    simple = not (layer.asks or layer.holds or layer.patience) and layer.amounts == (1, 1)
    return layer.limiter if simple and len(layer.limiter.limits) == 1 else None


Owner: TypeAlias = tuple[Layer, Key, Part | None]
"""Whose a claim is: the layer, the key that it got, and its part in the call if it is to be settled."""


class Asked:
    """One call with all its keys and costs computed, before any store is asked."""

    __slots__ = ("_arguments", "_enclosing", "_owners", "_parts", "claims", "store")

    enforced: ClassVar[bool] = True
    """Whether the answer is for the caller."""

    def __init__(self, layers: Sequence[Layer], answers: Iterable[Any], arguments: Sequence[object]) -> None:
        self._arguments = arguments
        self._enclosing = enclosing = running()
        self._parts: list[Part] = []
        self._owners = owners = list[Owner]()
        self.claims = claims = list[Claim]()
        stores = list[Store]()
        rest = iter(answers)
        for layer in layers:
            key = next(rest)
            identity = key if type(key) in PLAIN else layer.identify(key)
            binding = layer.limiter.binding or layer.limiter.bound()
            places, amounts = layer.hear(binding, rest) if layer.asks else (binding.places, layer.amounts)
            need, cost = amounts
            store, holds = binding.store, layer.holds
            part = None
            if holds:
                part = Part(layer, store, cost, [])
                self._parts.append(part)
            owner = layer, key, part
            for counts, limit in places:
                claim = Claim(counts, identity, limit, need, cost, holds)
                if layer.patience:
                    claim.patience = layer.patience
                if enclosing is not None and layer.borrows:
                    claim.lenders = lenders(enclosing, counts, identity)
                for other in claims:
                    if other.counts is counts and other.identity == identity:
                        claim.before += other.cost
                claims.append(claim)
                owners.append(owner)
                stores.append(store)
        self.store: Store | Several | None = stores[0] if stores else None
        """The store, or several; None for a call without a limit."""
        if stores and stores.count(stores[0]) < len(stores):
            self._sort(stores)

    def _sort(self, stores: list[Store]) -> None:
        """Bring the claims of each store together."""
        order = sorted(range(len(stores)), key=lambda place: stores.index(stores[place]))
        self._owners = [self._owners[place] for place in order]
        turns = {
            store: [claim for claim, its in zip(self.claims, stores, strict=True) if its is store]
            for store in dict.fromkeys(stores)
        }
        self.claims = [claim for turn in turns.values() for claim in turn]
        self.store = Several(list(turns.items()))

    def admitted(self, answer: Answer) -> Call | None:
        """The call, if something of it is to be settled. Raises `LimitExceeded` if the answer is a refusal."""
        if answer.refusals:
            raise self._refusal(answer)
        if answer.decisions:
            self._hand_over(answer.decisions)
        if answer.charges:
            self._hand_out(answer.charges)
        return Call(self._enclosing, self._parts, self._arguments) if self._parts else None

    def give_back(self) -> None:
        """Give back what was taken for a call that an interrupt keeps from being made."""
        charges = [claim.charge for claim in self.claims if claim.charge is not None]
        if charges and self.store is not None:
            self.store.settle([(charge, 0) for charge in charges])

    def _hand_over(self, decisions: Sequence[Decision]) -> None:
        self._publish("admitted", dict(enumerate(decisions)))
        for (_, _, part), decision in zip(self._owners, decisions, strict=True):
            if part is not None:
                part.decisions = (*part.decisions, decision)

    def _hand_out(self, charges: Sequence[Charge]) -> None:
        """Give each part of the call the charges that it holds."""
        rest = iter(charges)
        for _, _, part in self._owners:
            if part is not None:
                part.charges.append(next(rest))

    def _publish(self, kind: Kind, decisions: Mapping[int, Decision]) -> None:
        """Hand decisions, each at the place of its claim, to those who collect them and those who listen."""
        self._label(decisions.items())
        if self.enforced:
            hand_over(decisions.values())
        if listeners:
            self._tell(kind, decisions)

    def _tell(self, kind: Kind, decisions: Mapping[int, Decision]) -> None:
        """Tell the listeners what each limiter answered."""
        places: dict[int, list[int]] = {}
        for place in decisions:
            places.setdefault(id(self._owners[place]), []).append(place)
        events: list[Event] = []
        for its in places.values():
            layer, key, part = self._owners[its[0]]
            if part is not None:
                part.key = key
            decision = slowest(decisions[place] for place in its)
            waited = max(self.claims[place].waited for place in its)
            events += events_of(kind, layer.limiter.name, key, decision, waited, enforced=self.enforced)
        tell(*events)

    def _label(self, decisions: Iterable[tuple[int, Decision]]) -> None:
        """Say on decisions, each at the place of its claim, whose they are."""
        for place, decision in decisions:
            owner = self._owners[place]
            owner[0].limiter.label((decision,), alone=self._owners.count(owner) == 1)

    def _refusal(self, answer: Answer) -> LimitExceeded:
        """The exception of the layer that takes longest to clear; of the outermost where several do."""
        self._publish("refused", answer.refusals)
        place, decision = max(answer.refusals.items(), key=lambda refusal: refusal[1].clears_in)
        layer, key, _ = self._owners[place]
        return layer.limiter.exceeded(decision, key, tuple(answer.refusals.values()))


def admit(asked: Asked, *, report: bool = False) -> Call | None:
    """Ask the store for a call. Raises `LimitExceeded`, charging nothing, if it refuses."""
    if asked.store is None:
        return asked.admitted(Answer(0))
    try:
        return asked.admitted(acquire(asked.store, asked.claims, report or is_reported()))
    except BaseException:
        asked.give_back()
        raise


async def admit_async(asked: Asked, *, report: bool = False) -> Call | None:
    """The twin of `admit`."""
    if asked.store is None:
        return asked.admitted(Answer(0))
    try:
        return asked.admitted(await acquire_async(asked.store, asked.claims, report or is_reported()))
    except BaseException:
        asked.give_back()
        raise


def is_reported() -> bool:
    """Whether somebody collects decisions or listens."""
    return bool(listeners or collectors())
