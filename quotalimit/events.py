"""What limits tell those who listen: admissions, refusals, waits, settlements and failures, as they happen."""

from __future__ import annotations

import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from quotalimit.decision import Decision
from quotalimit.errors import LimitExceeded, StoreUnavailable
from quotalimit.keys import Key

if TYPE_CHECKING:
    from quotalimit.settlement import Settlement

Kind: TypeAlias = Literal["admitted", "refused", "waited", "settled", "overrun", "store_failed"]
"""What happened.

`"admitted"`, `"refused"`: what a limiter answered a call. `"waited"`: a call that it delayed goes on, or gives up.
`"settled"`: a token budget was charged what a call used. `"overrun"`: that was more than the call had reserved.
`"store_failed"`: a store cannot answer; told once for each outage.
"""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to one limiter. Its text never shows the key: identities do not belong in logs."""

    kind: Kind

    name: str = ""
    """What the limiter is called; empty for a store."""

    key: Key | None = field(default=None, repr=False)
    """Whose call it was; None where nobody listened yet when the call began."""

    decision: Decision | None = None
    """What the limiter answered when the call asked: of several limits, the slowest to clear."""

    settlement: Settlement | None = None
    """What was charged in the end."""

    waited: float = 0.0
    """Seconds for which the limiter delayed the call."""

    enforced: bool = True
    """False for a layer with `enforce=False`, which only tells what it would have refused."""

    error: StoreUnavailable | None = None
    """Why the store cannot answer."""

    def __str__(self) -> str:
        if self.kind == "refused" and self.decision is not None:
            refusal = LimitExceeded(self.decision, "")
            return str(refusal) if self.enforced else f"{refusal} (not enforced)"
        if self.kind == "store_failed":
            return f"the store cannot answer: {self.error}"
        if self.kind == "waited":
            return f"{self.name}: waited {self.waited:.3f} s"
        if self.settlement is not None:
            charged = f"{self.settlement.charged} charged, {self.settlement.held} held ({self.settlement.source})"
            return f"{self.name}: {self.kind}: {charged}"
        if self.decision is not None:
            asked = f"{self.decision.requested} requested, {self.decision.remaining} remaining"
            return f"{self.name}: {self.kind}: {asked}"
        return f"{self.name}: {self.kind}"


Listener: TypeAlias = Callable[[Event], object]
"""What is called with every event."""

log: Final = logging.getLogger("quotalimit")
events_log: Final = logging.getLogger("quotalimit.events")

LEVELS: Final[dict[Kind, int]] = {
    "admitted": logging.DEBUG,
    "refused": logging.WARNING,
    "waited": logging.INFO,
    "settled": logging.DEBUG,
    "overrun": logging.WARNING,
    "store_failed": logging.ERROR,
}


def on_event(listener: Listener) -> Callable[[], None]:
    """Call a function with every `Event` of every limiter from now on. Returns a function that ends this.

    It is called in the thread or task of the call, before the call goes on, so it had better be short. What it raises
    is logged once and breaks no call; what it asks of limiters itself is not told. Raises `TypeError` for what is not
    to be called at once, such as an async function.
    """
    is_async = inspect.iscoroutinefunction(listener) or inspect.iscoroutinefunction(type(listener).__call__)
    if not callable(listener) or is_async:
        raise TypeError(f"a listener must be a plain function of an event, not {listener!r}")
    subscription = Subscription(listener)
    listeners.append(subscription)

    def stop() -> None:
        if subscription in listeners:
            listeners.remove(subscription)
        if not listeners:
            _late.clear()

    return stop


def log_event(event: Event) -> None:
    """A ready listener, `on_event(log_event)`: logs to "quotalimit.events", and never an identity.

    Refusals and overruns are warnings, a store that fails is an error, a wait is information, the rest for debugging.
    """
    events_log.log(LEVELS[event.kind], "%s", event)


class Subscription:
    """A listener, from when it was given to when it is taken back."""

    __slots__ = ("_has_failed", "_listener")

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._has_failed = False

    def hear(self, event: Event) -> None:
        """Call the listener. What it raises is logged, the first time."""
        try:
            self._listener(event)
        except Exception:
            if not self._has_failed:
                self._has_failed = True
                log.exception("the listener %r raised (said once for each listener)", self._listener)


listeners: Final[list[Subscription]] = []
"""Who listens. While nobody does, no event is made, and the fast paths of calls are open."""

_late: Final[deque[Event]] = deque()
_thread: Final = threading.local()


def tell(*events: Event) -> None:
    """Hand events to all listeners, those that came late first. Not for finalizers: a listener may take locks."""
    if is_telling():
        return
    _thread.is_telling = True
    try:
        for event in (*_take_late(), *events):
            for subscription in tuple(listeners):
                subscription.hear(event)
    finally:
        _thread.is_telling = False


def tell_later(event: Event) -> None:
    """Have an event told before the next one: for whatever may be a finalizer, which runs anywhere."""
    if not is_telling():
        _late.append(event)


def events_of(
    kind: Kind, name: str, key: Key, decision: Decision, waited: int, *, enforced: bool = True
) -> list[Event]:
    """What a limiter's answer is told as, after it delayed the call for some microseconds."""
    seconds = waited / 1e6
    event = Event(kind, name, key, decision, waited=seconds, enforced=enforced)
    return [Event("waited", name, key, decision, waited=seconds), event] if waited else [event]


def is_telling() -> bool:
    """Whether this thread is inside a listener."""
    return getattr(_thread, "is_telling", False)


def _take_late() -> list[Event]:
    late: list[Event] = []
    while _late:
        try:
            late.append(_late.popleft())
        except IndexError:  # another thread was faster
            break
    return late
