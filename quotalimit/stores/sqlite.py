"""Counts in an SQLite file: several processes of one machine share them, and they outlive a restart."""

from __future__ import annotations

import asyncio
import math
import os
import struct
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Final
from weakref import finalize

from quotalimit import clock
from quotalimit.errors import StoreFull, StoreUnavailable
from quotalimit.stores.base import Answer, Claim, decide, reentered
from quotalimit.stores.charges import lend, refusal_of
from quotalimit.stores.database import Database
from quotalimit.stores.journal import Journals
from quotalimit.stores.rows import Row, Rows
from quotalimit.stores.settlements import Change, SharedCharge
from quotalimit.stores.shared import OnUnavailable, Question, SharedStore

_NONSENSE: Final = (ValueError, TypeError, OverflowError, struct.error)
"""What comes of contents that nobody has written: SQLite's columns hold values of any type."""


class SQLiteStore(SharedStore):
    """Counts in a file: `SQLiteStore("quota.db")`. Exact among all threads, tasks and processes of one machine.

    `timeout` is how many seconds a call waits for the file's lock. `on_unavailable` is what becomes of a call when it
    cannot be had: `"raise"` raises `StoreUnavailable`, `"allow"` admits and charges nothing, another store is asked
    instead. `max_keys` bounds the identities that one limit counts for. The file must be on a local disk, and is the
    store's own. What a process has charged outlives its kill; a power failure may take the last moments with it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout: float = 1.0,
        on_unavailable: OnUnavailable = "raise",
        max_keys: int = 1_000_000,
    ) -> None:
        name = os.fspath(path)
        if not isinstance(name, str) or name in ("", ":memory:") or "\0" in name:
            raise ValueError(f"path must be that of a file, not {name!r}: for counts in memory there is MemoryStore")
        super().__init__(timeout=timeout, on_unavailable=on_unavailable, max_keys=max_keys)
        self._database = Database(Path(name).absolute(), timeout)
        self._journals = Journals()
        self._opened = 0
        self._files = 0
        self._swept = 0
        self._threads: ThreadPoolExecutor | None = None
        self._failed = -math.inf, StoreUnavailable()
        """When a question of a task failed last, and how."""
        finalize(self, self._database.close).atexit = False
        try:
            self._database.check()
        except StoreUnavailable as error:
            if self._raises:
                raise
            self._outage.begin(error)

    def _ask(self, question: Question) -> Answer:
        patience = max(0.0, question.deadline - clock.monotonic())
        # A loop of one turn: unlike after a call, no interrupt can come between taking the lock and the `try`.
        for taken in starmap(self._lock.acquire, [(True, patience)]):
            if taken:
                try:
                    return self._transact(question)
                finally:
                    self._lock.release()
        raise self._database.busy()

    async def _ask_async(self, question: Question) -> Answer:
        asked = self._submit(question)
        if asked is None:
            return self._ask(question)
        try:
            return await asyncio.wrap_future(asked)
        except asyncio.CancelledError:
            if not asked.cancel():
                asked.add_done_callback(partial(self._abandon, question))
            raise

    def _submit(self, question: Question) -> Future[Answer] | None:
        """Ask in the store's thread; None if the interpreter ends, where no thread can be had any more."""
        while True:
            threads = self._threads
            if threads is None:  # two of them, if two are made at once, do no harm
                self._threads = threads = ThreadPoolExecutor(1, "quotalimit-sqlite")
            try:
                return threads.submit(self._ask_in_turn, question)
            except RuntimeError:
                if self._threads is threads:  # else the store was closed meanwhile
                    return None

    def _ask_in_turn(self, question: Question) -> Answer:
        """Ask with all of the time-out, for until now a question of a task has waited for others, not for the file.

        One that waited while another failed has failed with it: together they wait no longer than each alone.
        """
        failed_at, failure = self._failed
        if question.deadline - self._timeout < failed_at:
            raise StoreUnavailable(*failure.args) from failure
        question.deadline = clock.monotonic() + self._timeout
        try:
            return self._ask(question)
        except StoreUnavailable as error:
            self._failed = clock.monotonic(), error
            raise

    def _abandon(self, question: Question, asked: Future[Answer]) -> None:
        """Undo what was done for a call that was cancelled while the file was asked."""
        if asked.exception() is None:
            self._undo(question, asked.result())

    def close(self) -> None:
        if self._is_mine():
            raise reentered()
        self._outage.retry_now()
        self.flush()
        with self._lock:
            self._database.close()
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False)

    def before_fork(self) -> None:
        super().before_fork()
        self._database.close()  # no connection may be carried across a fork, nor be closed in the child

    def after_fork(self, *, in_child: bool) -> None:
        if in_child:
            self._threads = None
        super().after_fork(in_child=in_child)

    def _transact(self, question: Question) -> Answer:
        """Answer in one transaction, and write what was settled in the same. The store's lock is held."""
        changes = self._settlements.due()
        answer = Answer(0)
        if not (changes or question.claims or question.resets):  # calls used just what they held
            return answer
        full: StoreFull | None = None
        begun = False
        try:
            self._database.begin(question.deadline)
            begun = True
            with self._database as file:
                if self._opened != self._database.opened:
                    self._forget_file()
                answer.now = max(clock.now(), question.not_before)
                rows = Rows(
                    file,
                    self._journals,
                    answer.now,
                    max_keys=self._max_keys,
                    places=self._places,
                    swept=self._swept,
                )
                try:
                    self._answer(question, changes.values(), rows, answer)
                except StoreFull as error:  # nothing is taken, but what was settled is written
                    full = error
                rows.write()
                rows.sweep()
                self._swept = rows.swept
            self._note(question, changes, answer)
        except BaseException as error:
            if self._database.is_through() and begun:  # an interrupt came after the COMMIT
                self._note(question, changes, answer)
                raise
            for charge in answer.charges:
                for lender, units in charge.borrowed.items():
                    lender.held += units
            if isinstance(error, _NONSENSE):
                raise self._database.damaged(error) from error
            raise
        if full is not None:
            raise full
        return answer

    def _note(self, question: Question, changes: Iterable[int], answer: Answer) -> None:
        """Note what was committed. It may be noted twice."""
        self._settlements.written(changes)
        for claim, charge in zip([claim for claim in question.claims if claim.holds], answer.charges, strict=False):
            claim.charge = charge
            charge.counts.opened(charge)
        for counts, identity in question.resets:
            counts.forget(identity)

    def _forget_file(self) -> None:
        """Forget what is known of the file: it was opened anew, perhaps as what was changed could not be written."""
        self._opened = self._database.opened
        self._journals.clear()
        for counts in self._places:
            counts.slot = None
        if self._files != self._database.files:  # what is held was taken in the file of before, and ended with it
            self._files = self._database.files
            self._settlements.forget()
            for counts in self._places:
                for identity in tuple(counts.open):
                    counts.forget(identity)

    def _answer(self, question: Question, changes: Iterable[Change], rows: Rows, answer: Answer) -> None:
        for change in changes:
            row = rows.find(change.counts, change.identity, change.limit)
            if row.epoch == change.epoch:
                row.adjust(change.limit, change.mark, change.delta)
        for counts, identity in question.resets:
            rows.find(counts, identity, counts.slowest).reset()
        found: list[Row] = []
        for place, claim in enumerate(question.claims):
            row = rows.find(claim.counts, claim.identity, claim.limit)
            found.append(row)
            if row.id is None and question.takes and (claim.cost or claim.holds):
                rows.make_room(claim.counts)
            refusal = refusal_of(claim, row.state, answer.now, claim.counts.charges(claim.identity))
            if refusal is not None:
                answer.refusals[place] = refusal
            if not question.takes:
                looked = decide(claim, row.state, answer.now, 0, None) if refusal is None else refusal
                answer.decisions.append(looked)
        if question.takes and not answer.refusals:
            for claim, row in zip(question.claims, found, strict=True):
                _take(claim, row, question, answer)


def _take(claim: Claim, row: Row, question: Question, answer: Answer) -> None:
    borrowed = lend(claim) if claim.lenders else {}
    cost = claim.cost - sum(borrowed.values())
    if cost or claim.holds:
        mark = row.take(claim.limit, cost, holds=claim.holds)
        if claim.holds:
            answer.charges.append(SharedCharge(claim, mark, cost, borrowed, row.epoch))
        else:
            undone = Change(claim.counts, claim.identity, claim.limit, mark, row.epoch, -cost)
            question.plain.append(undone)
    if question.report:
        answer.decisions.append(decide(claim, row.state, answer.now, 0, None))
