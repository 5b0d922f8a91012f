"""A call that was admitted, from its check to its settlement: what it holds, used, and is charged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from quotalimit._layers import Layer, RateLayer, TokenLayer
from quotalimit.amounts import MAX_UNITS
from quotalimit.decision import Decision, slowest
from quotalimit.estimation import tokens_of, weigh_answer, weigh_arguments
from quotalimit.events import Event, Kind, listeners, tell, tell_later
from quotalimit.failures import KEEP, RELEASE, Verdict
from quotalimit.keys import Identity, Key
from quotalimit.providers import field
from quotalimit.recording import BLANK, Recorder, sources_of, unfinished
from quotalimit.settlement import Settlement, Source
from quotalimit.stores.base import Charge, Counts, Store
from quotalimit.usage import Fold, Reading, Report, Usage


class Part:
    """One layer's part in a call: what is held for it, and what was read of the call's usage for it."""

    fold: Fold | None = None
    """What the items of a stream told."""

    reading: Reading | None = None
    """What the result or the exception of the call told."""

    told = False
    """Whether usage was told, be it known from elsewhere."""

    untold = 0
    """The weight of what was written since usage was last told."""

    verdict: Verdict = KEEP

    key: Key | None = None
    """Whose call it is; None unless somebody listened when it began."""

    decisions: Sequence[Decision] = ()
    """How it was admitted, if the store was asked with a report."""

    def __init__(self, layer: Layer, store: Store, reserve: int, charges: list[Charge]) -> None:
        self.layer = layer
        self.store = store
        self.reserve = reserve
        self.charges = charges

    @property
    def readings(self) -> list[Reading]:
        """All that was told."""
        readings = [] if self.fold is None else self.fold.readings
        if self.reading is not None:
            readings.append(self.reading)
        return readings

    def tell(self, report: Report | Reading, known: bool) -> None:
        """Take what a result, an exception or an item of a stream told; nothing if that is known from elsewhere."""
        self.told = True
        self.untold = 0
        if self.fold is not None:
            self.fold.add(Report(report) if isinstance(report, Usage) else report, known)
        elif not known:
            assert not isinstance(report, Report)
            self.reading = report


class Call(Recorder):
    """One admitted call that has something to settle. It is settled once, whatever ends it; only the first end counts.

    An end that an interrupt cuts short is none. The next one settles what is still open: at the latest, when the call
    is collected.

    Usage that was recorded while it ran, and what its nested calls used, is kept by the `Recorder` that it is.
    """

    _result: object = None
    _read_from: tuple[object, ...] = ()
    _written = 0
    _cut = False
    _dropped = False
    """Whether this may be the work of a finalizer, in which no listener is called."""

    _is_settled = False

    unflushed: Sequence[Store] = ()
    """The stores that have yet to keep what was settled."""

    _parts: Sequence[Part] | None = None
    """None for a common call of which nothing more than its result has come to matter."""

    # All that the parts of a common call are made of. It is here because an interrupt makes another kind of call of it.
    _layers: Sequence[Layer]
    _store: Store
    _charges: Sequence[Charge]
    _reading: Reading | None = None

    def __init__(self, enclosing: Recorder | None, parts: Sequence[Part], arguments: Sequence[object]) -> None:
        self.enclosing = enclosing
        self.records = any([part.layer.borrows for part in parts])  # noqa: C419 - in half the time
        self._parts = parts
        self._arguments = arguments
        self._ends = [None]

    @property
    def parts(self) -> Sequence[Part]:
        """What the call holds for each layer, and what it used there."""
        if self._parts is None:
            charges = iter(self._charges)
            parts = [
                Part(layer, self._store, layer.amounts[1], list(islice(charges, len(layer.limiter.limits))))
                for layer in self._layers
            ]
            if self._reading is not None:
                parts[0].tell(self._reading, False)
            made: Sequence[Part] = self.__dict__.setdefault("_parts", parts)  # in one step, for threads may be first
            return made
        return self._parts

    @property
    def is_told(self) -> bool:
        """Whether any usage was told or recorded so far."""
        return bool(self.notes.recorded) or any(part.told for part in self.parts)

    @property
    def decisions(self) -> list[Decision]:
        """How the call was admitted, if it was asked with a report."""
        return [decision for part in self.parts for decision in part.decisions]

    def see(self, item: object) -> None:
        """Read an item of a stream: the usage that it tells, and the text that has arrived."""
        written = weigh_answer(item)
        for part in self.parts:
            part.untold += written
        self._written += written
        self._read(item, streaming=True)

    def _read(self, answer: object, *, streaming: bool = False) -> None:
        """Read the usage that a result, or an item of a stream, tells."""
        sources: tuple[object, ...] = ()
        if streaming or self.notes is not BLANK or self.enclosing is not None:  # else nobody asks where
            sources = sources_of(answer)
        known = bool(sources) and self.knows(sources)
        for part in self.parts:
            layer = part.layer
            if isinstance(layer, TokenLayer):
                if streaming and part.fold is None:
                    part.fold = Fold()
                whole = part.fold is None
                report = layer.read(answer) if whole else layer.read_item(answer, streaming=streaming)
                if report is not None:
                    part.tell(report, known)
                    if sources:
                        self.remember_latest(sources)

    def finish(self, result: object = None) -> list[Settlement]:
        """Settle a call that returned."""
        try:
            return self._conclude(result) if self._end() else []
        except BaseException:  # an interrupt, or no stack left
            self._reopen()
            raise

    def _conclude(self, result: object) -> list[Settlement]:
        """Settle what its result tells."""
        self._read(result)
        self._result = result
        return self._settle(None)

    def finish_stream(self, result: object = None) -> list[Settlement]:
        """Settle a stream that has ended. It may have returned something; that it did not is no result to be read."""
        return self.finish_as(None) if result is None else self.finish(result)

    def cut(self) -> list[Settlement]:
        """Settle a stream that was left before its end: what was written since it last told its usage is estimated."""
        try:
            if not self._end():
                return []
            self._cut = self._dropped = True
            return self._settle(None)
        except BaseException:
            self._reopen()
            raise

    def finish_as(self, reading: Reading | None, sources: tuple[object, ...] = ()) -> list[Settlement]:
        """Settle a call of which the usage is known from elsewhere."""
        try:
            if not self._end():
                return []
            if reading is not None:
                for part in self.parts:
                    part.tell(reading, self.knows(sources))
                self._read_from = sources
            return self._settle(None)
        except BaseException:
            self._reopen()
            raise

    def fail(self, error: BaseException) -> list[Settlement]:
        """Settle a call that raised."""
        try:
            if not self._end():
                return []
            self._cut = True
            self._read_failure(error)
            return self._settle(error)
        except BaseException:
            self._reopen()
            raise

    def _read_failure(self, error: BaseException) -> None:
        """Read the usage that an exception tells, or what becomes of the holds."""
        sources = (error, *sources_of(field(error, "completion")))
        known = self.knows(sources)
        for part in self.parts:
            if isinstance(part.layer, TokenLayer):
                outcome = part.layer.read_failure(error, begun=self._written > 0 or part.told)
                if isinstance(outcome, Verdict):
                    part.verdict = outcome
                else:
                    part.tell(outcome, known)
        self._read_from = sources

    def release(self) -> None:
        """Give back all that is held: the body of the call never ran."""
        try:
            if self._end():
                self._dropped = True
                for part in self.parts:
                    part.verdict = RELEASE
                self._settle(None)
        except BaseException:
            self._reopen()
            raise

    def join(self, other: Call) -> None:
        """Settle another call, which began with this one and has not run, together with this one."""
        self._parts = [*self.parts, *other.parts]
        self.records = self.records or other.records
        other._ends = []

    def lenders(self, counts: Counts, identity: Identity) -> list[Charge]:
        """The open charges on a count of this call and of those that it runs in, nearest first."""
        own = [
            charge
            for part in self.parts
            for charge in part.charges
            if charge.open and charge.counts is counts and charge.identity == identity
        ]
        return own + lenders(self.enclosing, counts, identity)

    def flush(self) -> None:
        """Wait until what was settled is kept, where that takes I/O. Not for finalizers, nor on an event loop."""
        unflushed, self.unflushed = self.unflushed, ()
        for store in dict.fromkeys(unflushed):
            store.flush()

    async def flush_async(self) -> None:
        """The twin of `flush`. A cancellation does not undo it: it is only waited for no longer."""
        unflushed, self.unflushed = self.unflushed, ()
        for store in dict.fromkeys(unflushed):
            await store.flush_async()

    def _end(self) -> bool:
        """Whether this is the first end of the call, of which there may be several, in several threads."""
        try:
            self._ends.pop()
        except IndexError:
            return False
        self.finished = True
        return True

    def _reopen(self) -> None:
        """Let the next end settle what this one could not."""
        if self._is_settled:
            return
        self._ends = [None]
        self.__class__ = InterruptedCall  # pyright: ignore[reportAttributeAccessIssue]

    def _settle(self, error: BaseException | None) -> list[Settlement]:
        settled: list[Settlement] = []
        charged: list[tuple[Charge, int]] = []
        for part in self.parts:
            layer = part.layer
            if isinstance(layer, TokenLayer):
                used, source = self._used(part, layer)
                used = min(used, MAX_UNITS)
                due = [(charge, self._owed(charge, used)) for charge in part.charges]
                if part.decisions or listeners or self.enclosing is not None:  # else nobody asks
                    settled.append(_report(part, used, max([units for _, units in due], default=0), source))
            else:
                refunds = isinstance(layer, RateLayer) and isinstance(error, layer.refund_on)
                due = [(charge, 0 if refunds else part.reserve) for charge in part.charges]
            part.store.settle(due)
            if part.store.blocking:
                self.unflushed = (*self.unflushed, part.store)
            charged += due
        if self.enclosing is not None:
            self._tell_enclosing(settled, charged)
        self._arguments, self._result, self._read_from = (), None, ()
        if self.notes is not BLANK:
            self.forget()
        self._is_settled = True
        if listeners and not self._dropped:
            tell()
        return settled

    def _owed(self, charge: Charge, used: int) -> int:
        """What of the usage has not been charged inside, by nested calls on the same count."""
        inside = [
            units
            for counts, identity, units in self.notes.inside
            if counts is charge.counts and identity == charge.identity
        ]
        return max(0, used - sum(inside))

    def _used(self, part: Part, layer: TokenLayer) -> tuple[int, Source]:
        """What the call used on one budget, and how that is known (rule 8)."""
        if part.fold is None and part.reading is not None and not self.notes.recorded:  # as mostly: a plain response
            weight = layer.weigh(part.reading)
            if weight is not None:
                return weight, "reported"
        readings = part.readings + [reading for reading, _ in self.notes.recorded]
        weights = [weight for weight in map(layer.weigh, readings) if weight is not None]
        if weights:
            fold = part.fold
            if part.untold and part.told and (self._cut or (fold is not None and fold.opened)):
                return sum(weights) + (layer.weigh(Usage(output_tokens=tokens_of(part.untold))) or 0), "estimated"
            return sum(weights), "reported" if part.told else "recorded"
        if part.verdict is RELEASE:
            return 0, "released"
        if layer.reserves:
            return part.reserve, "reserved"
        estimate = tokens_of(weigh_arguments(self._arguments) + self._written + weigh_answer(self._result))
        layer.warn_of_estimate(estimate)
        return estimate, "estimated"

    def _tell_enclosing(self, settled: list[Settlement], charged: list[tuple[Charge, int]]) -> None:
        """Hand what this call used, and where it was charged, to the call that it ran in."""
        outer = unfinished(self.enclosing)
        if outer is None:
            return
        for reading, sources in self.notes.recorded:
            outer.record(reading, sources)
        reported = next((readings for part in self.parts if (readings := part.readings)), [])
        if not reported and not self.notes.recorded and settled and settled[0].used:
            reported = [settled[0].used]
        read_from = (*self.notes.latest.values(), *self._read_from)
        if not outer.knows(read_from):
            for reading in reported:
                outer.record(reading, ())
            outer.remember(read_from)
        inside = ((charge.counts, charge.identity, units) for charge, units in charged)
        outer.record_inside([*self.notes.inside, *inside])


class InterruptedCall(Call):
    """A call of which an end was, or may be, cut short: if no other follows, it is settled when it is collected.

    Other calls have no finalizer: it would be in the way of every call, and an interrupt that strikes one is lost.
    """

    def __del__(self) -> None:
        self.cut()


def _report(part: Part, used: int, charged: int, source: Source) -> Settlement:
    settlement = Settlement(part.layer.limiter.name, used, charged, part.reserve, source)
    for decision in part.decisions:
        decision.settlement = settlement
    if listeners:
        _tell_later(part, settlement)
    return settlement


def _tell_later(part: Part, settlement: Settlement) -> None:
    decision = slowest(part.decisions) if part.decisions else None
    kinds: list[Kind] = ["settled"]
    if settlement.overrun and isinstance(part.layer, TokenLayer) and part.layer.reserves:
        kinds.append("overrun")
    for kind in kinds:
        tell_later(
            Event(kind, settlement.name, part.key, decision, settlement=settlement, enforced=part.layer.enforced)
        )


def lenders(recorder: Recorder | None, counts: Counts, identity: Identity) -> list[Charge]:
    """The charges from which a nested call on the same count takes its need first."""
    recorder = unfinished(recorder)
    return recorder.lenders(counts, identity) if isinstance(recorder, Call) else []
