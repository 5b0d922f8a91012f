"""What every test gets: a default store of its own, and the stores on which the contract suites run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from quotalimit import MemoryStore, Store, clock, configure
from quotalimit.stores.redis import RedisStore
from quotalimit.stores.sqlite import SQLiteStore

from .stores import servers


@pytest.fixture(autouse=True)
def default_store() -> MemoryStore:
    """A fresh default store, so that no count outlives its test."""
    store = MemoryStore()
    configure(store=store)
    return store


STORES: dict[str, Callable[[Path], AbstractContextManager[Callable[..., Store]]]] = {}
"""The stores on which the contract suites run: how to make any number of them on one place, empty at first."""


def contract(maker: Callable[[Path], Iterator[Callable[..., Store]]]) -> None:
    """Let the contract suites run on the stores that a maker makes."""
    STORES[maker.__name__] = contextmanager(maker)


@contract
def memory(_place: Path) -> Iterator[Callable[..., Store]]:
    store = MemoryStore()
    yield lambda **options: MemoryStore(**options) if options else store


@contract
def sqlite(place: Path) -> Iterator[Callable[..., Store]]:
    made: list[SQLiteStore] = []

    def make(**options: Any) -> Store:
        made.append(SQLiteStore(place / "counts.db", **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


def on_redis(url: str) -> Iterator[Callable[..., Store]]:
    """Stores on a server, under a prefix of their own and by the clock of the tests."""
    made: list[RedisStore] = []
    prefix = f"test-{uuid4()}"

    def make(**options: Any) -> Store:
        made.append(RedisStore(url, prefix=prefix, clock=lambda: clock.now(), timeout=10, **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


@contract
def valkey(_place: Path) -> Iterator[Callable[..., Store]]:
    yield from on_redis(servers.server().url)


@contract
def valkey_cluster(_place: Path) -> Iterator[Callable[..., Store]]:
    yield from on_redis(servers.cluster().url)


@pytest.fixture(scope="session", autouse=True)
def _servers() -> Iterator[None]:
    """Servers are started by the first test that asks for them, and run until the last test has ended."""
    yield
    servers.stop()


@pytest.fixture(params=STORES)
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Makes stores that share their counts: what several processes would have."""
    with STORES[request.param](tmp_path) as make:
        yield make


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    """Each store on which the contract suites run."""
    return make_store()


@pytest.fixture
def wide_races() -> Iterator[None]:
    """Switch threads as often as possible, so that a race that can happen does."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
