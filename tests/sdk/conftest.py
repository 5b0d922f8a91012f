"""What the tests of SDKs share: a server, and which of them can run.

LiteLLM pins the SDKs of others, so not every environment that has those has it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from .server import Server

collect_ignore = [] if find_spec("litellm") else ["test_litellm.py"]


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
