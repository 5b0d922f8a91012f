"""The names of a store's counts: who shares, who is apart, and who is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from quotalimit._forks import let_go
from quotalimit.algorithms.base import Algorithm
from quotalimit.errors import InvalidLimit

T = TypeVar("T")


class Owner(Protocol):
    """What a name's owner says of itself: see `quotalimit.limiters.Limiter`."""

    @property
    def name(self) -> str: ...
    @property
    def named(self) -> bool: ...
    @property
    def terms(self) -> tuple[Hashable, ...]: ...
    @property
    def origin(self) -> str | None: ...


class Names(Generic[T]):
    """The counts of a store by (name, position, algorithm, period, zone).

    Equal names with equal limits share; with different limits they are refused, unless the same function defines
    its limiter anew (notebooks, reloads). An owner that was given no name has counts of its own; where counts are
    shared with other processes, those under its default name, which must mean the same function there.
    """

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._owners: dict[str, tuple[tuple[Hashable, ...], str | None]] = {}
        self._named: dict[str, dict[Hashable, T]] = {}
        self._nameless: WeakKeyDictionary[Owner, dict[Hashable, T]] = WeakKeyDictionary()
        self._lock = threading.RLock()  # a finalizer may ask while its own thread does

    def after_fork(self) -> None:
        """In the child of a fork."""
        let_go(self._lock)

    def register(self, owner: Owner) -> None:
        """Give a name to its owner. Raises `InvalidLimit` if it is another's, or says too little."""
        if not owner.named:
            if not self._shared:
                return
            if owner.origin is None or "<locals>" in owner.origin:
                raise InvalidLimit(
                    f"{owner.name!r} needs a name= of its own: on a store that processes share, the default name of a "
                    "lambda, a local function or a bare limiter would not say everywhere whose counts they are"
                )
        with self._lock:
            terms, origin = self._owners.setdefault(owner.name, (owner.terms, owner.origin))
            if terms != owner.terms:
                if origin is None or origin != owner.origin:
                    raise InvalidLimit(
                        f"the name {owner.name!r} is taken by {_shown(terms)}, and this is {_shown(owner.terms)}: "
                        "give one of them another name, or both the same limits"
                    )
                self._owners[owner.name] = (owner.terms, owner.origin)

    def find(self, owner: Owner, position: int, limit: Algorithm, make: Callable[[], T]) -> T:
        """The owner's counts of a limit, made if they are new."""
        with self._lock:
            counts = self._of(owner)
            place = (position, limit.count_id)
            return counts[place] if place in counts else counts.setdefault(place, make())

    def all_of(self, owner: Owner) -> list[T]:
        """All counts under the owner's name."""
        with self._lock:
            return list(self._of(owner).values())

    def all(self) -> list[T]:
        """All counts under any name."""
        with self._lock:
            return [
                counts for places in (*self._named.values(), *self._nameless.values()) for counts in places.values()
            ]

    def _of(self, owner: Owner) -> dict[Hashable, T]:
        if owner.named or self._shared:
            return self._named.setdefault(owner.name, {})
        return self._nameless.setdefault(owner, {})


def _shown(terms: tuple[Hashable, ...]) -> str:
    return ", ".join(map(repr, terms))
