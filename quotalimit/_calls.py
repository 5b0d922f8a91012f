"""A call that was admitted, from its check to its settlement: what it holds, used, and is charged."""

from __future__ import annotations

from collections.abc import Sequence

from quotalimit._layers import Layer, RateLayer, TokenLayer, log
from quotalimit.decision import Decision
from quotalimit.failures import KEEP, RELEASE, Verdict
from quotalimit.keys import Identity
from quotalimit.settlement import Settlement, Source
from quotalimit.stores.base import Charge, Counts, Store
from quotalimit.usage import Reading, Recorder, sources_of, text_bytes, tokens_in, unfinished


class Part:
    """One layer's part in a call: what it holds, and what the call was read to have used."""

    __slots__ = ("charges", "decisions", "layer", "reported", "reserve", "store")

    def __init__(self, layer: Layer, store: Store, reserve: int) -> None:
        self.layer = layer
        self.store = store
        self.reserve = reserve
        self.charges: list[Charge] = []
        self.decisions: list[Decision] = []
        self.reported: Reading | None = None

    @property
    def held(self) -> int:
        """Units taken for the call on each limit of the layer."""
        return max((charge.held + sum(units for _, units in charge.borrowed) for charge in self.charges), default=0)


class Call(Recorder):
    """One admitted call that has something to settle. It is settled once, whatever ends it; only the first end counts.

    Usage that was recorded while it ran, and what its nested calls used, is kept by the `Recorder` that it is.
    """

    __slots__ = ("_arguments", "_inside", "_parts", "_text")

    def __init__(self, enclosing: Recorder | None, parts: Sequence[Part], arguments: object) -> None:
        super().__init__(enclosing)
        self._parts = parts
        self._arguments = arguments
        self._text = 0
        self._inside: dict[tuple[Counts, Identity], int] = {}

    @property
    def counts_tokens(self) -> bool:
        """Whether a token budget is among the layers."""
        return any(isinstance(part.layer, TokenLayer) for part in self._parts)

    def see(self, item: object) -> None:
        """Read a result, or an item of a stream: numbers add up, of usages the last one counts."""
        for part in self._parts:
            if isinstance(part.layer, TokenLayer):
                reading = part.layer.read_result(item)
                if isinstance(reading, int) and isinstance(part.reported, int):
                    reading += part.reported
                if reading is not None:
                    part.reported = reading
        self._text += text_bytes(item)

    def finish(self, result: object = None) -> list[Settlement]:
        """Settle a call that returned."""
        if self.finished:
            return []
        self.see(result)
        return self._settle(KEEP, sources_of(result), None)

    def finish_as(self, reading: Reading | None, sources: tuple[object, ...] = ()) -> list[Settlement]:
        """Settle a call of which the usage is known from elsewhere."""
        for part in self._parts:
            part.reported = reading
        return self._settle(KEEP, sources, None)

    def fail(self, error: BaseException) -> list[Settlement]:
        """Settle a call that raised."""
        if self.finished:
            return []
        verdict: Verdict = RELEASE
        for part in self._parts:
            if isinstance(part.layer, TokenLayer):
                outcome = part.layer.read_failure(error)
                if isinstance(outcome, Verdict):
                    verdict = KEEP if outcome is KEEP else verdict
                else:
                    part.reported = outcome
        return self._settle(verdict, (error,), error)

    def release(self) -> None:
        """Give back all that is held: the body of the call never ran."""
        self._settle(RELEASE, (), None)

    def lenders(self, counts: Counts, identity: Identity) -> list[Charge]:
        """The open charges on a count of this call and of those that it runs in, nearest first."""
        own = [
            charge
            for part in self._parts
            for charge in part.charges
            if charge.open and charge.counts is counts and charge.identity == identity
        ]
        return own + lenders(self.enclosing, counts, identity)

    def _settle(self, verdict: Verdict, sources: tuple[object, ...], error: BaseException | None) -> list[Settlement]:
        if self.finished:
            return []
        self.finished = True
        read_before = self.knows(sources)
        due: dict[Store, list[tuple[Charge, int]]] = {}
        settled: list[Settlement] = []
        for part in self._parts:
            if isinstance(part.layer, TokenLayer):
                used, source = self._used(part, part.layer, verdict, read_before)
                settled.append(self._charge(part, used, source, due))
            else:
                refunds = isinstance(part.layer, RateLayer) and isinstance(error, part.layer.refund_on)
                due.setdefault(part.store, []).extend((c, 0 if refunds else part.held) for c in part.charges)
        for store, settlements in due.items():
            store.settle(settlements)
            for charge, units in settlements:
                place = (charge.counts, charge.identity)
                self._inside[place] = self._inside.get(place, 0) + units
        self._tell_enclosing(settled, sources)
        return settled

    def _used(self, part: Part, layer: TokenLayer, verdict: Verdict, read_before: bool) -> tuple[int, Source]:
        """What the call used on one budget, and how that is known."""
        readings = [reading for reading, _ in self.recorded]
        source: Source = "recorded"
        if part.reported is not None:
            source = "reported"
            if not read_before:
                readings.append(part.reported)
        known = [weight for weight in map(layer.weigh, readings) if weight is not None]
        if known:
            return sum(known), source
        if verdict is RELEASE:
            return 0, "released"
        if layer.reserves:
            return part.reserve, "reserved"
        estimate = tokens_in(text_bytes(self._arguments) + self._text)
        if not layer.estimates_silently:
            layer.estimates_silently = True
            log.warning(
                "%s: a call reported no usage and had no reserve, so %d tokens were estimated from its text; "
                "give token_budget a usage= or a reserve=, or call record_usage (said once for each function)",
                layer.limiter.name,
                estimate,
            )
        return estimate, "estimated"

    def _charge(self, part: Part, used: int, source: Source, due: dict[Store, list[tuple[Charge, int]]]) -> Settlement:
        """Charge a layer what its call used, less what was charged inside on the same count."""
        held, charged = part.held, 0
        for charge in part.charges:
            here = max(0, used - self._inside.get((charge.counts, charge.identity), 0))
            due.setdefault(part.store, []).append((charge, here))
            charged = max(charged, here)
        settlement = Settlement(part.layer.limiter.name, used, charged, held, source)
        for decision in part.decisions:
            decision.settlement = settlement
        return settlement

    def _tell_enclosing(self, settled: list[Settlement], sources: tuple[object, ...]) -> None:
        """Hand what this call used, and where it was charged, to the call that it ran in."""
        outer = unfinished(self.enclosing)
        if outer is None:
            return
        for reading, read_from in self.recorded:
            outer.record(reading, read_from)
        reported = next((part.reported for part in self._parts if part.reported is not None), None)
        if reported is not None:
            outer.record(reported, sources)
        elif not self.recorded and settled and settled[0].used:
            outer.record(settled[0].used, sources)
        if isinstance(outer, Call):
            for place, units in self._inside.items():
                outer._inside[place] = outer._inside.get(place, 0) + units


def lenders(recorder: Recorder | None, counts: Counts, identity: Identity) -> list[Charge]:
    """The charges from which a nested call on the same count takes its need first."""
    recorder = unfinished(recorder)
    return recorder.lenders(counts, identity) if isinstance(recorder, Call) else []
