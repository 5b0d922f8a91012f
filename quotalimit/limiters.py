"""Named limits on a store, usable with no decorator: `RateLimiter` and `TokenBudget`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

from quotalimit._forks import in_child, let_go
from quotalimit._waiting import FOREVER, acquire, acquire_async
from quotalimit.algorithms import Algorithm, CalendarWindow, SlidingWindow
from quotalimit.amounts import whole
from quotalimit.decision import Decision, Unit, collectors, slowest
from quotalimit.errors import InvalidLimit, LimitExceeded, RateLimitExceeded, TokenBudgetExceeded
from quotalimit.events import Kind, events_of, listeners, tell
from quotalimit.keys import Identity, Key, identify
from quotalimit.rate import SECOND, Rate
from quotalimit.stores.base import Answer, Claim, Counts, Store, checked_store
from quotalimit.stores.default import follow

if TYPE_CHECKING:
    from quotalimit.holds import Hold, HoldLater

Limit: TypeAlias = str | Rate | Algorithm
"""What a limit may be written as."""

Places: TypeAlias = tuple[tuple[Counts, Algorithm], ...]
"""Limits, each with the store's place for its counts."""

_binding: Final = threading.RLock()
"""Guards where limiters are bound. A finalizer may bind one while its own thread does: to the same counts, for names
find these, so that whichever binding stays is right."""

_MOST_TIERS: Final = 10_000


class Unlimited:
    """The type of `UNLIMITED`."""

    def __repr__(self) -> str:
        return "UNLIMITED"

    def __reduce__(self) -> str:
        return "UNLIMITED"


UNLIMITED: Final = Unlimited()
"""What a callable limit returns for a caller who has no limit. Never the default: a missing plan is not a free one."""


class Binding:
    """A limiter's places on one store: for each limit, the store's counts of it."""

    __slots__ = ("_limiter", "_tiers", "places", "store")

    def __init__(self, limiter: Limiter, store: Store) -> None:
        self.store = store
        self._limiter = limiter
        store.names.register(limiter)
        self._tiers: dict[Hashable, Places] = {}
        self.places: Places = self._find(limiter.limits)

    def places_for(self, tier: object) -> Places:
        """The places of the limits that a callable limit returned."""
        if tier is UNLIMITED:
            return ()
        several = tuple(tier) if isinstance(tier, (list, tuple)) else (tier,)
        try:
            known = self._tiers.get(several)
        except TypeError:  # not hashable, so not a limit: reading it says so
            known = None
        if known is None:
            known = self._find(self._limiter.read_tier(several))
            if len(self._tiers) >= _MOST_TIERS:
                self._tiers.clear()
            self._tiers[several] = known
        return known

    def _find(self, limits: Sequence[Algorithm]) -> Places:
        return tuple((self.store.counts(self._limiter, place, limit), limit) for place, limit in enumerate(limits))


class Limiter:
    """Limits under one name on one store, and the calls that are counted against them."""

    exceeded: ClassVar[type[LimitExceeded]]
    """What is raised past a limit."""

    unit: ClassVar[Unit]
    """What the limits count."""

    least: ClassVar[int]
    """The units that a call takes of which no more is known."""

    default_algorithm: ClassVar[type[SlidingWindow | CalendarWindow]]
    """What a limit written as a string, or as a bare `Rate`, means."""

    unbindings: ClassVar[int] = 0
    """How often any limiter has been told to look for its store anew."""

    def __init__(self, *limits: Limit, name: str | None = None, store: Store | None = None) -> None:
        if not limits:
            raise InvalidLimit(f'{type(self).__name__} needs at least one limit, such as "20/minute"')
        self._set_up(tuple(map(self.read_limit, limits)), None, name, store)
        if store is not None:
            self.bound()

    def _set_up(
        self, limits: tuple[Algorithm, ...], tiers: Callable[..., Any] | None, name: str | None, store: Store | None
    ) -> None:
        if name is not None and (not isinstance(name, str) or not name):
            raise ValueError(f"name must be text, not {name!r}")
        if store is not None:
            checked_store(store)
        self.limits = limits
        self.tiers = tiers
        self.named = name is not None
        self.name: str = name or ", ".join(str(limit.rate) for limit in limits) or "tiers"
        self.origin: str | None = None
        self._own_store = store
        self.binding: Binding | None = None
        """The limiter's places on its store, once it has been called."""

    @classmethod
    def for_function(
        cls, limits: tuple[Algorithm, ...], tiers: Callable[..., Any] | None, name: str | None, store: Store | None
    ) -> Limiter:
        """The limiter of one decorator."""
        limiter = cls.__new__(cls)
        limiter._set_up(limits, tiers, name, store)
        return limiter

    def contradicts(self, other: Limiter) -> bool:
        """Whether two limiters have one name on one store, but not one meaning."""
        one_name = self.named and other.named and self.name == other.name and self._own_store is other._own_store
        return one_name and self.terms != other.terms

    def adopt(self, name: str, origin: str | None) -> None:
        """Take the default name and the origin that the decorated function gives."""
        if not self.named:
            self.name = name
        self.origin = None if origin is None or "<lambda>" in origin else origin
        if self._own_store is not None:
            self.bound()

    @classmethod
    def read_limit(cls, limit: object) -> Algorithm:
        """A limit from what it may be written as. Raises `InvalidLimit`."""
        if isinstance(limit, Algorithm):
            return limit
        if isinstance(limit, (str, Rate)):
            return cls.default_algorithm(limit)
        raise InvalidLimit(f'a limit is written like "20/minute", as a Rate or as an algorithm, not {limit!r}')

    @property
    def terms(self) -> tuple[Hashable, ...]:
        """What must be equal for two limiters of one name to share their counts."""
        return (type(self).__name__, *self.limits) if self.tiers is None else (type(self).__name__, self.tiers)

    def read_tier(self, tier: tuple[object, ...]) -> tuple[Algorithm, ...]:
        """The limits that a callable limit returned. Raises `InvalidLimit` for None and for none at all."""
        if not tier or None in tier:
            raise InvalidLimit(
                f"{self.name}: the callable limit returned {'None' if tier else 'no limits'}; "
                "a missing plan is not a free one: return a limit, or UNLIMITED"
            )
        try:
            return tuple(map(self.read_limit, tier))
        except InvalidLimit as error:
            raise InvalidLimit(f"{self.name}: {error}") from None

    def bound(self) -> Binding:
        """The limiter's places on its store, found at its first call."""
        binding = self.binding
        if binding is None:
            with _binding:
                binding = self.binding
                if binding is None:
                    binding = Binding(self, self._own_store or follow(self))
                    if len(binding.places) == 1:
                        self.gate = binding.store.gate(*binding.places[0])  # type: ignore[method-assign,assignment]
                    self.binding = binding
        return binding

    def gate(self, key: Key) -> Decision | bool:
        """The store's gate, for a limiter of one limit: see `Store.gate`. This one stands here until it is bound."""
        self.bound()
        return self.gate(key) if "gate" in self.__dict__ else False

    def unbind(self) -> None:
        """Look for the store anew at the next call: the default has changed."""
        with _binding:
            self.binding = None
            self.__dict__.pop("gate", None)
            Limiter.unbindings += 1  # last: who has counted it finds no binding of before

    def use(self, store: Store | None) -> Store | None:
        """Count on another store of its own, or on the default one, from now on. Returns its own before."""
        before, self._own_store = self._own_store, store
        self.unbind()
        return before

    def _claims(self, key: Key, need: int, cost: int, patience: int = 0) -> tuple[Store, list[Claim]]:
        """What a call outside of any decorator asks of each limit."""
        if self.tiers is not None:
            raise InvalidLimit(
                f"{self.name}: the limits of this limiter come from a callable of the decorated function's arguments, "
                "so it can be asked only through that function"
            )
        identity = identify(key)
        binding = self.bound()
        claims = [Claim(counts, identity, limit, need, cost, False) for counts, limit in binding.places]
        for claim in claims:
            claim.patience = patience
        return binding.store, claims

    def refusal(self, key: Key, answer: Answer) -> LimitExceeded:
        """The exception for a refused call of one limiter."""
        violations = tuple(answer.refusals.values())
        return self.exceeded(slowest(violations), key, violations)

    def label(self, decisions: Iterable[Decision], *, alone: bool | None = None) -> None:
        """Say on decisions what this limiter counts, and which of its limits each is about if it is not alone."""
        alone = len(self.limits) == 1 if alone is None else alone
        for decision in decisions:
            decision.unit = self.unit
            if not alone:
                decision.policy = f"{decision.name} {decision.limit}"

    def peek(self, key: Key) -> Decision:
        """What a call of one unit would be answered now. Charges nothing and raises nothing for a breach."""
        store, claims = self._looks(key)
        decisions = store.peek(claims)
        self.label(decisions)
        return slowest(decisions)

    async def peek_async(self, key: Key) -> Decision:
        """The twin of `peek`."""
        store, claims = self._looks(key)
        decisions = await store.peek_async(claims)
        self.label(decisions)
        return slowest(decisions)

    def _looks(self, key: Key) -> tuple[Store, list[Claim]]:
        """What a call of one unit would ask, behind those that wait."""
        store, claims = self._claims(key, 1, self.least)
        if store.lines:
            store.lines.announce(claims)
        return store, claims

    def reset(self, key: Key) -> None:
        """Forget what an identity used. Open holds are closed: their later settlements do nothing."""
        store, places = self._all_places(key)
        store.reset(places)

    async def reset_async(self, key: Key) -> None:
        """The twin of `reset`."""
        store, places = self._all_places(key)
        await store.reset_async(places)

    def _all_places(self, key: Key) -> tuple[Store, list[tuple[Counts, Identity]]]:
        identity = identify(key)
        store = self.bound().store
        return store, [(counts, identity) for counts in store.names.all_of(self)]

    def _acquire(self, key: Key, units: int, wait: float) -> Decision:
        store, claims = self._claims(key, units, units, patience_of(wait))
        return self._answered(key, claims, acquire(store, claims, True))

    async def _acquire_async(self, key: Key, units: int, wait: float) -> Decision:
        store, claims = self._claims(key, units, units, patience_of(wait))
        return self._answered(key, claims, await acquire_async(store, claims, True))

    def _answered(self, key: Key, claims: Sequence[Claim], answer: Answer) -> Decision:
        self.label(answer.decisions)
        self.label(answer.refusals.values())
        decisions = answer.refusals.values() or answer.decisions
        hand_over(decisions)
        decision = slowest(decisions)
        if listeners:
            kind: Kind = "refused" if answer.refusals else "admitted"
            tell(*events_of(kind, self.name, key, decision, max(claim.waited for claim in claims)))
        if answer.refusals:
            raise self.refusal(key, answer)
        return decision

    def __repr__(self) -> str:
        limits = ", ".join(map(repr, self.limits)) if self.tiers is None else repr(self.tiers)
        return f"{type(self).__name__}({limits}, name={self.name!r})"


class RateLimiter(Limiter):
    """Limits the calls of each identity: `RateLimiter("20/minute", "500/day", name="chat")`.

    A bare string is an exact `SlidingWindow`. Raises `InvalidLimit` for limits that cannot be read.
    """

    exceeded = RateLimitExceeded
    unit = "requests"
    least = 1
    default_algorithm = SlidingWindow

    def allow(self, key: Key, cost: float = 1) -> bool:
        """Whether a call is admitted; it is counted if so. Never raises for a breach."""
        try:
            return self.acquire(key, cost).allowed
        except LimitExceeded:
            return False

    def acquire(self, key: Key, cost: float = 1, wait: float = 0.0) -> Decision:
        """Count a call of `cost` units, waiting for room for at most `wait` seconds.

        Raises `RateLimitExceeded` where there is none, `InvalidKey` and `ValueError` for a bad key or cost.
        """
        return self._acquire(key, whole(cost, "cost"), wait)

    async def allow_async(self, key: Key, cost: float = 1) -> bool:
        """The twin of `allow`."""
        try:
            return (await self.acquire_async(key, cost)).allowed
        except LimitExceeded:
            return False

    async def acquire_async(self, key: Key, cost: float = 1, wait: float = 0.0) -> Decision:
        """The twin of `acquire`: it waits without blocking the event loop."""
        return await self._acquire_async(key, whole(cost, "cost"), wait)


class TokenBudget(Limiter):
    """Limits the tokens of each identity: `TokenBudget("10_000/day", name="tokens")`.

    A bare string is a `CalendarWindow` in UTC. Raises `InvalidLimit` for limits that cannot be read.
    """

    exceeded = TokenBudgetExceeded
    unit = "tokens"
    least = 0
    default_algorithm = CalendarWindow

    def charge(self, key: Key, tokens: float, wait: float = 0.0) -> Decision:
        """Check and deduct tokens, waiting for room for at most `wait` seconds.

        It is a charge of its own, beside those of the calls that it is made in, and draws on none of their holds.
        Raises `TokenBudgetExceeded`, charging nothing, where they are more than what is left.
        """
        return self._acquire(key, whole(tokens, "tokens"), wait)

    async def charge_async(self, key: Key, tokens: float, wait: float = 0.0) -> Decision:
        """The twin of `charge`."""
        return await self._acquire_async(key, whole(tokens, "tokens"), wait)

    def reserve(self, key: Key, tokens: float, wait: float = 0.0) -> Hold:
        """Hold tokens for a call that is about to run: `with budget.reserve("alice", 1500) as hold: ...`.

        They are held at once. `hold.settle(response)` charges what the call used instead; a block that ends without
        is charged what was recorded in it, else all that was held. Raises `TokenBudgetExceeded`.
        """
        from quotalimit.holds import take

        return take(self, key, whole(tokens, "tokens"), patience_of(wait))

    def reserve_async(self, key: Key, tokens: float, wait: float = 0.0) -> HoldLater:
        """The twin of `reserve`: `async with budget.reserve_async("alice", 1500) as hold: ...`, or await it."""
        from quotalimit.holds import HoldLater

        return HoldLater(self, key, whole(tokens, "tokens"), patience_of(wait))


def patience_of(wait: float) -> int:
    """The seconds that a call may wait, in microseconds. Raises `ValueError` if they are negative or no number."""
    if isinstance(wait, bool) or not isinstance(wait, (int, float)) or not wait >= 0:  # as no comparison with NaN is
        raise ValueError(f"wait must be a number of seconds of at least 0, or math.inf, not {wait!r}")
    return FOREVER if wait >= FOREVER / SECOND else round(wait * SECOND)


def hand_over(decisions: Collection[Decision]) -> None:
    """Hand decisions to the `collect_decisions` blocks that are open."""
    for seen in collectors():
        seen.extend(decisions)


in_child(partial(let_go, _binding))
