"""What stores that processes share have in common: they wait for I/O, and may be unable to answer."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal, TypeAlias

from quotalimit import clock
from quotalimit.algorithms.base import Algorithm
from quotalimit.decision import Decision
from quotalimit.errors import StoreUnavailable
from quotalimit.keys import Identity, encode
from quotalimit.stores.base import Answer, Charge, Claim, Counts, Store, checked_max_keys, decide, reentered
from quotalimit.stores.charges import OpenCharges
from quotalimit.stores.names import Owner
from quotalimit.stores.outage import Outage
from quotalimit.stores.settlements import Change, Settlements
from quotalimit.stores.writer import WRITER

OnUnavailable: TypeAlias = Literal["raise", "allow"] | Store
"""What becomes of calls while a store cannot answer: they raise, they are admitted, or another store is asked."""

_LONGEST_TIMEOUT: Final = 3_600.0


class SharedCounts:
    """The place of a limit's counts on a shared store: what it is called there, and what this process holds open.

    `slot` is the store's own, `spare` the counts on the store that is asked while this one is down.
    """

    __slots__ = ("limit_id", "name", "open", "position", "slot", "slowest", "spare")

    def __init__(self, name: str, position: int, limit: Algorithm, spare: Counts) -> None:
        assert isinstance(limit.count_id, tuple)
        self.name = name
        self.position = position
        self.limit_id = ":".join(map(str, limit.count_id))
        self.slowest = limit
        self.spare = spare
        self.slot: Any = None
        self.open = OpenCharges()

    def charges(self, identity: Identity) -> Iterable[Charge]:
        """The charges of an identity that this process holds open."""
        return self.open.of(written(identity)) if self.open else ()

    def opened(self, charge: Charge) -> None:
        """Note that a charge is open."""
        self.open.hold(written(charge.identity), charge)

    def closed(self, charge: Charge) -> None:
        """Note that a charge is open no longer."""
        self.open.release(written(charge.identity), charge)

    def forget(self, identity: Identity) -> None:
        """Close the open charges of an identity: their settlements will do nothing."""
        self.open.forget(written(identity))


class SpareCharge(Charge):
    """A charge that the other store took, while this one was down."""

    def __init__(self, claim: Claim, inner: Charge) -> None:
        super().__init__(claim.counts, claim.identity, claim.limit, inner.mark, 0)  # here, it has nothing to lend
        self.inner = inner
        claim.charge = self


class UncountedCharge(Charge):
    """What stands for a charge where a store that is down admits."""

    is_counted = False

    def __init__(self, claim: Claim) -> None:
        super().__init__(claim.counts, claim.identity, claim.limit, 0, 0)
        self.open = False


class Question:
    """All that a shared store is asked in one go: claims to decide on, taking them or only looking, or resets.

    What was settled before is written first, in the same go. `deadline` is when it must be answered, on
    `clock.monotonic`. `plain` is for the store: what it took for claims that hold nothing, as changes that undo it.
    """

    __slots__ = ("claims", "deadline", "not_before", "plain", "report", "resets", "takes")

    def __init__(
        self,
        timeout: float,
        claims: Sequence[Claim] = (),
        *,
        takes: bool = False,
        not_before: int = 0,
        report: bool = False,
        resets: Sequence[tuple[SharedCounts, Identity]] = (),
    ) -> None:
        self.deadline = clock.monotonic() + timeout
        self.claims = claims
        self.takes = takes
        self.not_before = not_before
        self.report = report
        self.resets = resets
        self.plain: list[Change] = []


class SharedStore(Store):
    """A store that waits for I/O. A subclass answers a `Question`; everything else is here.

    `_ask` and `_ask_async` take what is to be written from `_settlements`, under `_lock`, which guards the open
    charges of this process. They raise `StoreUnavailable`, with nothing taken, within the question's deadline.
    """

    blocking = True
    shared = True

    def __init__(self, *, timeout: float, on_unavailable: OnUnavailable, max_keys: int) -> None:
        super().__init__()
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= _LONGEST_TIMEOUT:
            raise ValueError(f"timeout must be a number of seconds above 0, not {timeout!r}")
        if on_unavailable not in ("raise", "allow") and not isinstance(on_unavailable, Store):
            raise ValueError(f'on_unavailable must be "raise", "allow" or another store, not {on_unavailable!r}')
        self._timeout = timeout
        self._max_keys = checked_max_keys(max_keys)
        self.spare = on_unavailable if isinstance(on_unavailable, Store) else None
        self._raises = on_unavailable == "raise"
        self._lock = threading.RLock()
        self._is_mine: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]
        self._settlements = Settlements()
        self._places: list[SharedCounts] = []
        self._outage = self._make_outage()
        WRITER.known.add(self)

    @abstractmethod
    def _ask(self, question: Question) -> Answer:
        """Write what was settled, then answer: `decisions` has those of all claims if they are only looked at.

        An answer without a time says that there was nothing to ask.
        """

    @abstractmethod
    async def _ask_async(self, question: Question) -> Answer:
        """The twin of `_ask`. Where it is cancelled, it still hands what it took to `_undo`."""

    @abstractmethod
    def close(self) -> None:
        """Write what was settled and let go of files and sockets; the next question opens them again."""

    def counts(self, owner: Owner, position: int, limit: Algorithm) -> SharedCounts:
        def make() -> SharedCounts:
            spare = None
            if self.spare is not None:
                self.spare.names.register(owner)
                spare = self.spare.counts(owner, position, limit)
            counts = SharedCounts(owner.name, position, limit, spare)
            self._places.append(counts)
            return counts

        counts: SharedCounts = self.names.find(owner, position, limit, make)
        if limit.rate.amount < counts.slowest.rate.amount:
            counts.slowest = limit
        return counts

    def acquire(self, claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        question = Question(self._timeout, claims, takes=True, not_before=not_before, report=report)
        try:
            return self._put(question)
        except StoreUnavailable:
            if self._raises:
                raise
        if self.spare is None:
            return admit_uncharged(claims, report)
        return from_spare(claims, self.spare.acquire(to_spare(claims), not_before=not_before, report=report))

    async def acquire_async(self, claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        question = Question(self._timeout, claims, takes=True, not_before=not_before, report=report)
        try:
            return await self._put_async(question)
        except StoreUnavailable:
            if self._raises:
                raise
        if self.spare is None:
            return admit_uncharged(claims, report)
        answer = await self.spare.acquire_async(to_spare(claims), not_before=not_before, report=report)
        return from_spare(claims, answer)

    def peek(self, claims: Sequence[Claim]) -> list[Decision]:
        try:
            return self._put(Question(self._timeout, claims)).decisions
        except StoreUnavailable:
            if self._raises:
                raise
        return admit_uncharged(claims, True).decisions if self.spare is None else self.spare.peek(to_spare(claims))

    async def peek_async(self, claims: Sequence[Claim]) -> list[Decision]:
        try:
            return (await self._put_async(Question(self._timeout, claims))).decisions
        except StoreUnavailable:
            if self._raises:
                raise
        if self.spare is None:
            return admit_uncharged(claims, True).decisions
        return await self.spare.peek_async(to_spare(claims))

    def reset(self, places: Sequence[tuple[SharedCounts, Identity]]) -> None:
        """Forget what identities used. Raises `StoreUnavailable` whatever the store does else when it is down."""
        if self.spare is not None:
            self.spare.reset([(counts.spare, identity) for counts, identity in places])
        self._put(Question(self._timeout, resets=places))
        self._ring(places)

    async def reset_async(self, places: Sequence[tuple[SharedCounts, Identity]]) -> None:
        if self.spare is not None:
            await self.spare.reset_async([(counts.spare, identity) for counts, identity in places])
        await self._put_async(Question(self._timeout, resets=places))
        self._ring(places)

    def settle(self, settlements: Sequence[tuple[Charge, int]], *, ring: bool = True) -> None:
        for charge, used in settlements:
            if isinstance(charge, SpareCharge):
                charge.open = False
                assert self.spare is not None
                self.spare.settle([(charge.inner, used)])
            elif charge.open:
                self._settlements.add(charge, used)
        WRITER.ring()
        if ring:
            self._ring([(charge.counts, charge.identity) for charge, _ in settlements])

    def flush(self) -> None:
        """Wait until all that was settled is written. While the store is down it is kept, and tried again."""
        if self.spare is not None:
            self.spare.flush()
        if self.behind and not self._is_mine():  # else this is a finalizer's, and the next call writes
            try:
                self._put(Question(self._timeout))
            except StoreUnavailable as error:
                self._outage.say_kept(error)

    async def flush_async(self) -> None:
        if self.spare is not None:
            await self.spare.flush_async()
        if self.behind:
            try:
                await self._put_async(Question(self._timeout))
            except StoreUnavailable as error:
                self._outage.say_kept(error)

    @property
    def behind(self) -> bool:
        """Whether a settlement is not written yet."""
        return bool(self._settlements)

    @property
    def busy(self) -> bool:
        """Whether a settlement is not written yet, or a charge open that may be settled at any time."""
        return self.behind or any(counts.open for counts in tuple(self._places))

    def before_fork(self) -> None:
        """Let go of what two processes must not share, and let nobody change anything until the fork is over."""
        self._lock.acquire()

    def after_fork(self, *, in_child: bool) -> None:
        """What is open or settled at a fork is the parent's to settle and to write."""
        if in_child:
            self.names.after_fork()
            self._outage = self._make_outage()
            self._settlements.forget()
            for counts in self._places:
                for identity in tuple(counts.open):
                    counts.forget(identity)
        self._lock.release()

    def _make_outage(self) -> Outage:
        if self._raises:
            return Outage(None)
        return Outage("calls are admitted uncharged" if self.spare is None else f"{self.spare!r} is asked instead")

    def _put(self, question: Question) -> Answer:
        """Ask the store, unless it failed a moment ago, or this is the work of a finalizer in the middle of a call."""
        if self._is_mine():
            raise reentered()
        with self._outage:
            answer = self._ask(question)
        return self._answered(answer)

    async def _put_async(self, question: Question) -> Answer:
        """The twin of `_put`."""
        if self._is_mine():
            raise reentered()
        with self._outage:
            answer = await self._ask_async(question)
        return self._answered(answer)

    def _answered(self, answer: Answer) -> Answer:
        if answer.now:  # else there was nothing to ask
            self._outage.end()
        if answer.charges:
            WRITER.watch(self)
        return answer

    def _undo(self, question: Question, answer: Answer) -> None:
        """Give back what was taken for a call that was cancelled meanwhile."""
        self._settlements.add_changes(question.plain)
        WRITER.watch(self)
        self.settle([(charge, 0) for charge in answer.charges])
        self._ring([(claim.counts, claim.identity) for claim in question.claims])

    def _ring(self, places: Iterable[tuple[SharedCounts, Identity]]) -> None:
        if self.lines:
            for place in places:
                self.lines.ring(*place)


def written(identity: Identity) -> bytes:
    """An identity as all processes write it."""
    return identity if isinstance(identity, bytes) else encode(identity)


def admit_uncharged(claims: Sequence[Claim], report: bool) -> Answer:
    """The answer for a store that is down and admits: nothing is charged, and nothing open."""
    answer = Answer(clock.now())
    for claim in claims:
        if claim.holds:
            answer.charges.append(UncountedCharge(claim))
        if report:
            answer.decisions.append(decide(claim, None, answer.now, 0, None))
    return answer


def to_spare(claims: Sequence[Claim]) -> list[Claim]:
    """The same claims on the other store. Of the enclosing calls, only those that were charged there lend."""
    translated: list[Claim] = []
    for claim in claims:
        spare = Claim(claim.counts.spare, claim.identity, claim.limit, claim.need, claim.cost, claim.holds)
        spare.lenders = [lender.inner for lender in claim.lenders if isinstance(lender, SpareCharge)]
        spare.before, spare.heads, spare.ahead = claim.before, claim.heads, claim.ahead
        translated.append(spare)
    return translated


def from_spare(claims: Sequence[Claim], answer: Answer) -> Answer:
    """The other store's answer, with its charges in the place of our own."""
    holding = [claim for claim in claims if claim.holds]
    answer.charges = [SpareCharge(claim, charge) for claim, charge in zip(holding, answer.charges, strict=False)]
    return answer
