"""Usage that is recorded while a call runs."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar, Token
from enum import Enum
from numbers import Real
from typing import Final
from weakref import ref

from quotalimit.amounts import units_or_none
from quotalimit.keys import Identity
from quotalimit.providers import REPORTS, fields_of, read_usage
from quotalimit.usage import Reading

_MOST_LATEST: Final = 100


class Notes:
    """What was recorded while a call ran, and what usage was read from."""

    __slots__ = ("inside", "latest", "recorded", "sources")

    def __init__(self) -> None:
        self.recorded: list[tuple[Reading, tuple[object, ...]]] = []
        """Usage, and the objects that it was read from."""
        self.inside: list[tuple[object, Identity, int]] = []
        """What nested calls, perhaps in other threads, have charged: the counts, whose they are, and the units."""
        self.sources: dict[int, object] = {}
        """What usage was read from, by id: the objects, or references to them. The id of a dead one may come again."""
        self.latest: dict[int, object] = {}
        """The last of those that items of a stream were read from."""


BLANK: Final = Notes()
"""The notes of calls for which nothing was noted, as for most. Nothing is ever added to them."""


class Recorder:
    """The usage recorded while a call runs, each source once, and the call that it runs in."""

    enclosing: Recorder | None = None
    """The call that it runs in."""

    records = True
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
            self._own_notes().recorded.append((reading, sources))
            self.remember(sources)

    def record_inside(self, charged: Iterable[tuple[object, Identity, int]]) -> None:
        """Add what a nested call has charged."""
        self._own_notes().inside.extend(charged)

    def remember(self, sources: Iterable[object]) -> None:
        """Know these objects from now on."""
        known = self._own_notes().sources
        for source in sources:
            try:
                known[id(source)] = ref(source)
            except TypeError:  # a dict
                known[id(source)] = source

    def remember_latest(self, sources: Iterable[object]) -> None:
        """Know what usage was read from, and forget what it was read from long before.

        An item of a stream is recorded soon after it was yielded, if at all, and there may be a million of them.
        """
        latest = self._own_notes().latest
        for source in sources:
            latest[id(source)] = source
        if len(latest) > 2 * _MOST_LATEST:
            for old in list(latest)[:-_MOST_LATEST]:  # at once, for threads may be here side by side
                latest.pop(old, None)

    def forget(self) -> None:
        """Let go of what was recorded and read."""
        self.__dict__.pop("notes", None)

    def knows(self, sources: tuple[object, ...]) -> bool:
        """Whether usage has been read from one of these objects."""
        notes = self.notes
        return any(id(source) in notes.latest or _is(notes.sources.get(id(source)), source) for source in sources)


def _is(known: object, source: object) -> bool:
    """Whether this is what is known, or what that refers to."""
    return known is source or (type(known) is ref and known() is source)


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

    Takes a model's response, a `Usage`, or a number of units to charge as they are. Returns True if it was recorded;
    outside a call that a token budget counts it does nothing and returns False, as for a response that reports no
    usage. The same response, recorded twice or recorded and returned, counts once. Raises `ValueError` for a number
    that is negative, boolean or not finite.
    """
    recorder = running()
    if recorder is None:
        return False
    reading = to_reading(response)
    if reading is None:
        if issubclass(type(response), Real):
            raise ValueError(f"usage must be a number of at least 0, not {response!r}")
        return False
    recorder.record(reading, sources_of(response))
    return True


def to_reading(response: object) -> Reading | None:
    """What a response, a `Usage` or a number says was used; None if it says nothing that makes sense."""
    return units_or_none(response) if issubclass(type(response), Real) else read_usage(response)


def sources_of(result: object) -> tuple[object, ...]:
    """The objects by which usage is recognised as read before: the result and its `usage`. Never bare values."""
    if result is None or type(result) is tuple or issubclass(type(result), (str, bytes, int, float, Enum)):
        return ()
    fields = fields_of(result)
    for name in REPORTS:
        reported = fields.get(name)
        if reported is not None:
            return (result,) if issubclass(type(reported), (int, float)) else (result, reported)
    return (result,)
