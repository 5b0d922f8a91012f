"""The calls of one process that wait for room: in lines, in order of arrival.

A waiting call stands in the lines of all its counts at once, and takes nothing until it starts. Only the call at the
head of all its lines asks the store; it sleeps until the time that the store computed, or until it is rung. The flow
is written once, as a generator that says what it needs next; a driver for threads and one for tasks do it.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Generator, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from quotalimit import clock
from quotalimit._forks import in_child, let_go

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from quotalimit.stores.base import Answer, Claim, Store
    from quotalimit.stores.several import Several

FOREVER: Final = 1 << 62
"""Microseconds; the patience of `wait=math.inf`."""

_LONGEST_SLEEP: Final = 86_400_000_000
_LOOK_AGAIN: Final = 1_000_000
"""Microseconds after which a call behind a task of another event loop looks whether that still runs."""

Place: TypeAlias = Hashable
"""Where a line stands: the counts of a limit and an identity."""


class Bell(Protocol):
    """Wakes one waiting call, from any thread, also before it sleeps and from a finalizer."""

    @property
    def loop(self) -> AbstractEventLoop | None:
        """The event loop that must run for the call to start; None in a thread."""
        ...

    @property
    def blocks(self) -> AbstractEventLoop | None:
        """The event loop that stands still while the call waits; None where it blocks none."""
        ...

    def ring(self) -> None: ...


class Waiter:
    """One waiting call: what it needs at each of its places, and when it expects to start."""

    __slots__ = ("bell", "due", "is_out", "needs")

    def __init__(self, claims: Sequence[Claim], bell: Bell) -> None:
        self.bell = bell
        self.due = 0
        self.is_out = False
        self.needs: dict[Place, int] = {}
        for claim in claims:
            place = (claim.counts, claim.identity)
            self.needs[place] = self.needs.get(place, 0) + claim.need


class Line:
    """The calls that wait at one place, in order of arrival, and what they need together."""

    __slots__ = ("need", "waiters")

    def __init__(self) -> None:
        self.waiters: deque[Waiter] = deque()
        self.need = 0


class Lines:
    """The lines of this process, one for each place at which somebody waits. True if there is any."""

    def __init__(self) -> None:
        self.standing: dict[Place, Line] = {}
        self._lock = threading.RLock()  # a finalizer or a signal handler may ask while its own thread does
        self._blocked: list[AbstractEventLoop] = []
        """The event loops in whose threads a call waits, so that none of their tasks can start."""

    def __bool__(self) -> bool:
        return bool(self.standing)

    def forget(self) -> None:
        """In the child of a fork, where the threads that wait are no more."""
        let_go(self._lock)
        self.standing.clear()
        self._blocked.clear()

    def join(self, waiter: Waiter) -> None:
        with self._lock:
            if waiter.bell.blocks is not None:
                self._blocked.append(waiter.bell.blocks)
            for place, need in waiter.needs.items():
                line = self.standing.setdefault(place, Line())
                line.waiters.append(waiter)
                line.need += need

    def leave(self, waiter: Waiter) -> None:
        """Take a call out of its lines, and wake those that now stand at a head."""
        if not waiter.is_out:  # taken out as dead: this may be its finalizer, in the middle of another's turn
            with self._lock:
                self._remove(waiter)

    def look(self, waiter: Waiter) -> tuple[bool, bool]:
        """Whether a call stands at the head of all its lines; if not, whether a head may come to rest unnoticed."""
        with self._lock:
            others = [head for place in waiter.needs if (head := self._head(self.standing[place])) is not waiter]
        apart = any(head is not None and head.bell.loop not in (None, waiter.bell.loop) for head in others)
        return not others, apart

    def _head(self, line: Line) -> Waiter | None:
        """The first call of a line that can start. One whose loop is closed is taken out of its lines."""
        place = 0
        try:
            while not self._can_start(head := line.waiters[place]):
                if head.bell.loop is not None and head.bell.loop.is_closed():
                    self._remove(head)
                else:  # its loop rests, or is blocked: it keeps its place
                    place += 1
        except IndexError:
            return None
        return head

    def _can_start(self, waiter: Waiter) -> bool:
        loop = waiter.bell.loop
        return loop is None or (loop.is_running() and loop not in self._blocked)

    def _ring(self, line: Line) -> None:
        """Wake the first call of a line that can start, and those before it."""
        place = 0
        try:
            while True:
                waiter = line.waiters[place]
                waiter.bell.ring()
                if self._can_start(waiter):
                    return
                place += 1
        except IndexError:
            pass

    def _remove(self, waiter: Waiter) -> None:
        waiter.is_out = True
        if waiter.bell.blocks in self._blocked:
            self._blocked.remove(waiter.bell.blocks)
        for place, need in waiter.needs.items():
            line = self.standing.get(place, Line())
            try:
                line.waiters.remove(waiter)
            except ValueError:  # it was taken out as dead
                continue
            line.need -= need
            if line.waiters:
                self._ring(line)
            else:
                self.standing.pop(place, None)

    def ring(self, *place: Hashable) -> None:
        """Wake the call at the head of a line: there may be room. Takes no lock: a finalizer may settle anywhere."""
        line = self.standing.get(place)
        if line is not None:
            self._ring(line)

    def ring_all(self) -> None:
        """Wake the calls at the heads of all lines: the time was moved."""
        for line in tuple(self.standing.values()):
            self._ring(line)

    def announce(self, claims: Sequence[Claim], waiter: Waiter | None = None) -> None:
        """Tell claims which waiting calls they must not delay: the heads of their lines, and what all before need."""
        with self._lock:
            for claim in claims:
                place = (claim.counts, claim.identity)
                line = self.standing.get(place)
                head = None if line is None else self._head(line)
                if line is None or head is None or head is waiter:
                    claim.heads, claim.ahead = (), 0
                    continue
                claim.heads = ((head.needs[place], head.due),)
                claim.ahead = line.need - (waiter.needs[place] if waiter is not None else 0)


LINES: Final = Lines()
"""One for all stores, so that a call may stand in lines of several without ever waiting for itself."""

in_child(LINES.forget)


class Ask:
    """A step of a waiting call: ask the store again, at a time known to have come."""

    __slots__ = ("not_before",)

    def __init__(self, not_before: int) -> None:
        self.not_before = not_before


class Sleep:
    """A step of a waiting call: sleep for some microseconds, or until the bell rings."""

    __slots__ = ("microseconds",)

    def __init__(self, microseconds: int) -> None:
        self.microseconds = microseconds


Flow: TypeAlias = Generator[Ask | Sleep, Any, "Answer"]


def wait_for_room(lines: Lines, claims: Sequence[Claim], answer: Answer, bell: Bell) -> Flow:
    """Wait until refused claims are admitted, or until a claim that is refused has delayed the call for its patience.

    Returns the last answer, a refusal if it was not worth waiting. The driver sends the store's `Answer` to an `Ask`,
    and whether the bell rang to a `Sleep`.
    """
    deadlines: dict[int, int] = {}
    give_up = _give_up_at(answer, claims, deadlines)
    if give_up is None:
        return answer
    began = answer.now
    waiter = Waiter(claims, bell)
    waiter.due = answer.now + max(refusal.wait_us or 0 for refusal in answer.refusals.values())
    try:
        lines.join(waiter)
        slept_until = 0
        while True:
            first, watch = lines.look(waiter)
            if first or answer.now >= give_up:
                lines.announce(claims, waiter)
                expected = answer.now
                answer = yield Ask(slept_until)
                if answer.now < expected:  # the clock stepped back, which gives nobody more patience
                    began -= expected - answer.now
                    deadlines = {place: deadline - expected + answer.now for place, deadline in deadlines.items()}
                if not answer.refusals:
                    return answer
                give_up = _give_up_at(answer, claims, deadlines)
                if give_up is None:
                    return answer
            wake = give_up
            if first:
                waiter.due = answer.now + max(refusal.wait_us or 0 for refusal in answer.refusals.values())
                wake = min(wake, waiter.due)
            elif watch:
                wake = min(wake, answer.now + _LOOK_AGAIN)
            before = clock.now()
            nap = min(wake - answer.now, _LONGEST_SLEEP)
            rang = yield Sleep(nap)
            passed = clock.now() - before  # the store's clock need not agree with ours
            if passed < 0:  # the clock stepped back, and the store dates anew what it is asked
                slept_until = 0
            elif not rang and passed == 0:  # a clock that stands still: what was slept has passed all the same
                slept_until = answer.now + nap
            answer.now += nap if not rang and passed < nap else max(passed, 0)  # whatever the clock did meanwhile
    finally:
        lines.leave(waiter)
        for place in deadlines:
            claims[place].waited = answer.now - began


def is_worth_waiting(answer: Answer, claims: Sequence[Claim]) -> bool:
    """Whether a refused call may yet be admitted within the patience of the claims that are refused."""
    return bool(answer.refusals) and _give_up_at(answer, claims, {}) is not None


def _give_up_at(answer: Answer, claims: Sequence[Claim], deadlines: dict[int, int]) -> int | None:
    """When the first of the refused claims has delayed the call for its patience; None if waiting is no use."""
    now = answer.now
    for place, refusal in answer.refusals.items():
        deadline = deadlines.setdefault(place, now + claims[place].patience)
        if refusal.wait_us is None or deadline <= now:
            return None
        if now + refusal.wait_us > deadline and refusal.reason != "busy":  # an open hold may settle sooner
            return None
    return min(deadlines[place] for place in answer.refusals)


class ThreadBell:
    """A bell for a waiting thread."""

    __slots__ = ("_silent", "blocks")

    loop = None

    def __init__(self) -> None:
        asyncio: Any = sys.modules.get("asyncio")  # where a loop runs, it has been imported
        self.blocks: AbstractEventLoop | None = None if asyncio is None else asyncio._get_running_loop()
        self._silent = threading.Lock()
        self._silent.acquire()

    def ring(self) -> None:
        try:
            self._silent.release()
        except RuntimeError:  # it rang already
            pass

    def wait(self, seconds: float) -> bool:
        return self._silent.acquire(timeout=seconds)


class TaskBell:
    """A bell for a waiting asyncio task."""

    __slots__ = ("_event", "loop")

    blocks = None

    def __init__(self) -> None:
        import asyncio

        self.loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def ring(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop is closed: whoever looks for a head takes the call out of its line
            pass

    async def wait(self, seconds: float) -> bool:
        import asyncio

        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


def _may_wait(answer: Answer, claims: Sequence[Claim]) -> bool:
    """Whether a claim that is refused would rather wait."""
    return bool(answer.refusals) and any(claims[place].patience for place in answer.refusals)


def acquire(store: Store | Several, claims: Sequence[Claim], report: bool) -> Answer:
    """Ask a store for claims, and wait in line where the claims' layers allow it."""
    if store.lines:
        store.lines.announce(claims)
    answer = store.acquire(claims, report=report)
    if not _may_wait(answer, claims):
        return answer
    bell = ThreadBell()
    flow = wait_for_room(store.lines, claims, answer, bell)
    try:
        step = next(flow)
        while True:
            if isinstance(step, Ask):
                step = flow.send(store.acquire(claims, not_before=step.not_before, report=report))
            else:
                step = flow.send(bell.wait(step.microseconds / 1e6))
    except StopIteration as stop:
        final: Answer = stop.value
        return final
    finally:
        flow.close()


async def acquire_async(store: Store | Several, claims: Sequence[Claim], report: bool) -> Answer:
    """The twin of `acquire` for tasks: it waits without blocking the event loop."""
    if store.lines:
        store.lines.announce(claims)
    answer = await store.acquire_async(claims, report=report)
    if not _may_wait(answer, claims):
        return answer
    bell = TaskBell()
    flow = wait_for_room(store.lines, claims, answer, bell)
    try:
        step = next(flow)
        while True:
            if isinstance(step, Ask):
                step = flow.send(await store.acquire_async(claims, not_before=step.not_before, report=report))
            else:
                step = flow.send(await bell.wait(step.microseconds / 1e6))
    except StopIteration as stop:
        final: Answer = stop.value
        return final
    finally:
        flow.close()
