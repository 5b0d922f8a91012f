"""An SQLite file, this process's connection to it, and what is said when it fails."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from quotalimit import clock
from quotalimit.errors import StoreUnavailable

T = TypeVar("T")

_APPLICATION: Final = 0x714C696D
"""Marks the file as ours: `qLim`."""
_VERSION: Final = 1
_SCHEMA: Final = f"""
CREATE TABLE IF NOT EXISTS counts (
    id INTEGER PRIMARY KEY, name BLOB NOT NULL, position INTEGER NOT NULL, limit_id TEXT NOT NULL,
    keys INTEGER NOT NULL DEFAULT 0, UNIQUE (name, position, limit_id)
);
CREATE TABLE IF NOT EXISTS states (
    id INTEGER PRIMARY KEY, place INTEGER NOT NULL, identity BLOB NOT NULL, epoch INTEGER NOT NULL,
    dated INTEGER NOT NULL, idle_at INTEGER NOT NULL, journal INTEGER, first INTEGER, state BLOB,
    UNIQUE (place, identity)
);
CREATE TABLE IF NOT EXISTS snapshots (journal INTEGER PRIMARY KEY AUTOINCREMENT, state BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS chunks (
    journal INTEGER NOT NULL, number INTEGER NOT NULL, changes BLOB NOT NULL, PRIMARY KEY (journal, number)
) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
"""

_REMEDIES: Final = {
    sqlite3.SQLITE_CORRUPT: "is damaged: move it away with its -wal and -shm files, and counting starts anew",
    sqlite3.SQLITE_NOTADB: "is not a database: give another path, or move the file away",
    sqlite3.SQLITE_READONLY: "is read-only: let this user write to the file and its directory",
    sqlite3.SQLITE_PERM: "is not permitted: let this user write to the file and its directory",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: make its directory, and let this user write there",
    sqlite3.SQLITE_FULL: "cannot grow: make room on its disk",
    sqlite3.SQLITE_IOERR: "cannot be read or written: look at its disk",
}
_PAUSES: Final = (0.0002, 0.0005, 0.001, 0.002, 0.003)
"""Seconds between tries for the lock, each longer than the last: others hold it for a fraction of a millisecond."""


class Database:
    """One SQLite file in WAL mode. `with database:` is a transaction that writes; its lock is taken by `begin`.

    Not safe for threads. A connection that failed is closed, and opened anew by the next `begin`.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        self.opened = 0
        """How often the file was opened: what is known of its rows holds for one opening."""
        self.files = 0
        """How often another file was found at the path: what was taken in one means nothing to the next."""
        self._timeout = timeout
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def begin(self, deadline: float) -> None:
        """Take the lock of the file, which keeps all others from writing. Raises `StoreUnavailable`.

        After an interrupt, a transaction may have begun: `is_through` tells, and ends it.
        """
        try:
            self._begin(deadline)
            if self._identify() != self._file:  # it was moved away, and others count in a new one
                self.close()
                self._file = None  # the new one may get the number of the old
                self._begin(deadline)
        except (sqlite3.Error, OSError) as error:
            if not _is_lock(error):
                self.close()
            raise self.explained(error) from error

    def _begin(self, deadline: float) -> None:
        if self._connection is None:
            self._connection = _insist(self._open, deadline)
        _insist(partial(self._connection.execute, "BEGIN IMMEDIATE"), deadline)

    def check(self) -> None:
        """Open the file if that can be done now. Raises `StoreUnavailable` for anything but a lock."""
        try:
            self._connection = self._open()
        except (sqlite3.Error, OSError) as error:
            if not _is_lock(error):
                raise self.explained(error) from error

    def __enter__(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._connection is not None
        if error is None:
            try:
                self._connection.execute("COMMIT")
            except sqlite3.Error as failure:
                self.close()
                raise self.explained(failure) from failure
        else:
            self.close()  # which rolls back
            if isinstance(error, sqlite3.Error):
                raise self.explained(error) from error

    def is_through(self) -> bool:
        """Whether a transaction that was begun is committed. One that is still open is rolled back."""
        if self._connection is not None and self._connection.in_transaction:
            self.close()
        return self._connection is not None

    def close(self) -> None:
        """Close the connection, if it is open. What was not committed is rolled back."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except sqlite3.Error:  # there is no more that could be done with it
                pass

    def busy(self) -> StoreUnavailable:
        """What to tell of a lock that was held too long."""
        return StoreUnavailable(
            f"the SQLite store {str(self.path)!r} has been locked for {self._timeout:g} s: find the process that keeps "
            "a transaction open, or raise timeout="
        )

    def damaged(self, error: Exception) -> StoreUnavailable:
        """What to tell of contents that make no sense."""
        return StoreUnavailable(f"the SQLite store {str(self.path)!r} {_REMEDIES[sqlite3.SQLITE_CORRUPT]} ({error})")

    def explained(self, error: Exception) -> StoreUnavailable:
        """What to tell of a failure: the path, what is wrong and what can be done."""
        if _is_lock(error):
            return self.busy()
        wrong = _REMEDIES.get(_code(error), "cannot be used")
        return StoreUnavailable(f"the SQLite store {str(self.path)!r} {wrong} ({error})")

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if tables and (application, version) != (_APPLICATION, _VERSION):
                raise sqlite3.DatabaseError("it holds tables of something else: give the store a file of its own")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            if not tables:
                connection.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(statement)
                connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        self.opened += 1
        found = self._identify()
        if not tables or found != self._file:
            self._file = found
            self.files += 1
        return connection

    def _identify(self) -> tuple[int, int] | None:
        """Which file is at the path now; None if there is none."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino


def _insist(step: Callable[[], T], deadline: float) -> T:
    """Do what needs a lock, again and again until the deadline."""
    left, tries = deadline - clock.monotonic(), 0
    while True:
        try:
            return step()
        except sqlite3.OperationalError as error:
            if left <= 0 or not _is_lock(error):
                raise
        pause = _PAUSES[min(tries, len(_PAUSES) - 1)]
        threading.Event().wait(pause)
        left -= pause
        tries += 1


def _code(error: Exception) -> int:
    """SQLite's primary result code."""
    code: Any = getattr(error, "sqlite_errorcode", 0)
    return int(code) & 0xFF


def _is_lock(error: Exception) -> bool:
    """Whether somebody else's lock is in the way."""
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
