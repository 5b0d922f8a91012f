"""Usage that is recorded while a call runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar, Token
from numbers import Real
from typing import Final, NamedTuple, TypeAlias
from weakref import ref

from quotalimit.amounts import units_or_none
from quotalimit.keys import Identity
from quotalimit.providers import read_usage, responses_in
from quotalimit.usage import Reading

_MOST_LATEST: Final = 1_000

Mark: TypeAlias = object
"""What an object is recognised by: a weak reference, or itself if it knows none, as a dict."""
_NOTHING: Final[Mapping[object, Sequence[Reading]]] = {}


def _mark(source: object) -> Mark:
    try:
        return ref(source) if type(source).__weakrefoffset__ else source
    except Exception:  # a foreign class may do anything
        return source


def _marked(mark: Mark) -> object:
    """The object that a mark is of; None if it is gone."""
    return mark() if type(mark) is ref else mark


def alive(marks: Iterable[Mark]) -> list[object]:
    """The objects that marks are of, but for those that are gone."""
    return [source for source in map(_marked, marks) if source is not None]


class Record(NamedTuple):
    """Usage that was recorded while a call ran, or that a nested call told."""

    readings: Sequence[Reading]
    marks: Sequence[Mark] = ()
    """Of the objects that it was read from."""

    own: Mapping[object, Sequence[Reading]] = _NOTHING
    """The same as limiters that counted the nested call read it, where they are several."""

    def read_by(self, limiter: object) -> Sequence[Reading]:
        """The usage for a limiter."""
        return self.own.get(limiter, self.readings)


class Notes:
    """What was recorded while a call ran, and what usage was read from."""

    __slots__ = ("inside", "latest", "recorded", "sources")

    def __init__(self) -> None:
        self.recorded: list[Record] = []
        self.inside: list[tuple[object, Identity, int]] = []
        """What nested calls, perhaps in other threads, have charged: the counts, whose they are, and the units."""
        self.sources: dict[int, Mark] = {}
        """Marks of the objects that usage was read from, by id. The objects need not be kept alive: what comes at the
        address of a dead one is not what was marked."""
        self.latest: dict[int, Mark] = {}
        """The last of those that items of a stream were read from."""


BLANK: Final = Notes()
"""The notes of calls for which nothing was noted, as for most. Nothing is ever added to them."""


class Recorder:
    """The usage recorded while a call runs, each source once, and the call that it runs in."""

    enclosing: Recorder | None = None
    """The call that it runs in."""

    records: bool
    """Whether a token budget is among the call's layers."""

    finished = False

    notes: Notes = BLANK

    def _own_notes(self) -> Notes:
        """The notes, to be added to. They are put in place in one step, for threads may be first side by side."""
        notes = self.notes
        if notes is BLANK:
            notes = self.__dict__.setdefault("notes", Notes())
        return notes

    def record(self, reading: Reading, sources: tuple[object, ...]) -> None:
        """Add a reading, unless one of its sources has been read before."""
        if not self.knows(sources):
            self._own_notes().recorded.append(Record((reading,), [_mark(source) for source in sources]))
            self.remember(sources)

    def record_told(self, record: Record) -> None:
        """Add what a nested call tells, unless it was read from what has been read before."""
        sources = alive(record.marks)
        if not self.knows(sources):
            self._own_notes().recorded.append(record)
            self.remember(sources)

    def record_inside(self, charged: Iterable[tuple[object, Identity, int]]) -> None:
        """Add what a nested call has charged."""
        self._own_notes().inside.extend(charged)

    def remember(self, sources: Iterable[object]) -> None:
        """Know these objects from now on."""
        known = self._own_notes().sources
        for source in sources:
            known[id(source)] = _mark(source)

    def remember_latest(self, sources: Iterable[object]) -> None:
        """Know what usage was read from, and forget what it was read from long before.

        An item of a stream is recorded soon after it was yielded, if at all, and there may be a million of them.
        """
        latest = self._own_notes().latest
        for source in sources:
            latest.pop(id(source), None)  # at the address of a dead one, perhaps, which would be forgotten sooner
            latest[id(source)] = _mark(source)
        if len(latest) > 2 * _MOST_LATEST:
            for old in list(latest)[:-_MOST_LATEST]:  # at once, for threads may be here side by side
                latest.pop(old, None)

    def catch_up(self) -> None:
        """Know the usage of all that was written so far: a stream that was handed on in part has told the rest."""

    def forget(self) -> None:
        """Let go of what was recorded and read."""
        self.__dict__.pop("notes", None)

    def knows(self, sources: Iterable[object]) -> bool:
        """Whether usage has been read from one of these objects."""
        notes = self.notes
        if notes is BLANK:
            return False
        return any(
            _marked(known.get(id(source))) is source for source in sources for known in (notes.sources, notes.latest)
        )


_running: Final[ContextVar[Recorder | None]] = ContextVar("quotalimit_running", default=None)
begin: Final = _running.set
"""Make a recorder that of the running call; returns a token for `end`."""


def end(token: Token[Recorder | None] | None) -> None:
    """Go back to the call that ran before. A call of which an interrupt lost the token is passed over once it ended."""
    if token is not None:
        try:
            _running.reset(token)
        except ValueError:  # closed in another context than it began in, by a finalizer or an event loop
            pass


def running() -> Recorder | None:
    """The innermost call that is charged by its usage and has not ended."""
    return unfinished(_running.get())


def unfinished(recorder: Recorder | None) -> Recorder | None:
    """The first call that has not ended and is charged by its usage, from this one outwards."""
    while recorder is not None and (recorder.finished or not recorder.records):
        recorder = recorder.enclosing
    return recorder


def record_usage(response: object) -> bool:
    """Report what the running call used, where its return value does not show it.

    Takes a model's response, a list of them, a `Usage`, or a number of units to charge as they are. Returns True if it
    was recorded; outside a call that a token budget counts it does nothing and returns False, as for a response that
    reports no usage. The same response, recorded twice or recorded and returned, counts once. Raises `ValueError` for a
    number that is negative, boolean or not finite.
    """
    recorder = running()
    if recorder is None:
        return False
    readings = readings_of(response)
    if not readings and issubclass(type(response), Real):
        raise ValueError(f"usage must be a number of at least 0, not {response!r}")
    for reading, sources in readings:
        recorder.record(reading, sources)
    return bool(readings)


def readings_of(used: object) -> list[tuple[Reading, tuple[object, ...]]]:
    """The usage that a response, a list of them, a `Usage` or a number says, and the objects that say it."""
    if issubclass(type(used), Real):
        units = units_or_none(used)
        return [] if units is None else [(units, ())]
    told = [(read_usage(each), sources) for each, sources in responses_in(used)]
    return [(usage, sources) for usage, sources in told if usage is not None]
