"""What every test gets: a default store of its own, and the stores on which the contract suites run."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from quotalimit import MemoryStore, Store, configure
from tests.stores.servers import valkey, valkey_cluster

__all__ = ["valkey", "valkey_cluster"]


@pytest.fixture(autouse=True)
def default_store() -> MemoryStore:
    """A fresh default store, so that no count outlives its test."""
    store = MemoryStore()
    configure(store=store)
    return store


@pytest.fixture(params=["memory"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each store on which the contract suites run."""
    return {"memory": MemoryStore}[request.param]()


@pytest.fixture
def wide_races() -> Iterator[None]:
    """Switch threads as often as possible, so that a race that can happen does."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
