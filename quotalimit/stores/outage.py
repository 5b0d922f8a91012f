"""What happens while a store cannot answer: who fails at once, who tries again, and what is said of it."""

from __future__ import annotations

import logging
import threading
from typing import Final

from quotalimit import clock
from quotalimit.errors import StoreUnavailable
from quotalimit.events import Event, listeners, tell

log: Final = logging.getLogger("quotalimit")

PAUSE: Final = 1.0
"""Seconds for which calls fail at once after one has failed; then one call tries again."""


class Outage:
    """A circuit breaker: after a failure the next calls do not each wait for the time-out.

    `remedy` is what the log says of the calls meanwhile; None for a store that raises, of which its exceptions tell.
    """

    def __init__(self, remedy: str | None) -> None:
        self._remedy = remedy
        self._error: StoreUnavailable | None = None
        self._try_at = 0.0
        self._said_kept = False
        self._lock = threading.RLock()  # a finalizer or a signal handler may call while its own thread does

    def __enter__(self) -> None:
        """Begin to ask the store. Raises `StoreUnavailable` if it failed a moment ago."""
        self.check()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, StoreUnavailable):
            self.begin(error)

    def check(self) -> None:
        """Raise `StoreUnavailable` if the store failed a moment ago; one call a second goes ahead to try it."""
        error = self._error
        if error is None:
            return
        with self._lock:
            now = clock.monotonic()
            if now >= self._try_at:
                self._try_at = now + PAUSE
                return
        raise StoreUnavailable(*error.args) from error

    def begin(self, error: StoreUnavailable) -> None:
        """Note a failure; the first of an outage is logged."""
        with self._lock:
            first, self._error = self._error is None, error
            self._try_at = clock.monotonic() + PAUSE
        if first and self._remedy is not None:
            log.warning("%s; %s (said once for each outage)", error, self._remedy)
        if first and listeners:
            tell(Event("store_failed", error=error))

    def end(self) -> None:
        """Note that the store has answered."""
        error = self._error
        if error is None:
            return
        with self._lock:
            self._error = None
            self._try_at = 0.0
            said, self._said_kept = self._said_kept or self._remedy is not None, False
        if said:
            log.warning("the store answers again, after: %s", error)

    def say_kept(self, error: StoreUnavailable) -> None:
        """Log, once for each outage, that settlements wait for its end."""
        with self._lock:
            said, self._said_kept = self._said_kept, True
        if not said:
            log.warning("%s; what calls used is kept in memory, and written when the store answers again", error)

    def retry_now(self) -> None:
        """Let the next call try again."""
        self._try_at = 0.0
