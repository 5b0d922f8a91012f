"""RedisStore over TLS: a Valkey server behind a proxy that decrypts, with certificates made for the test."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import pytest
import redis
import trustme

from quotalimit import RateLimiter, StoreUnavailable
from quotalimit.stores.redis import RedisStore

from . import servers

ROOT = Path(__file__).parents[2]

Serve = Callable[..., int]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trusted(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file with the certificate of the authority."""
    path = tmp_path_factory.mktemp("tls") / "authority.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


@pytest.fixture
def serve(authority: trustme.CA, trusted: str, tmp_path: Path) -> Iterator[Serve]:
    """Opens a port of a server to those who speak TLS and expect this name."""
    with ExitStack() as proxies:

        def serve(name: str = "127.0.0.1", *, port: int | None = None, known_clients: bool = False) -> int:
            certificate = tmp_path / "certificate.pem"
            authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(certificate)
            command = [sys.executable, "-m", "tests.stores.tls_proxy", str(port or servers.server().port)]
            command += [str(certificate), *([trusted] if known_clients else [])]
            proxy = proxies.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
            proxies.callback(proxy.kill)
            assert proxy.stdout is not None
            return int(proxy.stdout.readline())

        yield serve


def assert_counts(server: Any) -> None:
    """A store on this server counts, for threads and for event loops."""
    store = RedisStore(server, prefix=f"test-{uuid4()}", timeout=10)
    limiter = RateLimiter("3/minute", name="chat", store=store)

    async def run() -> list[bool]:
        return [await limiter.allow_async("alice") for _ in range(2)]

    assert limiter.allow("alice")
    assert asyncio.run(run()) == [True, True]
    assert not limiter.allow("alice")
    store.close()


def assert_cannot_connect(url: str, why: str) -> None:
    store = RedisStore(url, timeout=10)
    limiter = RateLimiter("3/minute", name="chat", store=store)
    with pytest.raises(StoreUnavailable, match=why):
        limiter.allow("alice")
    store._outage.retry_now()
    with pytest.raises(StoreUnavailable, match=why):
        asyncio.run(limiter.allow_async("alice"))
    store.close()


def test_a_url_names_the_authority(serve: Serve, trusted: str) -> None:
    assert_counts(f"rediss://127.0.0.1:{serve()}/0?{urlencode({'ssl_ca_certs': trusted})}")


def test_a_url_may_say_that_nobody_need_vouch_for_the_server(serve: Serve) -> None:
    assert_counts(f"rediss://127.0.0.1:{serve('redis.example.org')}/0?ssl_cert_reqs=none")


def test_a_password_goes_over_tls(serve: Serve, trusted: str, tmp_path: Path) -> None:
    server = servers.Server(tmp_path / "server")
    try:
        with server.client() as client:
            client.config_set("requirepass", "s3cret")
        place = f"127.0.0.1:{serve(port=server.port)}/0?{urlencode({'ssl_ca_certs': trusted})}"
        assert_counts(f"rediss://:s3cret@{place}")
        wrong = RateLimiter("3/minute", name="chat", store=RedisStore(f"rediss://:wr0ng@{place}", timeout=10))
        with pytest.raises(StoreUnavailable, match=r"(?i)password"):
            wrong.allow("alice")
    finally:
        server.kill()


def test_a_client_of_redis_py_says_whom_it_trusts(serve: Serve, trusted: str) -> None:
    with redis.Redis(port=serve(), host="127.0.0.1", ssl=True, ssl_ca_certs=trusted) as client:
        assert_counts(client)


def test_a_client_shows_its_own_certificate(serve: Serve, trusted: str, authority: trustme.CA, tmp_path: Path) -> None:
    port, own = serve(known_clients=True), authority.issue_cert("client@example.org")
    own.private_key_pem.write_to_path(tmp_path / "key.pem")
    own.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    files = {"ssl_ca_certs": trusted, "ssl_certfile": tmp_path / "cert.pem", "ssl_keyfile": tmp_path / "key.pem"}
    assert_counts(f"rediss://127.0.0.1:{port}/0?{urlencode(files)}")


def test_a_server_that_nobody_vouches_for_is_not_trusted(serve: Serve) -> None:
    assert_cannot_connect(f"rediss://127.0.0.1:{serve()}/0", "certificate verify failed")


def test_a_server_of_another_name_is_not_trusted(serve: Serve, trusted: str) -> None:
    port = serve("redis.example.org")
    assert_cannot_connect(f"rediss://127.0.0.1:{port}/0?{urlencode({'ssl_ca_certs': trusted})}", "mismatch")


def test_a_loop_that_was_closed_without_shutting_down_leaves_no_socket(serve: Serve, trusted: str) -> None:
    """Without a word of anything left unclosed: warnings are errors."""
    url = f"rediss://127.0.0.1:{serve()}/0?{urlencode({'ssl_ca_certs': trusted})}"
    store = RedisStore(url, prefix=f"test-{uuid4()}", timeout=10)
    limiter = RateLimiter("3/minute", name="chat", store=store)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(limiter.acquire_async("alice"))
    loop.close()
    assert asyncio.run(limiter.acquire_async("alice")).used == 2
    assert loop not in store._links._loops
    gc.collect()
    store.close()
