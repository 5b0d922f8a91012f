"""Counts on a Redis or Valkey server, or on a cluster of them: all processes of all machines share them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import itemgetter
from struct import Struct, unpack
from typing import Any, Final, cast

from quotalimit import clock
from quotalimit.algorithms.base import NEVER, Algorithm, Mark
from quotalimit.decision import Decision, Reason
from quotalimit.errors import StoreUnavailable
from quotalimit.keys import LONGEST, Identity
from quotalimit.stores import outage
from quotalimit.stores.base import Answer, Charge, Claim
from quotalimit.stores.charges import give_back, lend, needed, taken, unused
from quotalimit.stores.links import Links, Node, Talk
from quotalimit.stores.scripts import Script, script_of, twin_of
from quotalimit.stores.settlements import Change, SharedCharge, change_of
from quotalimit.stores.shared import OnUnavailable, Question, SharedCounts, SharedStore, written
from quotalimit.stores.writer import WRITER

_HEADER: Final = Struct("<6d")
_CHANGE: Final = Struct("<9d")
_CLAIM: Final = Struct("<14d")
_PAIR: Final = Struct("<2d")

_TAKE, _REPORT, _LOOK, _RESET = range(1, 5)
_UNKNOWN_WINDOW, _DONE, _REFUSED = range(3)
_REASONS: Final[tuple[Reason | None, ...]] = (None, "exhausted", "busy", "too_large")
_MET: Final = -1
"""The need of a claim all of which the enclosing calls hold."""


class RedisStore(SharedStore):
    """Counts on a server that processes share: `RedisStore("redis://localhost:6379/0")`. Redis 7, Valkey 8 or later.

    `server` is a URL (`redis://`, `rediss://` for TLS, `unix://`) or a client of redis-py, which is asked only where
    its server is. `timeout` is how many seconds a call waits for the server. `on_unavailable` is what becomes of a
    call that gets no answer: `"raise"` raises `StoreUnavailable`, `"allow"` admits and charges nothing, another store
    is asked instead. `cluster` says whether the server is one of a cluster; by default it is asked.

    One call is one round trip and atomic; on a cluster, one for each identity, and what was taken is given back if a
    later one refuses. Time is the server's. `clock`, for tests, gives microseconds to be used instead.
    """

    def __init__(
        self,
        server: Any,
        *,
        prefix: str = "quotalimit",
        timeout: float = 1.0,
        on_unavailable: OnUnavailable = "raise",
        cluster: bool | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:
        if not isinstance(prefix, str) or not prefix or "{" in prefix or "}" in prefix:
            raise ValueError(f"prefix must be text without braces, which a cluster gives a meaning, not {prefix!r}")
        self._prefix = prefix.encode()
        self._links = Links(server, timeout, cluster)
        super().__init__(timeout=timeout, on_unavailable=on_unavailable, max_keys=sys.maxsize)
        self._clock = clock
        self._ahead = 0
        """How far the server's clock is ahead of ours, as far as it mattered."""
        self._process = os.urandom(6).hex().encode()
        self._unsure: dict[int, Unsure] = {}
        """The changes that the server is not known to have made, by their serials."""
        self._resting: dict[Node, float] = {}
        """When settlements are next written to the nodes of a cluster that failed."""

    def __repr__(self) -> str:
        return f"RedisStore({str(self._links)!r})"

    def _ask(self, question: Question) -> Answer:
        return self._links.drive(self._talk(question, undoable=False))

    async def _ask_async(self, question: Question) -> Answer:
        return await self._links.drive_async(
            self._talk(question, undoable=True), lambda answer: self._undo(question, answer)
        )

    def close(self) -> None:
        self._outage.retry_now()
        self._resting.clear()
        self.flush()
        self._links.close()

    def after_fork(self, *, in_child: bool) -> None:
        if in_child:
            self._links.forget()
            self._unsure.clear()
            self._resting.clear()
            self._process = os.urandom(6).hex().encode()
        super().after_fork(in_child=in_child)

    def _talk(self, question: Question, *, undoable: bool) -> Talk[Answer]:
        """What is said to the server, or to each slot of a cluster in turn, for one question.

        A call that may be cancelled is `undoable`: what it takes is noted in the question.
        """
        if not self._links.known:
            yield from self._links.opened()
        if question.takes and not self._settlements:
            simple = yield from self._ask_simply(question, undoable)
            if simple is not None:
                return simple
        answer = Answer(0)
        asked = [(claim.counts, claim.identity) for claim in question.claims] + list(question.resets)
        if not asked:
            yield from self._write(question, answer)
            return answer
        due: list[Unsure] = []
        wants: list[Want] = []
        admitted: list[Want] = []
        try:
            with self._lock:
                self._due(asked, due)  # first, for it closes what was settled
                wants += [Want(claim, place) for place, claim in enumerate(question.claims)]
                if question.takes:
                    for want in wants:
                        want.borrow()
            for turn in self._turns(wants, question.resets, due):
                yield from self._ask_turn(turn, question, answer)
                if answer.refusals:
                    break
                admitted += turn.wants
            if answer.refusals and admitted:  # the later layers, of another slot, have refused
                given, admitted = admitted, []
                yield from self._give_back(given, question)
        except BaseException:
            with self._lock:
                self._settlements.add_changes(want.undone for want in admitted)
                self._return(wants)
            WRITER.watch(self)
            WRITER.ring()
            raise
        finally:
            self._land(due)
        with self._lock:
            if answer.refusals:
                self._return(wants)
            elif question.takes:
                self._note(wants, question, answer)
            for counts, identity in question.resets:
                counts.forget(identity)
        return answer

    def _ask_simply(self, question: Question, undoable: bool) -> Talk[Answer | None]:
        """The answer to a call that stands alone; None, with nothing taken, for one that borrows or waits in line."""
        keys: list[bytes] = []
        twins = set[str]()
        now = self._clock() if self._clock is not None else 0
        asks = _REPORT if question.report else _TAKE
        arguments = [b""]
        first = question.claims[0].identity
        plain = not question.report
        for claim in question.claims:
            counts = claim.counts
            if claim.lenders or claim.heads or claim.before or claim.ahead:
                return None
            if counts.open and counts.charges(claim.identity):
                return None
            if self._links.cluster and claim.identity != first:
                return None
            address = self._address(counts, claim.limit)
            keys.append(b"%b:{%b}%b" % (self._prefix, _tag(claim.identity), address.suffix))
            twins.add(address.twin)
            plain = plain and address.is_sliding and claim.cost == 1 and not claim.holds
            arguments.append(address.simple(claim, now or clock.now() + self._ahead))
        if len(keys) > 1 and len(set(keys)) < len(keys):
            return None
        arguments[0] = _HEADER.pack(now, question.not_before, asks, 0, 0, plain)
        told = yield from self._links.called(script_of(frozenset(twins)), keys, arguments)
        reply = unpack(f"<{len(told) // 8}q", told)
        how, answer = reply[0], Answer(reply[1])
        if how == _UNKNOWN_WINDOW:
            self._ahead = reply[1] - clock.now()
            return None
        if how == _REFUSED or question.report:
            wants = [Want(claim, place) for place, claim in enumerate(question.claims)]
            self._hear(how, asks, reply, wants, answer)
        if how == _DONE:
            self._note_simply(question, reply, answer, undoable)
        return answer

    def _note_simply(self, question: Question, reply: Sequence[int], answer: Answer, undoable: bool) -> None:
        """Note what a call that stands alone took."""
        at = 2
        for claim in question.claims:
            mark, epoch = reply[at : at + 2]
            if claim.holds:
                claim.charge = charge = SharedCharge(claim, mark, claim.cost, {}, epoch)
                answer.charges.append(charge)
                with self._lock:
                    claim.counts.opened(charge)
            elif undoable and claim.cost:
                question.plain.append(_undone(claim, mark, epoch, claim.cost))
            at += 5 if question.report else 2

    def _write(self, question: Question, answer: Answer) -> Talk[None]:
        """Write all that was settled. A node of a cluster that fails does not stop the others: it is left to rest."""
        due: list[Unsure] = []
        try:
            with self._lock:
                self._due((), due)
            turns = [(self._links.node_of(turn.journal), turn) for turn in self._turns((), (), due)]
            last: Node | None = None
            for node, turn in sorted(turns, key=itemgetter(0)):
                if clock.monotonic() < self._resting.get(node, 0.0):
                    continue
                try:
                    yield from self._ask_turn(turn, question, answer, anew=node != last)
                except StoreUnavailable as error:
                    WRITER.watch(self)
                    if not self._links.cluster:
                        raise
                    self._resting[node] = clock.monotonic() + outage.PAUSE
                    self._outage.say_kept(error)
                last = node
        finally:
            self._land(due)

    def _due(self, asked: Collection[tuple[SharedCounts, Identity]], due: list[Unsure]) -> None:
        """Add the changes to write ahead of what is asked, of the same slots of a cluster; all if nothing is.

        The lock is held. Those that another call is about to write are among them where they concern what is asked:
        it may come second. The list is the caller's, who so knows what is under way whatever interrupts.
        """
        for serial, change in self._settlements.due().items():
            if serial not in self._unsure:
                self._unsure[serial] = Unsure(serial, change)
        if not self._unsure:
            return
        slots = {self._slot(identity) for _, identity in asked}
        for unsure in self._unsure.values():
            if (
                not unsure.made
                and (not slots or self._slot(unsure.change.identity) in slots)
                and (not unsure.under_way or (unsure.change.counts, unsure.change.identity) in asked)
            ):
                unsure.under_way += 1
                due.append(unsure)

    def _land(self, due: Sequence[Unsure]) -> None:
        """Note that changes are under way no more, whether they were made or not.

        One that is made is known for as long as another call may be about to make it: so long it is in the journal.
        """
        if not due:
            return
        with self._lock:
            for unsure in due:
                unsure.under_way -= 1
                if unsure.made and not unsure.under_way:
                    self._unsure.pop(unsure.serial, None)

    def _turns(
        self, wants: Sequence[Want], resets: Sequence[tuple[SharedCounts, Identity]], due: Sequence[Unsure]
    ) -> list[Turn]:
        """The question in parts that the server can answer in one go each, in the order in which they are asked."""
        turns: dict[bytes, Turn] = {}
        for unsure in due:
            self._turn(turns, unsure.change.identity).due.append(unsure)
        for want in wants:
            self._turn(turns, want.claim.identity).wants.append(want)
        for counts, identity in resets:
            self._turn(turns, identity).resets.append(Want(Claim(counts, identity, counts.slowest, 0, 0, False), 0))
        return list(turns.values())

    def _slot(self, identity: Identity) -> bytes:
        """What the keys of a cluster have in common that are in the slot of an identity."""
        return b"{%b}:" % _tag(identity) if self._links.cluster else b""

    def _turn(self, turns: dict[bytes, Turn], identity: Identity) -> Turn:
        slot = self._slot(identity)
        turn = turns.get(slot)
        if turn is None:
            turn = turns[slot] = Turn(b"%b:%bjournal:%b" % (self._prefix, slot, self._process))
        return turn

    def _ask_turn(self, turn: Turn, question: Question, answer: Answer, *, anew: bool = False) -> Talk[None]:
        """Ask for one part of a question, and add its answer to that of the whole."""
        now = self._clock() if self._clock is not None else 0
        here = now or clock.now() + self._ahead
        asks = (_REPORT if question.report else _TAKE) if question.takes else _LOOK
        claims = turn.wants
        if turn.resets:
            asks, claims = _RESET, turn.resets
        while True:
            request = self._request(turn, claims, asks, now, question.not_before, here)
            told = yield from self._links.called(*request, anew=anew)
            reply = unpack(f"<{len(told) // 8}q", told)
            self._keep(turn)
            if reply[0] != _UNKNOWN_WINDOW:
                break
            here = reply[1]
            self._ahead = here - clock.now()
        answer.now = reply[1]
        self._hear(reply[0], asks, reply, turn.wants, answer)

    def _hear(self, how: int, asks: int, reply: Sequence[int], wants: Sequence[Want], answer: Answer) -> None:
        """Add what the server said of some claims to the answer."""
        if how == _REFUSED or asks == _LOOK:
            for at in range(2, len(reply), 7):
                want = wants[reply[at]]
                decision = want.decision(reply, at + 1, answer.now)
                if asks == _LOOK:
                    answer.decisions.append(decision)
                if not decision.allowed:
                    answer.refusals[want.place] = decision
            return
        width = 5 if asks == _REPORT else 2
        for want, at in zip(wants, range(2, len(reply), width), strict=False):
            want.mark, want.epoch = reply[at : at + 2]
            if asks == _REPORT:
                answer.decisions.append(want.admission(reply, at + 2, answer.now))

    def _request(
        self, turn: Turn, claims: Sequence[Want], asks: int, now: int, not_before: int, here: int
    ) -> tuple[Script, list[bytes], list[bytes]]:
        """The script for a turn, its keys and its arguments."""
        places: dict[bytes, int] = {}
        twins: set[str] = set()

        def place_of(counts: SharedCounts, identity: Identity, limit: Algorithm) -> tuple[int, Address]:
            address = self._address(counts, limit)
            twins.add(address.twin)
            key = b"%b:{%b}%b" % (self._prefix, _tag(identity), address.suffix)
            return places.setdefault(key, len(places) + 1), address

        arguments = [b""]
        for unsure in turn.due:
            change = unsure.change
            place, address = place_of(change.counts, change.identity, change.limit)
            arguments.append(
                _CHANGE.pack(
                    unsure.serial, place, *address.numbers(change.limit), change.mark, change.epoch, change.delta
                )
            )
        for want in claims:
            place, address = place_of(want.claim.counts, want.claim.identity, want.claim.limit)
            arguments.append(want.packed(place, address, here))
        oldest = min(self._unsure, default=0)
        arguments[0] = _HEADER.pack(now, not_before, asks, len(turn.due), oldest, False)
        keys = list(places)
        if turn.due:
            keys.append(turn.journal)
        return script_of(frozenset(twins)), keys, arguments

    def _address(self, counts: SharedCounts, limit: Algorithm) -> Address:
        if counts.slot is None:
            counts.slot = Address(counts, limit)
        address: Address = counts.slot
        return address

    def _keep(self, turn: Turn) -> None:
        """Note that the server has made the changes of a turn."""
        with self._lock:
            self._settlements.written(unsure.serial for unsure in turn.due)
            for unsure in turn.due:
                unsure.made = True
        turn.due.clear()

    def _give_back(self, wants: Sequence[Want], question: Question) -> Talk[None]:
        """Give back what earlier turns of a question took, at once."""
        with self._lock:
            self._settlements.add_changes(want.undone for want in wants if want.cost)
        due: list[Unsure] = []
        try:
            with self._lock:
                self._due([(want.claim.counts, want.claim.identity) for want in wants], due)
            for turn in self._turns((), (), due):
                yield from self._ask_turn(turn, question, Answer(0))
        finally:
            self._land(due)

    def _return(self, wants: Iterable[Want]) -> None:
        """Return to the enclosing calls what they lent for a call that was not admitted. The lock is held."""
        for want in wants:
            for lender, units in want.borrowed.items():
                self._settlements.add_changes(change_of(*change) for change in give_back(lender, units))

    def _note(self, wants: Iterable[Want], question: Question, answer: Answer) -> None:
        """Note what a call took: charges that it holds open, and how to undo the rest. The lock is held."""
        for want in wants:
            claim = want.claim
            if claim.holds:
                claim.charge = charge = SharedCharge(claim, want.mark, want.cost, want.borrowed, want.epoch)
                claim.counts.opened(charge)
                answer.charges.append(charge)
            elif want.cost:
                question.plain.append(want.undone)


class Want:
    """What one claim asks of the server, after the enclosing calls have lent what they could; and what it got."""

    __slots__ = ("borrowed", "claim", "cost", "epoch", "mark", "need", "open", "place", "taken")

    def __init__(self, claim: Claim, place: int) -> None:
        self.claim = claim
        self.place = place
        self.cost = claim.cost
        self.need = needed(claim)
        if self.need == 0 and claim.lenders:
            self.need = _MET
        self.taken = taken(claim)
        self.borrowed: dict[Charge, int] = {}
        self.open = [(charge.mark, -units) for charge, units in unused(claim.counts.charges(claim.identity)) if units]
        self.mark = self.epoch = 0

    def borrow(self) -> None:
        """Take what the enclosing calls lend before anybody else does."""
        if self.claim.lenders:
            self.borrowed = lend(self.claim)
            self.cost -= sum(self.borrowed.values())

    @property
    def undone(self) -> Change:
        """The change that gives back what was taken."""
        return _undone(self.claim, self.mark, self.epoch, self.cost)

    def packed(self, place: int, address: Address, here: int) -> bytes:
        """The claim as the script reads it."""
        claim, limit = self.claim, self.claim.limit
        ahead = min(max(self.need, 0) + claim.ahead, limit.capacity)
        numbers = (*address.numbers(limit), *address.edges(limit, here), self.need, self.cost, claim.holds, ahead)
        packed = _CLAIM.pack(place, *numbers, self.taken, len(claim.heads))
        if claim.heads or self.open:
            packed += b"".join(_PAIR.pack(*pair) for pair in (*claim.heads, *self.open))
        return packed

    def decision(self, reply: Sequence[int], at: int, now: int) -> Decision:
        """The decision that the reply has at a place: why not, the wait, units in use, and when all is whole."""
        reason = _REASONS[reply[at]]
        wait = None if reason == "too_large" else min(_whole(reply, at + 1), NEVER - 1)
        return self._decided(reply[at + 3], wait, now + _whole(reply, at + 4), reason)

    def admission(self, reply: Sequence[int], at: int, now: int) -> Decision:
        """The decision to admit: units in use, and when all is whole."""
        return self._decided(reply[at], 0, now + _whole(reply, at + 1), None)

    def _decided(self, used: int, wait: int | None, whole_at: int, reason: Reason | None) -> Decision:
        claim, limit = self.claim, self.claim.limit
        remaining = max(0, limit.capacity - used)
        return Decision(claim.counts.name, limit.rate, claim.need, used, remaining, wait, whole_at, reason)


class Turn:
    """The part of a question that one server answers in one go."""

    __slots__ = ("due", "journal", "resets", "wants")

    def __init__(self, journal: bytes) -> None:
        self.journal = journal
        self.due: list[Unsure] = []
        self.wants: list[Want] = []
        self.resets: list[Want] = []


class Unsure:
    """A change that the server may not have made yet. Its serial keeps it from being made twice."""

    __slots__ = ("change", "made", "serial", "under_way")

    def __init__(self, serial: int, change: Change) -> None:
        self.serial = serial
        self.change = change
        self.made = False
        self.under_way = 0


def _undone(claim: Claim, mark: Mark, epoch: int, units: int) -> Change:
    """The change that gives back what a claim took."""
    return Change(claim.counts, claim.identity, claim.limit, mark, epoch, -units)


class Address:
    """Where the counts of one limit are on the server, and what the script is told of it."""

    __slots__ = ("_edges", "_kind", "_simple", "is_sliding", "suffix", "twin")

    def __init__(self, counts: SharedCounts, limit: Algorithm) -> None:
        self.suffix = f":{counts.name}:{counts.position}:{counts.limit_id}".encode("utf-8", "surrogatepass")
        self.twin = twin_of(limit)
        self._kind = ord(limit.kind[0])
        self._edges = (0, 0, 0)
        self._simple: tuple[object, ...] = ()
        self.is_sliding = limit.kind == "sliding"

    def numbers(self, limit: Algorithm) -> tuple[int, int, int, int]:
        return self._kind, limit.capacity, limit.period, limit.rate.amount

    def simple(self, claim: Claim, now: int) -> bytes:
        """A claim that stands alone as the script reads it, mostly as it was the last time."""
        limit, need, cost, holds = claim.limit, claim.need, claim.cost, claim.holds
        edges = self._edges if self.is_sliding else self.edges(limit, now)
        known = self._simple
        if not known or known[0] is not limit or known[1] is not edges or known[2:5] != (need, cost, holds):
            ahead = min(need, limit.capacity)
            packed = _CLAIM.pack(0, *self.numbers(limit), *edges, need, cost, holds, ahead, cost, 0)
            self._simple = known = (limit, edges, need, cost, holds, packed)
        return cast("bytes", known[5])

    def edges(self, limit: Algorithm, now: int) -> tuple[int, int, int]:
        """Where the window of a moment begins and ends, and the next one ends: zones are unknown to the server."""
        window = getattr(limit, "window", None)
        edges = self._edges
        if window is not None and not edges[0] <= now < edges[1]:
            start, end = window(now)
            self._edges = edges = (start, end, window(end)[1])
        return edges


def _tag(identity: Identity) -> bytes:
    """An identity as the part of a key that says its slot."""
    if type(identity) is str and identity.isalnum() and identity.isascii() and len(identity) < LONGEST:
        return b"s" + identity.encode()  # the common ones, as `encode` has them
    tag = written(identity)
    if b"{" in tag or b"}" in tag or b"%" in tag:
        tag = tag.replace(b"%", b"%25").replace(b"{", b"%7B").replace(b"}", b"%7D")
    return tag


def _whole(reply: Sequence[int], at: int) -> int:
    """A number that comes in two words of 53 bits."""
    return reply[at] + (reply[at + 1] << 53)
