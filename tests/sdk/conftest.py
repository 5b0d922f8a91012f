"""What the tests of SDKs share: a clock, a server, and which of them can run.

LiteLLM pins the SDKs of others, so not every environment that has those has it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.util import find_spec

import pytest
import time_machine

from .server import Server

collect_ignore = [] if find_spec("litellm") else ["test_litellm.py"]


@pytest.fixture
def time() -> Iterator[time_machine.Traveller]:
    """A clock that stands still, so that no day ends in the middle of a test."""
    with time_machine.travel(datetime(2026, 11, 23, 12, tzinfo=UTC), tick=False) as traveller:
        yield traveller


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.finish()


@pytest.fixture
def server(one_server: Server) -> Iterator[Server]:
    one_server.script()
    yield one_server
    one_server.script()  # ends what hangs
