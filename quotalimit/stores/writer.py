"""Writes what nobody waits for: settlements by finalizers, of cancelled tasks, and those that a store was down for."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable
from typing import Final, Protocol
from weakref import WeakSet

from quotalimit._waiting import ThreadBell

log: Final = logging.getLogger("quotalimit")

_GRACE: Final = 0.05
"""Seconds left to the call itself, or to the next, to write what was settled."""
_RETRY: Final = 1.0
_LINGER: Final = 5.0


class Written(Protocol):
    """A store that has settlements to write."""

    @property
    def busy(self) -> bool:
        """Whether a settlement is not written yet, or a charge open that may be settled at any time."""
        ...

    @property
    def behind(self) -> bool:
        """Whether a settlement is not written yet."""
        ...

    def flush(self) -> None: ...
    def close(self) -> None: ...
    def before_fork(self) -> None: ...
    def after_fork(self, *, in_child: bool) -> None: ...


class Writer:
    """One daemon thread for all stores of the process, there while any of them has a charge open.

    It is started where a charge is taken, never by a settlement, which a finalizer may make where no lock can be had.
    """

    def __init__(self) -> None:
        self.known: WeakSet[Written] = WeakSet()
        """All stores of the process that wait for I/O."""
        self._watched: set[Written] = set()
        self._lock = threading.RLock()  # a finalizer or a signal handler may call while its own thread does
        self._bell = ThreadBell()
        self._thread: threading.Thread | None = None
        self._forking: list[Written] = []

    def watch(self, store: Written) -> None:
        """Keep a store, and write for it, until none of its charges is open."""
        with self._lock:
            self._watched.add(store)
            if self._thread is None or not self._thread.is_alive():  # an interrupt may have come before it started
                self._thread = threading.Thread(target=self._run, name="quotalimit-writer", daemon=True)
                self._thread.start()

    def ring(self) -> None:
        """Tell the thread that something was settled. Takes no lock that could be held."""
        self._bell.ring()

    def _run(self) -> None:
        nap = _LINGER
        while True:
            rang = self._bell.wait(nap)
            if rang:
                threading.Event().wait(_GRACE)
            for store in tuple(self._watched):
                if store.behind:
                    _try(store.flush)
            behind = any(store.behind for store in tuple(self._watched))
            nap = _RETRY if behind else _LINGER
            if not rang and not behind and self._ends():
                return

    def _ends(self) -> bool:
        with self._lock:
            for store in tuple(self._watched):
                self._watched.discard(store)
                if store.busy:  # only now, so that what a finalizer begins to watch meanwhile stays
                    self._watched.add(store)
            if self._watched:
                return False
            self._thread = None
            return True

    def close_all(self) -> None:
        """At the exit of the interpreter: write what is settled, and let go of files and sockets."""
        for store in list(self.known):
            _try(store.close)

    def before_fork(self) -> None:
        self._lock.acquire()
        self._forking = list(self.known)
        for store in self._forking:
            store.before_fork()

    def after_fork(self, *, in_child: bool) -> None:
        for store in reversed(self._forking):
            store.after_fork(in_child=in_child)
        self._forking.clear()
        if in_child:  # threads do not survive a fork
            self._watched = set()
            self._bell = ThreadBell()
            self._thread = None
        self._lock.release()


def _try(act: Callable[[], None]) -> None:
    """Do something for one store: what it raises must not stop the others'."""
    try:
        act()
    except Exception:
        log.exception("a store could not write what was settled")


WRITER: Final = Writer()

atexit.register(WRITER.close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=WRITER.before_fork,
        after_in_parent=lambda: WRITER.after_fork(in_child=False),
        after_in_child=lambda: WRITER.after_fork(in_child=True),
    )
