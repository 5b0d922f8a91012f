"""What tests of limited code want: fresh counts, a clock to move, fake answers, and limits that are used up.

In a `conftest.py`, `from quotalimit.testing import clock, fresh_counts` gives every test counts of its own, and a test
that asks for `clock` a time to move. Both are plain fixtures: with pytest alone, with pytest-asyncio and with anyio.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from quotalimit import clock as _clock
from quotalimit._fakes import FakeStream, fake_response, fake_stream
from quotalimit._waiting import LINES
from quotalimit.decorators import limiters_of
from quotalimit.keys import Key
from quotalimit.limiters import Limiter, RateLimiter, TokenBudget
from quotalimit.stores.base import Claim, Counts, Store, checked_store
from quotalimit.stores.default import replace_default
from quotalimit.stores.memory import MemoryStore

__all__ = [
    "Clock",
    "FakeStream",
    "assert_no_holds",
    "clock",
    "exhaust",
    "fake_response",
    "fake_stream",
    "fresh_counts",
    "use_store",
]

Limited: TypeAlias = Limiter | Callable[..., Any]
"""A limiter, or a decorated function, which stands for its limiters."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Clock:
    """A clock for limits that stands still until it is moved: `with Clock() as clock: ... clock.tick(60)`.

    It moves the time of this library alone. Where freezegun or time-machine has stopped the time, it shows theirs, and
    moves theirs. Calls that wait look up when it is moved. A `RedisStore` goes by the time of
    its server, unless it is given `clock=`.
    """

    def __init__(self, start: datetime | None = None) -> None:
        self._start = start
        self._now = 0
        self._outer: list[Callable[[], int]] = []

    def __enter__(self) -> Clock:
        self._now = _clock.now() if self._start is None else _microseconds(self._start)
        self._outer.append(_clock.now)
        _clock.now = self._read
        return self

    def __exit__(self, *_: object) -> None:
        _clock.now = self._outer.pop()

    def _read(self) -> int:
        return self._now if _traveller() is None else self._outer[0]()

    @property
    def now(self) -> datetime:
        """The time: an aware UTC datetime."""
        return _EPOCH + timedelta(microseconds=self._read())

    def tick(self, seconds: float | timedelta = 1.0) -> None:
        """Move on by some seconds, or back by negative ones."""
        self.move_to(self.now + (seconds if isinstance(seconds, timedelta) else timedelta(seconds=seconds)))

    def move_to(self, time: datetime) -> None:
        """Move to a time, which is UTC if it names no zone."""
        traveller = _traveller()
        self._now = _microseconds(time)
        if traveller is not None:
            traveller.move_to(_EPOCH + timedelta(microseconds=self._now))
        LINES.ring_all()


def _microseconds(time: datetime) -> int:
    return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)


def _traveller() -> Any:
    """What moves the time of freezegun or time-machine, if one of them has stopped it."""
    for module, name in (("freezegun.api", "freeze_factories"), ("time_machine", "traveller_stack")):
        stack = getattr(sys.modules.get(module), name, ())
        if stack:
            return stack[-1]
    return None


@contextmanager
def use_store(store: Store, *limited: Limited) -> Generator[Store]:
    """Let limiters, or the limiters of functions, count on another store inside the block; without any, the default.

    A limiter that was given a store of its own is moved only where it is named.
    """
    checked_store(store)
    limiters = list(dict.fromkeys(_limiters(limited)))  # what is named twice is moved once, and so moved back
    before = [limiter.use(store) for limiter in limiters]
    default = None if limited else replace_default(store)
    try:
        yield store
    finally:
        for limiter, own in zip(limiters, before, strict=True):
            limiter.use(own)
        if not limited:
            replace_default(default)


def exhaust(limited: Limited, key: Key, *, leave: int = 0) -> None:
    """Use up what is left to a key, but for at most `leave` units, on a limiter or on all limiters of a function.

    Of several limits of one limiter, the one with the least left is used up. A function whose limits depend on its
    arguments must be called instead: `InvalidLimit`.
    """
    for limiter in _limiters((limited,)):
        units = max(0, limiter.peek(key).remaining - leave)
        if isinstance(limiter, TokenBudget) and units:
            limiter.charge(key, units)
        elif isinstance(limiter, RateLimiter) and units:
            limiter.acquire(key, units)


def assert_no_holds(*limited: Limited | Store) -> None:
    """Assert that no call on these limiters, functions or stores is still open: each was settled, whatever ended it."""
    gc.collect()  # a stream that nobody refers to is settled when it is collected
    for each in limited:
        if isinstance(each, Store):
            _assert_none_open(each, each.names.all())
        else:
            for limiter in _limiters((each,)):
                store = limiter.bound().store
                _assert_none_open(store, store.names.all_of(limiter))


def _assert_none_open(store: Store, places: Sequence[Counts]) -> None:
    if store.spare is not None:
        _assert_none_open(store.spare, [counts.spare for counts in places])
    for counts in places:
        for charge in counts.open.all():  # whoever asks the store next settles what came late
            store.peek([Claim(counts, charge.identity, charge.limit, 1, 0, False)])
        held = [charge.held for charge in counts.open.all()]
        assert not held, f"{counts.name}: {len(held)} calls are still open, which hold {sum(held)} units"


def _limiters(limited: Iterable[Limited]) -> Iterable[Limiter]:
    for each in limited:
        if isinstance(each, Limiter):
            yield each
            continue
        limiters = limiters_of(each)
        if not limiters:
            raise TypeError(f"{each!r} has no limits: give a limiter or a decorated function")
        yield from limiters


try:
    import pytest
except ImportError:  # everything above works without
    if not TYPE_CHECKING:

        def __getattr__(name: str) -> Any:
            if name in ("clock", "fresh_counts"):
                raise ImportError(f"{name} is a pytest fixture: pip install pytest, or use Clock and use_store")
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:

    @pytest.fixture(autouse=True)
    def fresh_counts() -> Generator[Store]:
        """Counts of its own for each test, in memory; what the default store was before is the default again after."""
        with use_store(MemoryStore()) as store:
            yield store

    @pytest.fixture
    def clock() -> Generator[Clock]:
        """A clock for limits that stands still at the present until the test moves it."""
        with Clock() as clock:
            yield clock
