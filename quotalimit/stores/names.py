"""The names of a store's counts: who shares, who is apart, and who is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

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
    def terms(self) -> Hashable: ...
    @property
    def origin(self) -> str | None: ...


class Names(Generic[T]):
    """The counts of a store by (name, position, algorithm, period, zone).

    Equal names with equal limits share; with different limits they are refused, unless the same function defines
    its limiter anew (notebooks, reloads). An owner that was given no name has counts of its own.
    """

    def __init__(self) -> None:
        self._owners: dict[str, tuple[Hashable, str | None]] = {}
        self._named: dict[Hashable, T] = {}
        self._nameless: WeakKeyDictionary[Owner, dict[Hashable, T]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def find(self, owner: Owner, position: int, limit: Algorithm, make: Callable[[], T]) -> T:
        """The owner's counts of a limit, made if they are new. Raises `InvalidLimit` if the name is another's."""
        with self._lock:
            if not owner.named:
                return _get(self._nameless.setdefault(owner, {}), (position, limit.count_id), make)
            terms, origin = self._owners.setdefault(owner.name, (owner.terms, owner.origin))
            if terms != owner.terms:
                if origin is None or origin != owner.origin:
                    raise InvalidLimit(
                        f"the name {owner.name!r} is taken by {_shown(terms)}, and this is {_shown(owner.terms)}: "
                        "give one of them another name, or both the same limits"
                    )
                self._owners[owner.name] = (owner.terms, owner.origin)
            return _get(self._named, (owner.name, position, limit.count_id), make)

    def all(self) -> list[T]:
        """All counts there are."""
        with self._lock:
            return [*self._named.values(), *(one for own in self._nameless.values() for one in own.values())]


def _get(counts: dict[Hashable, T], place: Hashable, make: Callable[[], T]) -> T:
    if place not in counts:
        counts[place] = make()
    return counts[place]


def _shown(terms: Hashable) -> str:
    return ", ".join(map(repr, terms)) if isinstance(terms, tuple) else repr(terms)
