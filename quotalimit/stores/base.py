"""What a store is: it answers claims, all or none, and settles the charges that it took."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

from quotalimit._waiting import LINES, Lines
from quotalimit.algorithms.base import Algorithm, Mark, State
from quotalimit.decision import Decision, Reason
from quotalimit.errors import StoreUnavailable
from quotalimit.keys import Identity, Key
from quotalimit.stores.names import Names, Owner

Counts: TypeAlias = Any
"""A store's place for the counts of one limit, one for each identity. Only the store looks inside."""


Gate: TypeAlias = Callable[[Key], "Decision | bool"]
"""What admits the common calls of one limit: see `Store.gate`."""

Gates: TypeAlias = Callable[[Sequence[Key], "list[Charge]"], bool]
"""What admits the common calls of several limits: see `Store.gates`."""


class CommonClaim(NamedTuple):
    """What every common call asks of one limit: `need` units must fit, `cost` are taken, held or not."""

    counts: Counts
    limit: Algorithm
    need: int
    cost: int
    holds: bool


class Claim:
    """What one call asks of one limit, for one identity.

    `need` units must fit, `cost` of them are taken: they differ for a call that needs 1 and takes 0.
    `holds` asks for a `Charge`, to be settled later.
    """

    # What few claims have is in the class, so that the others need not be given it.

    lenders: Sequence[Charge] = ()
    """The open charges of enclosing calls on the same count, nearest first: what they hold meets the need first."""

    before: int = 0
    """The units that earlier claims of the same call take of the same count."""

    heads: Sequence[tuple[int, int]] = ()
    """(need, due) of waiting calls that must not be delayed."""

    ahead: int = 0
    """The units that all calls that wait in front need."""

    patience: int = 0
    """The microseconds for which it may delay its call."""

    waited: int = 0
    """The microseconds for which it did."""

    charge: Charge | None = None
    """What a store took for it last, known before the answer is."""

    def __init__(self, counts: Counts, identity: Identity, limit: Algorithm, need: int, cost: int, holds: bool) -> None:
        self.counts = counts
        self.identity = identity
        self.limit = limit
        self.need = need
        self.cost = cost
        self.holds = holds


NOTHING: Final[dict[Charge, int]] = {}
"""What a charge borrowed that no lender stands behind."""


class Charge:
    """What one claim took, open until it is settled.

    `held` units may still be adjusted or lent; `taken` of them are charged at its mark, the rest at the marks of the
    charges that it borrowed from, `borrowed` of each.
    """

    is_counted: ClassVar[bool] = True
    """Whether any store counts it: not where one that is down admits all the same."""

    def __init__(self, counts: Counts, identity: Identity, limit: Algorithm, mark: Mark, taken: int) -> None:
        self.counts = counts
        self.identity = identity
        self.limit = limit
        self.mark = mark
        self.taken = taken
        self.held = taken
        self.borrowed = NOTHING
        self.open = True

    def borrow(self, borrowed: dict[Charge, int]) -> None:
        """Hold what was borrowed, too."""
        self.borrowed = borrowed
        self.held += sum(borrowed.values())


class Answer:
    """A store's answer to a call: admitted with the charges it holds, or refused by some of its limits.

    `charges` are in the order of the claims that asked to hold. `refusals` maps the places of refused claims to their
    decisions, `decisions` has those of all claims if the call asked for a report. `now` is the store's time.
    """

    __slots__ = ("charges", "decisions", "now", "refusals")

    def __init__(self, now: int) -> None:
        self.now = now
        self.charges: list[Charge] = []
        self.refusals: dict[int, Decision] = {}
        self.decisions: list[Decision] = []


class Store(ABC):
    """Where counts live. Every method is atomic and decides by the algorithms alone."""

    blocking: ClassVar[bool]
    """Whether asking waits for I/O, so that async code must use the `_async` twins."""

    shared: ClassVar[bool]
    """Whether counts are those of other processes too, so that a name must say everywhere whose they are."""

    spare: Store | None = None
    """The store that is asked while this one cannot answer."""

    def __init__(self) -> None:
        self.lines: Lines = LINES
        """The calls of this process that wait for room."""
        self.names: Final[Names[Counts]] = Names(shared=self.shared)
        """Whose counts are whose."""

    @abstractmethod
    def counts(self, owner: Owner, position: int, limit: Algorithm) -> Counts:
        """The place for the counts of a limiter's limit, found or made by `names.find`, for a reset asks `names`."""

    @abstractmethod
    def acquire(self, claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        """Take all claims, or none of them. `not_before` is a time known to have come though the clock stands still."""

    async def acquire_async(self, claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        """The twin of `acquire`; a store that waits for I/O has its own."""
        return self.acquire(claims, not_before=not_before, report=report)

    def gate(self, counts: Counts, limit: Algorithm) -> Gate:
        """A faster way than `acquire` for the common call: one limit, one unit that nothing holds, nobody waits.

        It answers as `acquire` does: True if a call of the key is admitted and counted, the decision if it is
        refused; False, with nothing done, if `acquire` is to be asked. A store that has no faster way need not have it.
        """
        return _no_gate

    def gates(self, asks: Sequence[CommonClaim]) -> Gates:
        """The same for one key each of several limits, some of them held.

        True if a call is admitted and counted; what is held of it is added to a list of the caller's, who so knows of
        it whatever interrupts. False, with nothing done, if `acquire` is to be asked, as it is about every refusal.
        """
        return _no_gates

    @abstractmethod
    def peek(self, claims: Sequence[Claim]) -> list[Decision]:
        """What `acquire` would decide about each claim; changes nothing."""

    async def peek_async(self, claims: Sequence[Claim]) -> list[Decision]:
        """The twin of `peek`."""
        return self.peek(claims)

    @abstractmethod
    def settle(self, settlements: Sequence[tuple[Charge, int]], *, ring: bool = True) -> None:
        """Close charges at the units that were used. Never blocks, and does nothing for a charge that is closed.

        A store that waits for I/O only queues them. They are kept at the latest when `flush` returns, and before any
        later question of this process is answered; where nobody flushes, soon.
        """

    def flush(self) -> None:  # noqa: B027 - nothing to wait for, unless a store waits for I/O
        """Wait until all that was settled is kept. Called where a call ends and may block; never by a finalizer."""

    async def flush_async(self) -> None:
        """The twin of `flush`."""
        self.flush()

    @abstractmethod
    def reset(self, places: Sequence[tuple[Counts, Identity]]) -> None:
        """Forget what identities used, and close their open charges."""

    async def reset_async(self, places: Sequence[tuple[Counts, Identity]]) -> None:
        """The twin of `reset`."""
        self.reset(places)


def _no_gate(_key: Key) -> bool:
    return False


def _no_gates(_keys: Sequence[Key], _charges: list[Charge]) -> bool:
    return False


def checked_store(store: Store) -> Store:
    """What is given as a store. Raises `TypeError` for what is none."""
    if not isinstance(store, Store):
        raise TypeError(f"store must be a Store such as MemoryStore(), not {store!r}")
    return store


def reentered() -> StoreUnavailable:
    """What to tell a call that comes in the middle of another of its own thread, whose lock it would wait for."""
    return StoreUnavailable(
        "a finalizer or a signal handler made a limited call, or a peek or reset, while its thread was in the middle "
        "of counting another: let it only note what is to be done, and call later"
    )


def checked_max_keys(max_keys: int) -> int:
    """A bound of the identities that a limit counts for. Raises `ValueError` for what is none."""
    if type(max_keys) is not int or max_keys < 1:
        raise ValueError(f"max_keys must be a positive whole number, not {max_keys!r}")
    return max_keys


def decide(claim: Claim, state: State, now: int, wait: int | None, reason: Reason | None) -> Decision:
    """The decision on a claim, given the state that remains after it."""
    return decision(claim.counts.name, claim.limit, claim.need, state, now, wait, reason)


def decision(
    name: str, limit: Algorithm, need: int, state: State, now: int, wait: int | None, reason: Reason | None
) -> Decision:
    """The decision on `need` units of a limit, given the state that remains after it."""
    used = limit.used(state, now)
    remaining = max(0, limit.capacity - used)
    return Decision(name, limit.rate, need, used, remaining, wait, limit.whole_at(state, now), reason)
