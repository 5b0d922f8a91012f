"""A call that was admitted, from its check to its settlement: what it holds, used, and is charged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Final, TypeAlias

from quotalimit._layers import Layer, RateLayer, TokenLayer
from quotalimit.amounts import MAX_UNITS
from quotalimit.decision import Decision, slowest
from quotalimit.estimation import tokens_of, weigh_answer, weigh_arguments
from quotalimit.events import Event, Kind, listeners, tell, tell_later
from quotalimit.failures import KEEP, RELEASE, Verdict, together, usages_of
from quotalimit.keys import Identity, Key
from quotalimit.recording import BLANK, Record, Recorder, alive, unfinished
from quotalimit.settlement import Settlement, Source
from quotalimit.stores.base import Charge, Counts, Store
from quotalimit.usage import Fold, Reading, Report, Usage, without

Told: TypeAlias = tuple[Report | Reading, tuple[object, ...], bool]
"""What was told, the objects that tell it, and whether it is known from elsewhere."""

_MOST_HANDED_ON: Final = 60
_MOST_UNREAD: Final = 50


class Part:
    """One layer's part in a call: what is held for it, and what was read of the call's usage for it."""

    fold: Fold | None = None
    """What the items of a stream told."""

    reading: Reading | None = None
    """What the result or the exception of the call told."""

    passed: Fold | None = None
    """What of that the enclosing call has read by itself, from what was handed on to it."""

    used = 0
    """What was used in the end."""

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

    def tell(self, told: Sequence[tuple[Report | Reading, bool]]) -> None:
        """Take what a result, an exception or an item of a stream told, but for what is known from elsewhere."""
        self.told = True
        self.untold = 0
        if self.fold is not None:
            for report, known in told:
                self.fold.add(Report(report) if isinstance(report, Usage) else report, known)
            return
        new = [report for report, known in told if not known and not isinstance(report, Report)]
        if len(new) > 1:  # the responses of a list
            self.reading = sum((each for each in new if isinstance(each, Usage)), Usage())
        elif new:
            self.reading = new[0]

    def pass_on(self, report: Report | Reading) -> None:
        """Know that the enclosing call has read a report by itself."""
        self.passed = self.passed or Fold()
        self.passed.add(Report(report, None, self.fold is None) if isinstance(report, Usage) else report, False)


class Call(Recorder):
    """One admitted call that has something to settle. It is settled once, whatever ends it; only the first end counts.

    An end that an interrupt cuts short is none. The next one settles what is still open: at the latest, when the call
    is collected.

    Usage that was recorded while it ran, and what its nested calls used, is kept by the `Recorder` that it is.
    """

    _result: object = None
    _read_from: tuple[object, ...] = ()
    _handed_on: Sequence[tuple[Part, Told]] = ()
    """What was told of late and the enclosing call may read by itself, where it was handed on to it."""

    _written = 0
    _cut = False
    _dropped = False
    """Whether this may be the work of a finalizer, in which no listener is called."""

    settled: Sequence[Settlement] = ()
    """What was charged on each token budget in the end, if anybody asks."""

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
                parts[0].tell([(self._reading, False)])
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
        told: list[tuple[Part, list[Told]]] = []
        for part in self.parts:
            layer = part.layer
            if isinstance(layer, TokenLayer):
                if streaming and part.fold is None:
                    part.fold = Fold()
                each = layer.read_each(answer, whole=part.fold is None, streaming=streaming)
                told.append((part, [(report, sources, self.knows(sources)) for report, sources in each]))
        for part, reports in told:
            if reports:
                self._take(part, reports)
                for _, sources, _ in reports:
                    if streaming:
                        self.remember_latest(sources)
                    elif self.enclosing is not None:
                        self._read_from += sources

    def _take(self, part: Part, told: Sequence[Told]) -> None:
        """Take what was told for a part."""
        part.tell([(report, known) for report, _, known in told])
        if self.enclosing is not None:
            self._handed_on = [*self._handed_on, *((part, each) for each in told if not each[2])]
            if len(self._handed_on) > _MOST_HANDED_ON:
                self._ask_enclosing(unfinished(self.enclosing))

    def _ask_enclosing(self, outer: Recorder | None) -> None:
        """Ask the enclosing call what it has read by itself. The last that it has not it may yet read."""
        unread: list[tuple[Part, Told]] = []
        for part, told in self._handed_on:
            if outer is not None and outer.knows(told[1]):
                part.pass_on(told[0])
            else:
                unread.append((part, told))
        self._handed_on = unread[-_MOST_UNREAD:]

    def finish(self, result: object = None) -> None:
        """Settle a call that returned."""
        self._end(self._conclude, result)

    def _conclude(self, result: object) -> None:
        """Settle what its result tells."""
        self._read(result)
        self._result = result
        self._settle(None)

    def finish_stream(self, result: object = None) -> None:
        """Settle a stream that has ended. It may have returned something; that it did not is no result to be read."""
        self.finish_as(()) if result is None else self.finish(result)

    def cut(self) -> None:
        """Settle a stream that was left before its end: what was written since it last told its usage is estimated."""
        self._end(self._conclude_cut)

    def _conclude_cut(self, _: None) -> None:
        self._cut = self._dropped = True
        self._settle(None)

    def finish_as(self, readings: Sequence[tuple[Reading, tuple[object, ...]]]) -> None:
        """Settle a call of which the usage is known from elsewhere."""
        self._end(self._conclude_as, readings)

    def _conclude_as(self, readings: Sequence[tuple[Reading, tuple[object, ...]]]) -> None:
        told = [(reading, sources, self.knows(sources)) for reading, sources in readings]
        if told:
            for part in self.parts:
                self._take(part, told)
            self._read_from = tuple([source for _, sources, _ in told for source in sources])
        self._settle(None)

    def fail(self, error: BaseException) -> None:
        """Settle a call that raised."""
        self._end(self._conclude_failed, error)

    def _conclude_failed(self, error: BaseException) -> None:
        self._cut = True
        self._read_failure(error)
        self._settle(error)

    def _read_failure(self, error: BaseException) -> None:
        """Read the usage that an exception tells, or what becomes of the holds."""
        usages = usages_of(error)
        new = [(usage, sources) for usage, sources in usages if not self.knows((error, *sources))]
        self._read_from = sources = (error, *(source for _, its in usages for source in its))
        for part in self.parts:
            if isinstance(part.layer, TokenLayer):
                outcome = part.layer.read_failure(error, begun=self._written > 0 or part.told)
                if isinstance(outcome, Verdict):
                    part.verdict = outcome
                elif usages and outcome == together(usages):  # some of which may be known from nested calls
                    self._take(part, [(together(new), sources, not new)])
                else:
                    self._take(part, [(outcome, sources, self.knows(sources))])

    def release(self) -> None:
        """Give back all that is held: the body of the call never ran."""
        self._end(self._conclude_released)

    def _conclude_released(self, _: None) -> None:
        self._dropped = True
        for part in self.parts:
            part.verdict = RELEASE
        self._settle(None)

    def _end(self, conclude: Callable[[Any], None], about: object = None) -> None:
        """End the call in one of its ways, unless it has ended already: several may try, in several threads.

        From here to `_settle` all are plain calls with one argument, between which no interrupt comes.
        """
        try:
            try:
                self._ends.pop()
            except IndexError:
                return
            self.finished = True
            conclude(about)
        except BaseException:  # an interrupt, or no stack left: the next end settles what this one could not
            self._reopen()
            raise

    def _reopen(self) -> None:
        if self._is_settled:
            return
        self._ends = [None]
        self.__class__ = InterruptedCall  # pyright: ignore[reportAttributeAccessIssue]

    def join(self, other: Call) -> None:
        """Settle another call, which began with this one and has not run, together with this one."""
        self._parts = [*self.parts, *other.parts]
        self.records = self.records or other.records

    def lenders(self, counts: Counts, identity: Identity) -> list[Charge]:
        """The call's own open charges on a count."""
        return [
            charge
            for part in self.parts
            for charge in part.charges
            if charge.open and charge.counts is counts and charge.identity == identity
        ]

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

    def _settle(self, error: BaseException | None) -> None:
        settled: list[Settlement] = []
        charged: list[tuple[Charge, int]] = []
        for part in self.parts:
            layer = part.layer
            if isinstance(layer, TokenLayer):
                used, source = self._used(part, layer)
                part.used = used = min(used, MAX_UNITS)
                due = [(charge, self._owed(charge, used)) for charge in part.charges if charge.is_counted]
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
            self._tell_enclosing(charged)
            self.enclosing = unfinished(self.enclosing)  # what it began may live on, and not keep all that went before
        self._arguments, self._result, self._read_from, self._handed_on = (), None, (), ()
        if self.notes is not BLANK:
            self.forget()
        self.settled = settled
        self._is_settled = True
        if listeners and not self._dropped:
            tell()

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
        limiter = layer.limiter
        readings = [*part.readings, *(each for record in self.notes.recorded for each in record.read_by(limiter))]
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

    def _tell_enclosing(self, charged: list[tuple[Charge, int]]) -> None:
        """Hand what this call used, and where it was charged, to the call that it ran in."""
        outer = unfinished(self.enclosing)
        if outer is None:
            return
        self._ask_enclosing(outer)
        recorded = self.notes.recorded
        for record in recorded:
            outer.record_told(record)
        own: dict[object, list[Reading]] = {}
        for part in self.parts:
            if isinstance(part.layer, TokenLayer):
                readings = part.readings
                if part.passed is not None:
                    readings = without(readings, part.passed.readings)
                    if readings and not part.untold:
                        outer.catch_up()
                elif part.used and not readings and not recorded:
                    readings.append(part.used)
                own[part.layer.limiter] = readings
        told = [readings for readings in own.values() if readings]
        if told:
            of_model = (readings for readings in told if any(isinstance(each, Usage) for each in readings))
            best = told[0] if len(told) == 1 else next(of_model, told[0])
            outer.record_told(Record(best, (), own if len(own) > 1 else {}))
        outer.remember_latest(alive(list(self.notes.latest.values())))
        outer.remember(self._read_from)
        inside = ((charge.counts, charge.identity, units) for charge, units in charged)
        outer.record_inside([*self.notes.inside, *inside])

    def catch_up(self) -> None:
        for part in self.parts:
            part.untold = 0


class InterruptedCall(Call):
    """A call of which an end was, or may be, cut short: if no other follows, it is settled when it is collected.

    Other calls have no finalizer: it would be in the way of every call, and an interrupt that strikes one is lost.
    """

    def __del__(self) -> None:
        try:
            self.cut()
        except BaseException:  # a reader that always raises: no other end will come
            for part in self.parts:
                part.store.settle([(charge, part.reserve) for charge in part.charges])
            raise


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
    """The charges from which a nested call on the same count takes its need first, the nearest first."""
    found: list[Charge] = []
    while (recorder := unfinished(recorder)) is not None:
        if isinstance(recorder, Call):
            found += recorder.lenders(counts, identity)
        recorder = recorder.enclosing
    return found
