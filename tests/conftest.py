"""What tests get: a default store of their own, a clock that stands still, and stores for the contract suites."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import time_machine

from quotalimit import Event, MemoryStore, Store, clock, configure, on_event
from quotalimit.events import listeners
from quotalimit.stores.redis import RedisStore
from quotalimit.stores.sqlite import SQLiteStore

from .helpers import NOON
from .stores import servers

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes what it runs in the background ignore Ctrl-C


def pytest_collection_finish() -> None:
    """Keep what was imported and collected out of the many collections of garbage that tests ask for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def default_store() -> MemoryStore:
    """A fresh default store, so that no count outlives its test."""
    store = MemoryStore()
    configure(store=store)
    return store


@pytest.fixture
def time() -> Iterator[time_machine.Traveller]:
    """A clock that stands still until it is moved."""
    with time_machine.travel(NOON, tick=False) as traveller:
        yield traveller


class Place(NamedTuple):
    """Where stores share their counts, empty at first: `make` makes one, as would a process that is given the `url`."""

    make: Callable[..., Store]
    url: str | None


STORES: dict[str, Callable[[Path], AbstractContextManager[Place]]] = {}
"""The stores on which the contract suites run, by name: each makes a place of its own."""


def contract(place: Callable[[Path], Iterator[Place]]) -> Callable[[Path], AbstractContextManager[Place]]:
    """Let the contract suites run on the stores of a place."""
    STORES[place.__name__] = contextmanager(place)
    return STORES[place.__name__]


@contract
def memory(_directory: Path) -> Iterator[Place]:
    store = MemoryStore()
    yield Place(lambda **options: MemoryStore(**options) if options else store, None)


@contract
def sqlite(directory: Path) -> Iterator[Place]:
    made: list[SQLiteStore] = []

    def make(**options: Any) -> Store:
        made.append(SQLiteStore(directory / "counts.db", **options))
        return made[-1]

    yield Place(make, f"sqlite:///{directory / 'counts.db'}")
    for store in made:
        store.close()


def on_redis(server: servers.Server | servers.Cluster) -> Iterator[Place]:
    """Stores on a server that has been emptied, by the clock of the tests."""
    made: list[RedisStore] = []
    server.empty()

    def make(**options: Any) -> Store:
        made.append(RedisStore(server.url, clock=lambda: clock.now(), timeout=10, **options))
        return made[-1]

    yield Place(make, server.url)
    for store in made:
        store.close()


@contract
def valkey(_directory: Path) -> Iterator[Place]:
    yield from on_redis(servers.server())


@contract
def valkey_cluster(_directory: Path) -> Iterator[Place]:
    yield from on_redis(servers.cluster())


@pytest.fixture(scope="session", autouse=True)
def _servers() -> Iterator[None]:
    """Servers are started by the first test that asks for them, and run until the last test has ended."""
    yield
    servers.stop()


@pytest.fixture(params=STORES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A place of each kind of store."""
    with STORES[request.param](tmp_path) as place:
        yield place


@pytest.fixture
def store(place: Place) -> Store:
    """Each store on which the contract suites run."""
    return place.make()


@pytest.fixture
def wide_races() -> Iterator[None]:
    """Switch threads as often as possible, so that a race that can happen does."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    """The events that are told during a test."""
    events: list[Event] = []
    stop = on_event(events.append)
    yield events
    stop()
    assert not listeners


@pytest.fixture(scope="module")
def small_heap() -> None:
    """Keep what SDKs and frameworks import and make at first use out of a test's many collections of garbage."""
    gc.collect()
    gc.freeze()
