"""The rows of an SQLite file that one transaction reads and changes: one for each count of an identity."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

from quotalimit.algorithms.base import Algorithm, Mark, State
from quotalimit.errors import StoreFull
from quotalimit.keys import Identity
from quotalimit.rate import SECOND
from quotalimit.stores.journal import ADJUST, LARGE, REDATE, TAKE, Journal, Journals, Step
from quotalimit.stores.shared import SharedCounts, written

_LATEST: Final = (1 << 62) - 1
_SWEEP: Final = 4
"""Rows looked at in each call: more than it can add, so that idle ones never pile up and no call pauses for them."""
_SWEEP_WHEN_FULL: Final = 512
_LONGEST_CALL: Final = 86_400 * SECOND
"""How long a reset is known, so that a hold of before it gives nothing back after it."""
_SLACK: Final = 4
"""A large state is kept a quarter of its period longer, so that not every call writes when it will be idle."""


class Row:
    """One count of one identity, as of the transaction's time. One without an `id` is not in the file yet.

    `idle_at` is when the file says that the row may go: the state will say no more than None does, and no hold on it
    can be settled any more. `held_until` is what the holds of this transaction ask for.
    """

    __slots__ = (
        "changed",
        "counts",
        "epoch",
        "held_until",
        "id",
        "identity",
        "idle_at",
        "journal",
        "now",
        "state",
        "steps",
    )

    def __init__(self, counts: SharedCounts, identity: bytes, now: int) -> None:
        self.counts = counts
        self.identity = identity
        self.now = now
        self.id: int | None = None
        self.epoch = 0
        self.idle_at = 0
        self.held_until = 0
        self.journal: Journal | None = None
        self.state: State = None
        self.steps: list[Step] = []
        self.changed = False

    def redate(self, limit: Algorithm) -> None:
        dated = limit.redate(self.state, self.now)
        if dated is not self.state:
            self._change(dated, (REDATE, self.now, 0, 0))

    def take(self, limit: Algorithm, cost: int, *, holds: bool) -> Mark:
        state, mark = limit.take(self.state, cost, self.now)
        if state is not None:
            self._change(state, (TAKE, self.now, 0, cost))
        if holds:
            self.held_until = self.now + self._hold_for(limit)
            self.changed = self.changed or self.epoch > 0  # so that the reset before is known as long
        return mark

    def adjust(self, limit: Algorithm, mark: Mark, delta: int) -> None:
        state = limit.adjust(self.state, mark, delta, self.now)
        if state is not None and (self.id is not None or limit.matters(state, self.now)):
            self._change(state, (ADJUST, self.now, mark, delta))

    def reset(self) -> None:
        """Forget what was used. The row stays for a while, to tell the holds of before from those of after."""
        self.state = None
        self.epoch += 1
        self.held_until = self.now + self._hold_for(self.counts.slowest)
        self.changed = True

    def _hold_for(self, limit: Algorithm) -> int:
        """How long a row stays for what is held: a period, or after a reset as long as the longest calls run."""
        return max(limit.period, _LONGEST_CALL) if self.epoch else limit.period

    def _change(self, state: State, step: Step) -> None:
        self.state = state
        self.changed = True
        if self.journal is not None:
            self.journal.state = state
            self.steps.append(step)


class Rows:
    """The rows of one transaction, each read once and written once."""

    def __init__(
        self,
        file: sqlite3.Connection,
        journals: Journals,
        now: int,
        *,
        max_keys: int,
        places: Sequence[SharedCounts],
        swept: int,
    ) -> None:
        self._file = file
        self._journals = journals
        self._now = now
        self._max_keys = max_keys
        self._places = places
        self.swept = swept
        """The row at which the next sweep goes on."""
        self._rows: dict[tuple[SharedCounts, bytes], Row] = {}

    def find(self, counts: SharedCounts, identity: Identity, limit: Algorithm) -> Row:
        """The row of an identity, re-dated. Raises `ValueError` for one that is damaged."""
        name = written(identity)
        row = self._rows.get((counts, name))
        if row is None:
            row = self._rows[counts, name] = self._read(counts, name, limit)
            row.redate(limit)
        return row

    def make_room(self, counts: SharedCounts) -> None:
        """Check that the rows which are not in the file yet may be added. Raises `StoreFull`."""
        if self._is_full(counts):
            self.sweep(_SWEEP_WHEN_FULL)
            if self._is_full(counts):
                raise StoreFull(
                    f"{counts.name}: already counting for {self._max_keys} identities, so a new one is refused: "
                    "raise max_keys of the SQLiteStore, or limit by a coarser key in front"
                )

    def _is_full(self, counts: SharedCounts) -> bool:
        new = sum(row.counts is counts and row.id is None for row in self._rows.values())
        (keys,) = self._file.execute("SELECT keys FROM counts WHERE id = ?", (self._place(counts),)).fetchone()
        return bool(keys + new > self._max_keys)

    def write(self) -> None:
        """Write the rows that have changed."""
        for row in self._rows.values():
            if row.changed:
                if row.journal is not None and row.state is not None:
                    self._write_large(row, row.journal)
                else:
                    self._write_small(row)

    def sweep(self, batch: int = _SWEEP) -> None:
        """Look at some rows, and remove those that are idle and not this transaction's."""
        found = self._file.execute(
            "SELECT id, place, identity, dated, idle_at, journal FROM states WHERE id > ? ORDER BY id LIMIT ?",
            (self.swept, batch),
        ).fetchall()
        self.swept = found[-1][0] if found and len(found) == batch else 0
        for id_, place, identity, dated, idle_at, journal in found:
            if dated > self._now:  # the clock has stepped back
                idle_at += self._now - dated
                self._file.execute("UPDATE states SET dated = ?, idle_at = ? WHERE id = ?", (self._now, idle_at, id_))
            if idle_at <= self._now and not self._is_used(id_, place, identity):
                self._file.execute("DELETE FROM states WHERE id = ?", (id_,))
                self._file.execute("UPDATE counts SET keys = keys - 1 WHERE id = ?", (place,))
                if journal is not None:
                    self._journals.remove(self._file, journal)

    def _is_used(self, id_: int, place: int, identity: bytes) -> bool:
        """Whether a row is this transaction's, or this process holds a charge of it open."""
        return any(row.id == id_ for row in self._rows.values()) or any(
            counts.slot == place and identity in counts.open for counts in self._places
        )

    def _read(self, counts: SharedCounts, identity: bytes, limit: Algorithm) -> Row:
        row = Row(counts, identity, self._now)
        found = self._file.execute(
            "SELECT id, epoch, dated, idle_at, journal, first, state FROM states WHERE place = ? AND identity = ?",
            (self._place(counts), identity),
        ).fetchone()
        if found is not None:
            row.id, row.epoch, dated, row.idle_at, journal, first, state = found
            row.idle_at -= max(0, dated - self._now)
            if journal is not None:
                row.journal = self._journals.open(self._file, journal, first, limit)
                row.state = row.journal.state
            elif state is not None:
                row.state = limit.load(state)
        return row

    def _write_small(self, row: Row) -> None:
        """Write a row with its state; into a journal if it has grown large."""
        limit = row.counts.slowest
        if row.journal is not None:
            self._journals.remove(self._file, row.journal.id)
            row.journal = None
        row.idle_at = max(row.idle_at, row.held_until)
        state = None
        if row.state is not None:
            state = limit.dump(row.state)
            row.idle_at = max(row.idle_at, limit.whole_at(row.state, self._now))
            if len(state) > LARGE:
                row.journal = self._journals.begin(self._file, row.state, state)
                state = None
        self._write(row, state)

    def _write_large(self, row: Row, journal: Journal) -> None:
        """Write the changes of a state that is in a journal; all of it if it is small again."""
        limit = row.counts.slowest
        first = journal.first
        state = self._journals.write(self._file, journal, row.steps, limit)
        idle_at = max(limit.whole_at(row.state, self._now), row.held_until)
        if state is not None:
            row.journal = None
        if state is not None or journal.first != first or idle_at > row.idle_at:
            row.idle_at = max(row.idle_at, idle_at + limit.period // _SLACK)
            self._write(row, state)

    def _write(self, row: Row, state: bytes | None) -> None:
        journal, first = (None, None) if row.journal is None else (row.journal.id, row.journal.first)
        values = (row.epoch, self._now, min(row.idle_at, _LATEST), journal, first, state)
        if row.id is not None:
            self._file.execute(
                "UPDATE states SET epoch = ?, dated = ?, idle_at = ?, journal = ?, first = ?, state = ? WHERE id = ?",
                (*values, row.id),
            )
            return
        place = self._place(row.counts)
        row.id = self._file.execute(
            "INSERT INTO states (epoch, dated, idle_at, journal, first, state, place, identity)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, place, row.identity),
        ).lastrowid
        self._file.execute("UPDATE counts SET keys = keys + 1 WHERE id = ?", (place,))

    def _place(self, counts: SharedCounts) -> int:
        """The number of the counts of a limit in the file; they are added if they are new."""
        if counts.slot is None:
            name = counts.name.encode("utf-8", "surrogatepass"), counts.position, counts.limit_id
            self._file.execute("INSERT OR IGNORE INTO counts (name, position, limit_id) VALUES (?, ?, ?)", name)
            (counts.slot,) = self._file.execute(
                "SELECT id FROM counts WHERE name = ? AND position = ? AND limit_id = ?", name
            ).fetchone()
        place: int = counts.slot
        return place
