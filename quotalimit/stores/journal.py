"""Large states in an SQLite file: a snapshot and the changes since, so that a call writes its own change alone.

Each process keeps what it has read, and reads only what others have written since. Made again by the algorithm, the
same changes give every process the same state. Only logs grow large; their changes do not depend on a limit's amount.
"""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from struct import Struct
from typing import Final, TypeAlias, cast

from quotalimit.algorithms.base import Algorithm, State

LARGE: Final = 1_024
"""Bytes; a state that is written as more is kept in a journal, until it is written as `_SMALL` again."""
_SMALL: Final = 512
_CHUNK: Final = 64
"""Changes in one row, the last of which is rewritten at each change."""
_WORTH: Final = 64
"""Bytes of the next snapshot that each change pays for."""
_KEPT: Final = 64 << 20
"""Bytes of states, as they are written, that this process keeps."""

REDATE: Final = 0
TAKE: Final = 1
ADJUST: Final = 2

Step: TypeAlias = tuple[int, int, int, int]
"""One change of a state: what was done, when, at which mark, and the units."""

_STEP: Final = Struct("<Bqqq")


def make(step: Step, state: State, limit: Algorithm) -> State:
    """Make a change of a state again, as it was made where it was decided."""
    kind, now, mark, units = step
    state = limit.redate(state, now)
    if kind == TAKE:
        return limit.take(state, units, now)[0]
    return limit.adjust(state, mark, units, now) if kind == ADJUST else state


class Journal:
    """One large state, as it is after the first `count` changes of the chunk `number`.

    Its snapshot was made before the chunk `first`. All chunks but the last are full.
    """

    __slots__ = ("changes", "first", "id", "number", "size", "state")

    def __init__(self, id_: int, first: int, size: int, state: State) -> None:
        self.id = id_
        self.first = first
        self.size = size
        self.state = state
        self.number = first
        self.changes = bytearray()

    @property
    def count(self) -> int:
        return len(self.changes) // _STEP.size

    @property
    def is_due(self) -> bool:
        """Whether the changes since the snapshot are worth the next one."""
        return ((self.number - self.first) * _CHUNK + self.count) * _WORTH >= self.size

    def replay(self, chunks: Iterable[tuple[int, bytes]], limit: Algorithm) -> bool:
        """Make the changes that others have written; False if some that came before them are gone."""
        found = False
        for number, changes in chunks:
            if found and number == self.number + 1:
                self.begin_chunk(number)
            elif found or number != self.number:
                return False
            found = True
            for step in islice(_STEP.iter_unpack(changes), self.count, None):
                self.state = make(cast(Step, step), self.state, limit)
            self.changes[:] = changes
        return found or self.count == 0

    def begin_chunk(self, number: int) -> None:
        """Write the next change into this chunk."""
        self.number = number
        self.changes.clear()

    def note(self, step: Step) -> None:
        """Note a change that was made."""
        if self.count == _CHUNK:
            self.begin_chunk(self.number + 1)
        self.changes += _STEP.pack(*step)


class Journals:
    """The journals of one file that this process knows, the least recently used first."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, Journal] = OrderedDict()
        self._size = 0

    def open(self, file: sqlite3.Connection, id_: int, first: int, limit: Algorithm) -> Journal:
        """A journal, brought up to date. Raises `ValueError` for one that is damaged."""
        journal = self._known.get(id_)
        if journal is not None and journal.replay(_chunks(file, id_, journal.number), limit):
            self._known.move_to_end(id_)
            if journal.first != first:  # another process has made a snapshot
                journal.first = first
                if journal.number < first:
                    journal.begin_chunk(first)
                (size,) = file.execute("SELECT length(state) FROM snapshots WHERE journal = ?", (id_,)).fetchone()
                self._resize(journal, size)
            return journal
        self._forget(id_)
        row = file.execute("SELECT state FROM snapshots WHERE journal = ?", (id_,)).fetchone()
        if row is None:
            raise ValueError("a journal has no snapshot")
        journal = Journal(id_, first, len(row[0]), limit.load(row[0]))
        if not journal.replay(_chunks(file, id_, first), limit):
            raise ValueError("a journal has a gap")
        self._keep(journal)
        return journal

    def begin(self, file: sqlite3.Connection, state: State, written: bytes) -> Journal:
        """Keep a state that has grown large in a journal from now on."""
        id_ = file.execute("INSERT INTO snapshots (state) VALUES (?)", (written,)).lastrowid
        assert id_ is not None
        journal = Journal(id_, 0, len(written), state)
        self._keep(journal)
        return journal

    def write(
        self, file: sqlite3.Connection, journal: Journal, steps: Iterable[Step], limit: Algorithm
    ) -> bytes | None:
        """Write changes that were made of a journal's state; the state as bytes if it has become small again.

        Now and then this makes a snapshot. The chunks since the last one stay, for processes that are a little behind.
        """
        for step in steps:
            journal.note(step)
            file.execute("REPLACE INTO chunks VALUES (?, ?, ?)", (journal.id, journal.number, bytes(journal.changes)))
        if not journal.is_due:
            return None
        written = limit.dump(journal.state)
        if len(written) <= _SMALL:
            self.remove(file, journal.id)
            return written
        file.execute("DELETE FROM chunks WHERE journal = ? AND number < ?", (journal.id, journal.first))
        file.execute("UPDATE snapshots SET state = ? WHERE journal = ?", (written, journal.id))
        journal.first = journal.number + 1
        journal.begin_chunk(journal.first)
        self._resize(journal, len(written))
        return None

    def remove(self, file: sqlite3.Connection, id_: int) -> None:
        """Remove a journal."""
        file.execute("DELETE FROM chunks WHERE journal = ?", (id_,))
        file.execute("DELETE FROM snapshots WHERE journal = ?", (id_,))
        self._forget(id_)

    def clear(self) -> None:
        """Forget all journals: what was changed here was not written."""
        self._known.clear()
        self._size = 0

    def _keep(self, journal: Journal) -> None:
        self._known[journal.id] = journal
        self._size += journal.size
        while self._size > _KEPT and len(self._known) > 1:
            self._forget(next(iter(self._known)))

    def _resize(self, journal: Journal, size: int) -> None:
        self._size += size - journal.size
        journal.size = size

    def _forget(self, id_: int) -> None:
        journal = self._known.pop(id_, None)
        if journal is not None:
            self._size -= journal.size


def _chunks(file: sqlite3.Connection, id_: int, number: int) -> sqlite3.Cursor:
    return file.execute(
        "SELECT number, changes FROM chunks WHERE journal = ? AND number >= ? ORDER BY number", (id_, number)
    )
