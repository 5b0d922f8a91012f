"""Which store a limiter uses that was given none."""

from __future__ import annotations

import threading
from functools import partial
from typing import Final, Protocol
from urllib.parse import unquote, urlsplit
from weakref import WeakSet

from quotalimit._forks import in_child, let_go
from quotalimit.stores.base import Store, checked_store
from quotalimit.stores.memory import MemoryStore


class Follower(Protocol):
    """A limiter on the default store."""

    def unbind(self) -> None: ...


_lock: Final = threading.RLock()
"""A finalizer may ask for the default store while its own thread does: the first to have made one has the last word."""

_followers: Final[WeakSet[Follower]] = WeakSet()
_store: Store | None = None


def configure(*, store: Store) -> None:
    """Set the process's default store, for all limiters that were given none, decorated before or later.

    A limiter that was called before starts with the new store's counts at its next call.
    """
    replace_default(checked_store(store))


def replace_default(store: Store | None) -> Store | None:
    """Set the default store, or that there is none yet. Returns what it was before."""
    global _store
    with _lock:
        before, _store = _store, store
        followers = list(_followers)
    for follower in followers:
        follower.unbind()
    return before


def follow(follower: Follower) -> Store:
    """The default store, for a limiter that wants to hear when it changes."""
    global _store
    with _lock:
        if _store is None:
            made = MemoryStore()
            _store = _store or made
        _followers.add(follower)
        return _store


def store_from_url(url: str) -> Store:
    """Make the store that a URL names: `memory://`, `sqlite:///relative.db`, `sqlite:////absolute.db`, `redis://…`.

    Raises `ValueError` for any other scheme.
    """
    parts = urlsplit(url)
    if parts.scheme == "memory":
        return MemoryStore()
    if parts.scheme == "sqlite":
        from quotalimit.stores.sqlite import SQLiteStore

        if parts.netloc or len(parts.path) < 2 or parts.query or parts.fragment:
            raise ValueError(f"{url!r} names no file: write sqlite:///relative.db or sqlite:////absolute.db")
        return SQLiteStore(unquote(parts.path[1:]))
    if parts.scheme in ("redis", "rediss", "unix"):
        from quotalimit.stores.redis import RedisStore

        return RedisStore(url)
    raise ValueError(
        f"no store for the scheme {parts.scheme!r} of a store's URL: use memory://, sqlite:///relative.db or redis://"
    )


in_child(partial(let_go, _lock))
