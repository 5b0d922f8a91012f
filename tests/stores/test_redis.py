"""RedisStore on real Valkey servers: rules 5, 11, 21, 23 and 24, and what becomes of connections."""

from __future__ import annotations

import ast
import asyncio
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import hiredis
import pytest
import redis

from quotalimit import (
    CalendarWindow,
    Hold,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    StoreUnavailable,
    TokenBucket,
    TokenBudget,
    clock,
    limiters_of,
    rate_limited,
    store_from_url,
    token_budget,
)
from quotalimit.errors import InvalidLimit
from quotalimit.stores import links
from quotalimit.stores.redis import RedisStore
from quotalimit.stores.writer import WRITER
from tests.helpers import reply

from . import servers

HOUR = 3_600_000_000
ROOT = Path(__file__).parents[2]


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid4()}"


@pytest.fixture
def url() -> str:
    return servers.server().url


@pytest.fixture
def store(url: str, prefix: str) -> Iterator[RedisStore]:
    store = RedisStore(url, prefix=prefix, timeout=10)
    yield store
    store.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Callable[..., servers.Server]]:
    """Servers of the test's own, which it may kill."""
    started: list[servers.Server] = []

    def start(*options: str) -> servers.Server:
        started.append(servers.Server(tmp_path / str(len(started)), *options))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def server() -> Iterator[Any]:
    """A client of the server, to look and to meddle."""
    with servers.server().client() as client:
        yield client


def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each call try a server that failed the last one."""
    monkeypatch.setattr("quotalimit.stores.outage.PAUSE", 0.0)


def no_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be written but by the calls of the test itself: the writer's thread would at any moment."""
    monkeypatch.setattr("quotalimit.stores.writer.Writer.watch", lambda *_: None)


def before(
    monkeypatch: pytest.MonkeyPatch,
    store: RedisStore,
    act: Callable[[Any], object],
    *,
    skip: int = 0,
    each: bool = False,
) -> None:
    """Have something done with what a thread is about to say to a server: the next, another one, or each."""
    really = store._links._said
    left = skip

    def said(step: Any, deadline: float) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            if not each:
                monkeypatch.setattr(store._links, "_said", really)
            act(step)
        return really(step, deadline)

    monkeypatch.setattr(store._links, "_said", said)


def fail(_step: object = None) -> None:
    raise redis.ConnectionError("gone")


async def finished(store: RedisStore) -> None:
    """Wait until what was cancelled on this loop has been given back."""
    links = store._links._loops[asyncio.get_running_loop()]
    while links._unfinished:
        await asyncio.wait(links._unfinished)


def commands(server: Any) -> dict[str, int]:
    """How often each command was called by clients, by its name; those that scripts call are counted too."""
    return {name.removeprefix("cmdstat_"): about["calls"] for name, about in server.info("commandstats").items()}


# Rule 23: one round trip, time, TTL, slots


def test_rule_23_all_layers_of_a_call_are_one_round_trip(store: RedisStore, server: Any) -> None:
    @rate_limited("100/minute", key="address", store=store, name="address")
    @rate_limited(TokenBucket("20/minute"), "50/hour", key="user", store=store, name="user")
    @token_budget("10_000/day", key="user", reserve=10, store=store, name="tokens")
    def chat(address: str, user: str) -> Any:
        return reply(3)

    chat("192.0.2.1", "alice")
    server.config_resetstat()
    for _ in range(5):
        chat("192.0.2.1", "alice")
    said = commands(server)
    assert said["evalsha"] == 10  # the question and the settlement of each
    assert "hello" not in said
    assert limiters_of(chat)[2].peek("alice").used == 18


@pytest.mark.parametrize("limit", [CalendarWindow("99/day"), SlidingWindow("99/day"), TokenBucket("99/day")], ids=str)
def test_rule_23_a_charge_is_one_round_trip(store: RedisStore, server: Any, limit: Any) -> None:
    budget = TokenBudget(limit, name="tokens", store=store)
    budget.charge("alice", 2)
    server.config_resetstat()
    for _ in range(5):
        budget.charge("alice", 2)
    assert commands(server)["evalsha"] == 5


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("ask", ["peek", "charge", "flush"])
def test_rule_23_settlements_go_with_the_next_question_or_all_in_one(
    store: RedisStore, server: Any, mode: str, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_writer(monkeypatch)
    budget = TokenBudget("100/day", name="tokens", store=store)
    holds = [budget.reserve(key, 50) for key in ("alice", "bob")]
    server.config_resetstat()
    for hold in holds:
        hold.settle(20)
    ask_of = getattr(store if ask == "flush" else budget, ask if mode == "sync" else f"{ask}_async")
    asked = ask_of(*{"peek": ["alice"], "charge": ["alice", 1], "flush": []}[ask])
    answer = asked if mode == "sync" else asyncio.run(asked)
    assert commands(server)["evalsha"] == 1
    assert ask == "flush" or answer.used == (21 if ask == "charge" else 20)


def test_rule_23_every_key_expires(store: RedisStore, server: Any, prefix: str) -> None:
    limits = [SlidingWindow("5/minute"), CalendarWindow("9/day"), TokenBucket("6/minute"), CalendarWindow("9/year")]
    limiter = RateLimiter(*limits, name="rates", store=store)
    budget = TokenBudget(*limits, name="tokens", store=store)

    @rate_limited("5/minute", "9/hour", key="user", name="plain", store=store)
    def plain(user: str) -> None: ...

    plain("alice")
    limiter.acquire("alice")
    limiter.acquire("bob", 3)
    with budget.reserve("alice", 2) as hold:
        hold.settle(60)
    budget.reserve("bob", 1)
    for key in ("alice", "carol"):
        limiter.reset(key)
        budget.reset(key)
    budget.charge("dave", 2)
    keys = list(server.scan_iter(f"{prefix}:*"))
    assert len(keys) >= 14
    assert {key: server.pttl(key) for key in keys if server.pttl(key) <= 0} == {}
    assert server.pttl(f"{prefix}:{{sbob}}:rates:0:sliding:60000000") <= 61_000


def test_rule_11_what_was_settled_is_known_for_a_day_and_for_an_hour_on_a_cluster(
    store: RedisStore, cluster_store: RedisStore, server: Any, prefix: str
) -> None:
    """So long a settlement whose answer was lost may take to come again, and is not made twice."""
    for some in (store, cluster_store):
        TokenBudget("100/day", name="tokens", store=some).reserve("alice", 50).settle(20)
        some.flush()
    (journal,) = server.scan_iter(f"{prefix}:journal:*")
    assert 86_300_000 < server.pttl(journal) <= 86_400_000
    with redis.RedisCluster("127.0.0.1", servers.cluster().nodes[0].port) as nodes:
        (journal,) = nodes.scan_iter(f"{prefix}:{{salice}}:journal:*")
        assert 3_500_000 < nodes.pttl(journal) <= 3_600_000


def test_rule_23_a_debt_outlives_its_period(store: RedisStore, server: Any, prefix: str) -> None:
    budget = TokenBudget(TokenBucket("10/minute"), name="tokens", store=store)
    with budget.reserve("alice", 1) as hold:
        hold.settle(100)
    assert 590_000 < server.pttl(f"{prefix}:{{salice}}:tokens:0:bucket:60000000") <= 602_000


@pytest.mark.parametrize("wrong", [HOUR, -HOUR, 400 * 24 * HOUR])
@pytest.mark.parametrize("limit", ["5/minute", CalendarWindow("5/day", tz="Asia/Kathmandu"), TokenBucket("5/day")])
def test_rule_23_a_client_with_a_wrong_clock_changes_nothing(
    url: str, prefix: str, limit: Any, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, off = (RateLimiter(limit, name="chat", store=RedisStore(url, prefix=prefix)) for _ in range(2))
    really = clock.now
    for number in range(5):
        monkeypatch.setattr(clock, "now", really if number % 2 else lambda: really() + wrong)
        (right if number % 2 else off).acquire("alice")
    for limiter, now in ((right, really), (off, lambda: really() + wrong)):
        monkeypatch.setattr(clock, "now", now)
        with pytest.raises(RateLimitExceeded) as refusal:
            limiter.acquire("alice")
        assert abs(refusal.value.reset_at.timestamp() - time.time()) < 86_500


@pytest.mark.parametrize("first", ["acquire", "peek"])
@pytest.mark.parametrize("mode", ["right", "wrong", "given"])
def test_rule_23_the_edges_of_windows_cost_no_round_trip(
    url: str, prefix: str, server: Any, mode: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the one by which it is learned that our clock is wrong."""
    really, now = clock.now, 1_800_000_000_000_000
    if mode == "wrong":
        monkeypatch.setattr(clock, "now", lambda: really() + 400 * 24 * HOUR)
    store = RedisStore(url, prefix=prefix, timeout=10, clock=(lambda: now) if mode == "given" else None)
    days = RateLimiter(CalendarWindow("9/day"), name="days", store=store)
    getattr(days, first)("alice")
    server.config_resetstat()
    for _ in range(3):
        now += 48 * HOUR
        days.peek("alice")
        days.acquire("alice")
    assert commands(server)["evalsha"] == 6
    store.close()


def test_rule_23_a_script_that_the_server_has_forgotten_is_sent_again(store: RedisStore, server: Any) -> None:
    limiter = RateLimiter("3/minute", name="chat", store=store)
    assert limiter.allow("alice")
    server.script_flush()
    assert limiter.allow("alice")
    server.script_flush()
    assert asyncio.run(limiter.allow_async("alice"))
    assert not limiter.allow("alice")


HOSTILE = ["a" * 999, "{", "}", "{}", "a{b}c", "}{", "%7B", "{s}", b"\0\r\n{", "𝕊" * 90, ("a", "{b}"), "%", ""]


def test_rule_23_keys_of_one_identity_share_a_slot_whatever_it_is(store: RedisStore, server: Any, prefix: str) -> None:
    limiter = RateLimiter("9/minute", CalendarWindow("9/day"), TokenBucket("9/hour"), name="a}b{c", store=store)
    for number, key in enumerate(HOSTILE):
        for _ in range(number % 3 + 1):
            limiter.acquire(key)
    keys = list(server.scan_iter(f"{prefix}:*"))
    assert len(keys) == 3 * len(HOSTILE)
    assert max(map(len, keys)) < 400
    slots = [redis.crc.key_slot(key) for key in keys]
    assert max(slots.count(slot) for slot in slots) >= 3
    assert all(slots.count(slot) % 3 == 0 for slot in slots)
    assert [limiter.peek(key).used for key in HOSTILE] == [number % 3 + 1 for number in range(len(HOSTILE))]


def test_rule_21_no_identity_can_be_written_so_that_it_names_the_count_of_another_limit(store: RedisStore) -> None:
    limiters = [RateLimiter("9/minute", name=name, store=store) for name in ("c", "b}:c")]
    limiters[0].acquire("a}:b")
    assert [limiter.peek(key).used for limiter in limiters for key in ("a", "a}:b")] == [0, 1, 0, 0]


# Clusters


@pytest.fixture
def cluster_store(prefix: str) -> Iterator[RedisStore]:
    store = RedisStore(servers.cluster().url, prefix=prefix, timeout=10)
    yield store
    store.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rule_2_what_one_slot_took_is_given_back_when_another_refuses(cluster_store: RedisStore, mode: str) -> None:
    @rate_limited("1/hour", key="address", store=cluster_store, name="address")
    @rate_limited("9/hour", key="user", store=cluster_store, name="user")
    @token_budget("90/day", key="user", reserve=10, store=cluster_store, name="tokens")
    def chat(address: str, user: str) -> Any:
        return reply(10)

    @rate_limited("9/hour", key="user", store=cluster_store, name="user 2")
    @token_budget("90/day", key="user", reserve=10, store=cluster_store, name="tokens 2")
    @rate_limited("1/hour", key="address", store=cluster_store, name="address 2")
    async def chat_async(address: str, user: str) -> Any:
        return reply(10)

    users = [f"user {number}" for number in range(8)]  # on all nodes
    for number, user in enumerate(users):
        call: Callable[[], Any] = lambda user=user: (  # noqa: E731
            chat("192.0.2.1", user) if mode == "sync" else asyncio.run(chat_async("192.0.2.1", user))
        )
        if number:
            with pytest.raises(RateLimitExceeded):
                call()
        else:
            call()
    limiters = limiters_of(chat if mode == "sync" else chat_async)
    rate, tokens = (next(limiter for limiter in limiters if limiter.name.startswith(name)) for name in ("user", "tok"))
    assert [rate.peek(user).used for user in users] == [1] + [0] * 7
    assert [tokens.peek(user).used for user in users] == [10] + [0] * 7


def test_a_cluster_that_has_moved_a_slot_is_followed(cluster_store: RedisStore) -> None:
    limiter = RateLimiter("50/hour", name="chat", store=cluster_store)
    keys = [f"user {number}" for number in range(20)]
    for key in keys:
        limiter.acquire(key)
    first, second, third = cluster_store._links._nodes
    rotated = {first: second, second: third, third: first}
    cluster_store._links._slots = {slot: rotated[node] for slot, node in cluster_store._links._slots.items()}
    for key in keys:
        limiter.acquire(key)
    cluster_store._links._slots = {slot: rotated[node] for slot, node in cluster_store._links._slots.items()}
    assert {asyncio.run(limiter.acquire_async(key)).used for key in keys} == {3}


def test_a_slot_that_is_being_moved_is_asked_for_where_it_goes(cluster_store: RedisStore, prefix: str) -> None:
    limiter = RateLimiter("50/hour", name="chat", store=cluster_store)
    limiter.acquire("somebody")
    key = prefix  # of a slot that no other test has left something in
    slot = redis.crc.key_slot(b"{s%b}" % key.encode())
    links = cluster_store._links
    source = links._slots[slot]
    target = next(node for node in links._nodes if node != source)
    with redis.Redis(port=source[1]) as old, redis.Redis(port=target[1]) as new:
        try:
            new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", old.execute_command("CLUSTER", "MYID"))
            old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", new.execute_command("CLUSTER", "MYID"))
            new.script_flush()
            limiter.acquire(key)
            assert asyncio.run(limiter.acquire_async(key)).used == 2
            assert links._slots[slot] == source
            assert new.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot) == 1
        finally:
            for node in (old, new):
                node.execute_command("CLUSTER", "SETSLOT", slot, "STABLE")


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[servers.Cluster]:
    """A cluster of the test's own, whose nodes answer for their slots whatever becomes of the others."""
    cluster = servers.Cluster(tmp_path)
    for node in cluster.nodes:
        with node.client() as client:
            client.config_set("cluster-require-full-coverage", "no")
    yield cluster
    cluster.remove()


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("failure", [signal.SIGKILL, signal.SIGSTOP])
def test_rule_11_a_settlement_for_a_node_that_is_down_stops_no_call_on_the_others(
    own_cluster: servers.Cluster, prefix: str, failure: signal.Signals, mode: str
) -> None:
    store = RedisStore(own_cluster.url, prefix=prefix, timeout=1)
    budget = TokenBudget("1_000/day", name="tokens", store=store)
    users = [f"user{number}" for number in range(30)]
    holds = {user: budget.reserve(user, 100) for user in users}
    down = own_cluster.nodes[2]
    lost = [user for user in users if store._links.node_of(b"{s%b}" % user.encode())[1] == down.port]
    alive = [user for user in users if user not in lost]
    assert lost
    assert alive
    down._process.send_signal(failure)
    for user in [*lost, *alive]:
        holds[user].settle(40)
    store.flush() if mode == "sync" else asyncio.run(store.flush_async())
    assert store.behind
    for user in alive:
        used = budget.charge(user, 5).used if mode == "sync" else asyncio.run(budget.charge_async(user, 5)).used
        assert used == 45
    budget.reset(alive[0])
    assert budget.peek(alive[0]).used == 0
    if failure == signal.SIGSTOP:
        down._process.send_signal(signal.SIGCONT)
        assert [budget.peek(user).used for user in lost] == [40] * len(lost)  # a node may have heard it twice
        assert not store.behind
    store.close()


def two_layers(store: RedisStore, limits: tuple[str, str] = ("9/hour", "9/hour")) -> Callable[[str, str], None]:
    @rate_limited(limits[0], key="address", store=store, name="address")
    @rate_limited(limits[1], key="user", store=store, name="user")
    def call(address: str, user: str) -> None: ...

    return call


@pytest.mark.parametrize("fails", ["the next", "giving back"])
def test_rule_2_what_one_slot_took_is_given_back_soon_if_a_node_cannot_answer(
    cluster_store: RedisStore, prefix: str, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pause(monkeypatch)
    limits = ("9/hour", "9/hour" if fails == "the next" else "1/hour")
    call = two_layers(cluster_store, limits)
    call("192.0.2.1", "alice")
    before(monkeypatch, cluster_store, fail, skip=1 if fails == "the next" else 2)
    with pytest.raises(StoreUnavailable):
        call("192.0.2.1", "alice")
    other = RedisStore(servers.cluster().url, prefix=prefix, timeout=10)
    address, user = (RateLimiter(limits[n], name=name, store=other) for n, name in enumerate(("address", "user")))
    began = time.monotonic()
    servers.until(lambda: (address.peek("192.0.2.1").used, user.peek("alice").used) == (1, 1))
    assert time.monotonic() - began < 4  # not when the writer next happens to look
    other.close()


def test_rule_2_a_slot_that_refuses_ends_the_call_and_what_was_taken_is_given_back_at_once(
    cluster_store: RedisStore, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_writer(monkeypatch)
    call = two_layers(cluster_store, ("5/hour", "1/hour"))
    other = RedisStore(servers.cluster().url, prefix=prefix, timeout=10)
    address = RateLimiter("5/hour", name="address", store=other)
    call("192.0.2.1", "alice")
    with pytest.raises(RateLimitExceeded):
        call("192.0.2.1", "alice")
    assert address.peek("192.0.2.1").used == 1
    address.acquire("192.0.2.1", 4)
    asked: list[object] = []
    before(monkeypatch, cluster_store, asked.append, each=True)
    with pytest.raises(RateLimitExceeded):
        call("192.0.2.1", "alice")
    assert len(asked) == 1
    other.close()


def slowly(monkeypatch: pytest.MonkeyPatch, store: RedisStore) -> None:
    """Each thing that is said takes more than half of the time there is."""
    seconds = 0.0

    def later(_: object) -> None:
        nonlocal seconds
        seconds += 0.6 * store._timeout

    monkeypatch.setattr(clock, "monotonic", lambda: seconds)
    before(monkeypatch, store, later, each=True)


def test_rule_24_the_timeout_is_that_of_the_call_however_many_slots_it_asks(
    cluster_store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = two_layers(cluster_store)
    call("192.0.2.1", "alice")
    slowly(monkeypatch, cluster_store)
    with pytest.raises(StoreUnavailable):
        call("192.0.2.1", "alice")


def test_rule_24_what_was_settled_is_written_to_each_slow_node_for_no_longer_than_the_timeout(
    cluster_store: RedisStore, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_writer(monkeypatch)
    users = [f"user {number}" for number in range(9)]  # several on each node
    budget = TokenBudget("1_000/day", name="tokens", store=cluster_store)
    for user in users:
        budget.reserve(user, 100).settle(40)
    with monkeypatch.context() as patched:
        slowly(patched, cluster_store)
        cluster_store.flush()
    assert cluster_store.behind
    other = RedisStore(servers.cluster().url, prefix=prefix, timeout=10)
    same = TokenBudget("1_000/day", name="tokens", store=other)
    written = [user for user in users if same.peek(user).used == 40]
    assert len({cluster_store._links.node_of(b"{s%b}" % user.encode()) for user in written}) == 3
    cluster_store.close()
    assert [same.peek(user).used for user in users] == [40] * len(users)
    other.close()


def test_rule_24_a_node_that_fails_is_left_alone_for_a_moment_and_what_was_settled_written_at_the_end(
    cluster_store: RedisStore, prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_writer(monkeypatch)
    users = [f"user {number}" for number in range(9)]  # several on each node
    budget = TokenBudget("1_000/day", name="tokens", store=cluster_store)
    holds = [budget.reserve(user, 100) for user in users]
    down = cluster_store._links.node_of(b"{s%b}" % users[0].encode())
    asked: list[object] = []

    def ask(step: Any) -> None:
        asked.append(step.node)
        if step.node == down:
            fail()

    for hold in holds:
        hold.settle(40)
    with monkeypatch.context() as patched:
        patched.setattr("quotalimit.stores.outage.PAUSE", 60.0)
        before(patched, cluster_store, ask, each=True)
        cluster_store.flush()
        assert len(set(asked)) == 3
        assert asked.count(down) == 1
        assert "is kept in memory" in caplog.text
        cluster_store.flush()
        assert asked.count(down) == 1
        assert cluster_store.behind
    cluster_store.close()
    other = RedisStore(servers.cluster().url, prefix=prefix, timeout=10)
    same = TokenBudget("1_000/day", name="tokens", store=other)
    assert [same.peek(user).used for user in users] == [40] * len(users)
    other.close()


# Rule 5: exactly N


def _hammer(url: str, prefix: str, calls: int, answers: Any) -> None:
    store = RedisStore(url, prefix=prefix, timeout=20)
    limiter = RateLimiter("100/hour", name="chat", store=store)
    budget = TokenBudget("1_000_000/day", name="tokens", store=store)
    admitted: list[int] = []

    def call() -> None:
        for number in range(calls):
            if limiter.allow("everyone"):
                admitted.append(1)
            with budget.reserve("everyone", 10) as hold:
                hold.settle(number)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    answers.put(len(admitted))


def test_rule_5_four_processes_of_four_threads_admit_exactly_n(url: str, prefix: str, store: RedisStore) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_hammer, args=(url, prefix, 30, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    admitted = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(admitted) == 100
    budget = TokenBudget("1_000_000/day", name="tokens", store=store)
    assert budget.peek("everyone").used == 16 * sum(range(30))


async def test_rule_5_fifty_tasks_admit_exactly_n(store: RedisStore) -> None:
    limiter = RateLimiter("70/hour", name="chat", store=store)
    budget = TokenBudget("1_000_000/day", name="tokens", store=store)

    async def call(number: int) -> bool:
        async with budget.reserve_async("everyone", 100) as hold:
            hold.settle(number)
        return await limiter.allow_async("everyone")

    assert sum(await asyncio.gather(*map(call, range(150)))) == 70
    assert (await budget.peek_async("everyone")).used == sum(range(150))


# Rule 24: a server that does not answer


def test_rule_24_a_server_that_is_not_there_fails_closed_without_telling_the_password(prefix: str) -> None:
    url = f"redis://alice:s3cret@127.0.0.1:{servers.free_port()}/3"
    limiter = RateLimiter("5/minute", name="chat", store=RedisStore(url, prefix=prefix))
    with pytest.raises(StoreUnavailable, match=r"Redis at 127\.0\.0\.1:\d+/3 cannot answer") as failure:
        limiter.acquire("alice")
    assert "s3cret" not in f"{failure.value!r} {failure.value} {limiter.bound().store!r}"
    with pytest.raises(StoreUnavailable):
        asyncio.run(limiter.acquire_async("alice"))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rule_24_a_server_that_hangs_is_given_up_after_the_timeout(prefix: str, mode: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        store = RedisStore(f"redis://127.0.0.1:{deaf.getsockname()[1]}", prefix=prefix, timeout=0.2)
        limiter = RateLimiter("5/minute", name="chat", store=store)
        with pytest.raises(StoreUnavailable):
            limiter.acquire("alice") if mode == "sync" else asyncio.run(limiter.acquire_async("alice"))
        store.close()


@pytest.fixture
def deaf() -> Iterator[list[int]]:
    """The ports of three servers that let everybody in and never say a word."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512)) for _ in range(3)]
        yield [listener.getsockname()[1] for listener in listeners]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rule_24_the_timeout_is_that_of_the_call_however_many_nodes_hang(
    deaf: list[int], prefix: str, mode: str
) -> None:
    store = RedisStore(f"redis://127.0.0.1:{deaf[0]}", prefix=prefix, timeout=0.4)
    store._links._nodes = [("127.0.0.1", port) for port in deaf] * 3
    limiter = RateLimiter("5/minute", name="chat", store=store)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        limiter.acquire("alice") if mode == "sync" else asyncio.run(limiter.acquire_async("alice"))
    assert time.monotonic() - began < 4 * 0.4  # one after the other would take 3.6 s
    store.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rule_24_after_a_node_that_hangs_another_is_asked(
    deaf: list[int], prefix: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pause(monkeypatch)
    store = RedisStore(f"redis://127.0.0.1:{deaf[0]}", prefix=prefix, timeout=0.05)
    store._links._nodes.append(("127.0.0.1", servers.cluster().nodes[0].port))
    limiter = RateLimiter("5/minute", name="chat", store=store)

    async def call() -> bool:
        return limiter.allow("alice") if mode == "sync" else await limiter.allow_async("alice")

    with pytest.raises(StoreUnavailable):
        asyncio.run(call())
    store._links._timeout = 10
    assert asyncio.run(call())
    store.close()


async def test_rule_24_tasks_that_wait_for_a_connection_wait_no_longer_than_the_timeout(
    deaf: list[int], prefix: str
) -> None:
    store = RedisStore(f"redis://127.0.0.1:{deaf[0]}", prefix=prefix, timeout=0.4)
    limiter = RateLimiter("5/minute", name="chat", store=store)
    began = time.monotonic()
    failures = await asyncio.gather(*(limiter.acquire_async("alice") for _ in range(640)), return_exceptions=True)
    assert {type(failure) for failure in failures} == {StoreUnavailable}
    assert time.monotonic() - began < 4 * 0.4  # 64 after 64 would take 4 s
    store.close()


@pytest.mark.parametrize("steps", range(0, 16, 2))
async def test_rule_24_a_loop_that_is_blocked_for_long_is_no_fault_of_the_server(
    url: str, prefix: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the call is just then: while it connects, asks who is there, or waits for its answer."""
    loop = asyncio.get_running_loop()
    really = loop.time
    store = RedisStore(url, prefix=prefix, timeout=10)
    call = asyncio.ensure_future(RateLimiter("5/minute", name="chat", store=store).allow_async("alice"))
    for _ in range(steps):
        await asyncio.sleep(0)
    monkeypatch.setattr(loop, "time", lambda: really() + 60)
    assert await call


def test_rule_24_another_store_is_asked_instead_until_the_server_is_back(
    own_server: Callable[..., servers.Server], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pause(monkeypatch)
    server = own_server()
    store = RedisStore(server.url, prefix=prefix, on_unavailable=MemoryStore())
    limiter = RateLimiter("2/hour", name="chat", store=store)
    assert [limiter.allow("alice") for _ in range(3)] == [True, True, False]
    server.kill()
    assert [limiter.allow("alice") for _ in range(3)] == [True, True, False]
    server.start()
    assert [limiter.allow("alice") for _ in range(3)] == [True, True, False]
    store.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rule_23_a_server_that_is_killed_between_calls_is_found_again_with_all_counts(
    own_server: Callable[..., servers.Server], prefix: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pause(monkeypatch)
    server = own_server("--appendonly", "yes", "--appendfsync", "always")
    store = RedisStore(server.url, prefix=prefix, timeout=10)
    limiter = RateLimiter("4/hour", name="chat", store=store)
    budget = TokenBudget("100/day", name="tokens", store=store)

    async def run() -> None:
        async def call(method: str, *arguments: Any) -> Any:
            if mode == "sync":
                return getattr(limiter, method)(*arguments)
            return await getattr(limiter, f"{method}_async")(*arguments)

        assert await call("allow", "alice")
        hold = budget.reserve("alice", 60)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        assert await call("allow", "alice")  # without an error: the server had closed the connection
        server.kill()
        with pytest.raises(StoreUnavailable):
            await call("allow", "alice")
        hold.settle(25)
        with pytest.raises(StoreUnavailable):
            await call("peek", "alice")
        server.start()
        assert [await call("allow", "alice") for _ in range(3)] == [True, True, False]
        assert budget.peek("alice").used == 25

    asyncio.run(run())
    store.close()


def test_a_server_without_persistence_starts_anew_after_a_kill(
    own_server: Callable[..., servers.Server], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pause(monkeypatch)
    server = own_server()
    store = RedisStore(server.url, prefix=prefix, timeout=10)
    limiter = RateLimiter("1/hour", name="chat", store=store)
    budget = TokenBudget("100/day", name="tokens", store=store)
    assert limiter.allow("alice")
    hold = budget.reserve("alice", 60)
    server.kill()
    with pytest.raises(StoreUnavailable):
        limiter.allow("alice")
    server.start()
    hold.settle(80)
    assert [limiter.allow("alice") for _ in range(2)] == [True, False]
    assert budget.peek("alice").used == 0
    store.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rule_24_no_identity_is_told_where_the_server_repeats_a_command_that_it_does_not_know(
    own_server: Callable[..., servers.Server], prefix: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = "alice@example.com"
    server = own_server("--rename-command", "EVALSHA", "")
    store = RedisStore(server.url, prefix=prefix, timeout=10)
    limiter = RateLimiter("5/hour", name="chat", store=store)
    for _ in range(2):  # the second is told what befell the first
        with pytest.raises(StoreUnavailable, match=r"unknown command 'EVALSHA'$") as failure:
            limiter.acquire(key) if mode == "sync" else asyncio.run(limiter.acquire_async(key))
        assert key not in "".join(traceback.format_exception(failure.value))
    admitting = RedisStore(server.url, prefix=prefix, timeout=10, on_unavailable="allow")
    assert RateLimiter("5/hour", name="chat", store=admitting).allow(key)
    assert "unknown command" in caplog.text
    assert key not in caplog.text


class Wire:
    """A server between the store and Valkey that drops the connection instead of handing on a chosen reply.

    Or that hands on nothing any more, with the connection left open: it `hangs`.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self.lose = b"\0never"
        self.lost = 0
        self.hangs = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(near,), daemon=True).start()

    def _relay(self, near: socket.socket) -> None:
        with suppress(OSError), near, socket.create_connection(("127.0.0.1", self._port)) as far:
            while said := near.recv(1 << 20):
                far.sendall(said)
                if self.hangs and self.lose in said:
                    continue
                heard = far.recv(1 << 20)
                if self.lose in said:
                    self.lost += 1
                    self.lose = b"\0never"
                    return
                near.sendall(heard)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire(servers.server().port)
    yield wire
    wire.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rule_11_a_settlement_whose_reply_was_lost_is_made_once(
    wire: Wire, prefix: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pause(monkeypatch)
    store = RedisStore(wire.url, prefix=prefix, timeout=10)
    budget = TokenBudget("1_000/day", name="tokens", store=store)

    async def run() -> None:
        for units in (10, 20, 30):
            if mode == "sync":
                with budget.reserve("alice", 100) as hold:
                    wire.lose = b"journal"
                    hold.settle(units)
            else:
                async with budget.reserve_async("alice", 100) as hold:
                    wire.lose = b"journal"
                    hold.settle(units)
            assert store.behind

    asyncio.run(run())
    assert wire.lost == 3
    store.before_fork()
    store.after_fork(in_child=False)  # which changes nothing for the parent
    assert budget.charge("alice", 5).used == 65
    assert not store.behind
    store.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_question_whose_reply_was_lost_is_not_asked_again(
    wire: Wire, prefix: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its charge may stay, as that of a holder who died; no call is charged twice."""
    no_pause(monkeypatch)
    store = RedisStore(wire.url, prefix=prefix, timeout=10)
    limiter = RateLimiter("9/day", name="chat", store=store)
    limiter.acquire("alice")
    wire.lose = b"salice"
    with pytest.raises(StoreUnavailable):
        limiter.acquire("alice") if mode == "sync" else asyncio.run(limiter.acquire_async("alice"))
    assert limiter.peek("alice").used == 2
    store.close()


def test_rule_11_what_another_call_writes_meanwhile_is_made_once(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_writer(monkeypatch)
    budget = TokenBudget("1_000/day", name="tokens", store=store)
    first, second = budget.reserve("alice", 100), budget.reserve("alice", 100)

    def meanwhile(_: object) -> None:
        assert budget.peek("alice").used == 120
        second.settle(30)
        assert budget.peek("alice").used == 50

    first.settle(20)
    before(monkeypatch, store, meanwhile)
    store.flush()
    assert not store.behind
    assert budget.peek("alice").used == 50


def test_rule_24_what_could_not_be_written_is_an_outage_and_written_at_the_end(
    store: RedisStore, url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_writer(monkeypatch)
    monkeypatch.setattr("quotalimit.stores.outage.PAUSE", 60.0)
    budget = TokenBudget("1_000/day", name="tokens", store=store)
    budget.reserve("alice", 100).settle(20)
    before(monkeypatch, store, fail)
    store.flush()
    with pytest.raises(StoreUnavailable, match="gone"):
        budget.peek("alice")
    assert store.behind
    store.close()
    assert not store.behind
    same = TokenBudget("1_000/day", name="tokens", store=RedisStore(url, prefix=prefix))
    assert same.peek("alice").used == 20


def test_rule_12_what_was_lent_to_a_call_that_got_no_answer_is_returned(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pause(monkeypatch)
    budget = TokenBudget("100/day", name="tokens", store=store)
    with budget.reserve("alice", 100):
        before(monkeypatch, store, fail)
        with pytest.raises(StoreUnavailable):
            budget.reserve("alice", 60)
        with budget.reserve("alice", 100) as inner:
            inner.settle(70)
    assert budget.peek("alice").used == 70


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rule_24_a_server_that_is_not_there_is_looked_for_once(
    prefix: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often redis-py would try to connect: each time would take as long."""
    looked: list[object] = []

    def look(*place: object, **_: object) -> None:
        looked.append(place)
        raise TimeoutError

    monkeypatch.setattr(socket, "getaddrinfo", look)
    store = RedisStore("redis://localhost", prefix=prefix, timeout=10)
    limiter = RateLimiter("9/day", name="chat", store=store)
    with pytest.raises(StoreUnavailable):
        limiter.acquire("alice") if mode == "sync" else asyncio.run(limiter.acquire_async("alice"))
    assert len(looked) == 1
    store.close()


def test_rule_24_what_is_left_of_the_time_is_waited_for_on_a_connection_that_has_been_used(
    wire: Wire, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisStore(wire.url, prefix=prefix, timeout=30)
    limiter = RateLimiter("9/day", name="chat", store=store)
    limiter.acquire("alice")
    seconds = 0.0

    def hang(_: object) -> None:
        nonlocal seconds
        wire.hangs, wire.lose = True, b"EVALSHA"
        seconds = 29.9

    monkeypatch.setattr(clock, "monotonic", lambda: time.monotonic() + seconds)
    before(monkeypatch, store, hang)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        limiter.acquire("alice")
    assert time.monotonic() - began < 10
    store.close()


# Connections


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_connection_is_used_again_also_when_the_server_has_said_no(store: RedisStore, server: Any, mode: str) -> None:
    limiter = RateLimiter("100/hour", name="chat", store=store)

    async def calls() -> set[int]:
        seen = set()
        for number in range(6):
            if number == 3:
                await asyncio.to_thread(server.script_flush)
            limiter.acquire("alice") if mode == "sync" else await limiter.acquire_async("alice")
            seen.add(server.info("stats")["total_connections_received"])
        return seen

    assert len(asyncio.run(calls())) == 1


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rule_23_a_connection_to_what_has_become_a_replica_is_not_kept(
    own_server: Callable[..., servers.Server], prefix: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind an address that stays the same, the next one leads to the server that has taken over."""
    no_pause(monkeypatch)
    server = own_server()
    store = RedisStore(server.url, prefix=prefix, timeout=10)
    limiter = RateLimiter("9/hour", name="chat", store=store)

    async def call() -> None:
        limiter.acquire("alice") if mode == "sync" else await limiter.acquire_async("alice")

    async def calls() -> None:
        with server.client() as client:
            await call()
            kept = len(client.client_list())
            client.replicaof("127.0.0.1", servers.free_port())
            with pytest.raises(StoreUnavailable, match="read only"):
                await call()
            await asyncio.to_thread(servers.until, lambda: len(client.client_list()) == kept - 1)
            client.replicaof("NO", "ONE")
            await call()

    asyncio.run(calls())
    store.close()


def test_one_store_serves_threads_and_one_loop_after_another(store: RedisStore) -> None:
    """Without a word of closed loops or of anything left unclosed: warnings are errors."""
    limiter = RateLimiter("100/hour", name="chat", store=store)

    async def calls() -> None:
        await asyncio.gather(*(limiter.acquire_async("alice") for _ in range(5)))

    for _ in range(3):
        asyncio.run(calls())
        limiter.acquire("alice")
        thread = threading.Thread(target=lambda: asyncio.run(calls()))
        thread.start()
        thread.join()
        loop = asyncio.new_event_loop()
        loop.run_until_complete(calls())
        loop.close()
        gc.collect()
    assert limiter.peek("alice").used == 48
    assert sum(not loop.is_closed() for loop in store._links._loops) == 0


async def test_a_store_that_is_closed_under_way_lets_each_call_end_and_keeps_no_connection(
    own_server: Callable[..., servers.Server], prefix: str
) -> None:
    server = own_server()
    store = RedisStore(server.url, prefix=prefix, timeout=10)
    limiter = RateLimiter("100/hour", name="chat", store=store)
    await limiter.acquire_async("alice")
    calls = [asyncio.ensure_future(limiter.allow_async("alice")) for _ in range(30)]
    await asyncio.sleep(0)
    store.close()
    assert await asyncio.gather(*calls) == [True] * 30
    with server.client() as client:
        await asyncio.to_thread(servers.until, lambda: len(client.client_list()) == 1)


async def test_a_store_may_be_closed_again_while_it_closes(store: RedisStore) -> None:
    """Without a word of an exception that nobody retrieved."""
    told: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context))
    limiter = RateLimiter("9/hour", name="chat", store=store)
    for _ in range(2):
        await limiter.acquire_async("alice")
        links = store._links._loops[loop]
        for _ in range(3):
            store.close()
        while store._links._loops.get(loop) is links or links._unfinished:
            await asyncio.sleep(0)
        gc.collect()
    assert told == []
    assert (await limiter.peek_async("alice")).used == 2


@pytest.mark.parametrize("way", ["alone", "with a settlement"])
async def test_a_call_that_is_cancelled_takes_nothing(store: RedisStore, way: str) -> None:
    limiter = RateLimiter("9/hour", name="chat", store=store)
    budget = TokenBudget("1_000/day", name="tokens", store=store)

    async def hold() -> None:
        await budget.reserve_async("alice", 100)

    await limiter.acquire_async("alice")
    ended: list[Any] = []
    for wait in range(12):
        for kind, call in ((limiter, limiter.acquire_async("alice")), (budget, hold())):
            if way != "alone":
                (await budget.reserve_async("bob", 1)).settle(0)
            task = asyncio.ensure_future(call)
            for _ in range(wait // 2):
                await asyncio.sleep(0)
            if task.done():
                ended.append(kind)
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
    await finished(store)
    assert (await limiter.peek_async("alice")).used == 1 + ended.count(limiter)
    assert (await budget.peek_async("alice")).used == 100 * ended.count(budget)


async def test_a_call_of_several_slots_that_is_cancelled_before_it_starts_takes_nothing(
    cluster_store: RedisStore,
) -> None:
    started = 0

    @rate_limited("99/hour", key="address", store=cluster_store, name="address")
    @token_budget("900/day", key="user", reserve=10, store=cluster_store, name="tokens")
    async def chat(address: str, user: str) -> Any:
        nonlocal started
        started += 1
        return reply(3)

    await chat("192.0.2.1", "alice")
    for steps in range(12):
        call = asyncio.ensure_future(chat("192.0.2.1", "alice"))
        for _ in range(steps):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
    await finished(cluster_store)
    address, tokens = limiters_of(chat)
    assert (await address.peek_async("192.0.2.1")).used == started
    assert (await tokens.peek_async("alice")).used == 3 * started


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_loop_that_shuts_down_leaves_nothing_behind_of_the_calls_that_it_still_had(
    store: RedisStore, server: Any, cancelled: bool
) -> None:
    """What a cancelled one took is given back first; the connection of one that goes on is closed as it ends."""
    limiter = RateLimiter("9/hour", name="chat", store=store)
    loop = asyncio.new_event_loop()

    async def begin() -> asyncio.Task[Any]:
        await limiter.acquire_async("alice")
        server.client_pause(30)
        call = loop.create_task(limiter.acquire_async("alice"))
        await asyncio.sleep(0)
        if cancelled:
            call.cancel()
            await asyncio.wait([call])
        return call

    call = loop.run_until_complete(begin())
    loop.run_until_complete(loop.shutdown_asyncgens())
    if not cancelled:
        loop.run_until_complete(call)
    loop.close()
    del call
    gc.collect()
    assert limiter.peek("alice").used == (1 if cancelled else 2)


def test_loops_that_are_open_keep_their_connections(store: RedisStore, server: Any) -> None:
    limiter = RateLimiter("9/hour", name="chat", store=store)
    loops = [asyncio.new_event_loop() for _ in range(2)]
    before = server.info("stats")["total_connections_received"]
    for loop in loops * 2:
        loop.run_until_complete(limiter.acquire_async("alice"))
    assert server.info("stats")["total_connections_received"] == before + 2
    for loop in loops:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@pytest.mark.parametrize("lost", [b"\0never", b"HELLO", b"EVALSHA"])
async def test_nothing_is_told_of_what_became_of_calls_that_were_cancelled(
    wire: Wire, prefix: str, lost: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether they were waiting for a connection, for who is there, or for an answer that then never came."""
    for steps in range(1, 10):
        store = RedisStore(wire.url, prefix=prefix, timeout=10)
        limiter = RateLimiter("9/hour", name="chat", store=store)
        calls = [asyncio.ensure_future(limiter.allow_async("alice")) for _ in range(70 if steps == 1 else 1)]
        for _ in range(steps):
            await asyncio.sleep(0)
        wire.lose = lost
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await finished(store)
        store.close()
    gc.collect()
    assert caplog.records == []


@pytest.mark.parametrize("kind", ["cluster", "single"])
def test_a_fork_shares_no_socket_and_no_settlement(
    kind: str, url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_pause(monkeypatch)
    no_writer(monkeypatch)
    store = RedisStore(servers.cluster().url if kind == "cluster" else url, prefix=prefix, timeout=10)
    limiter = RateLimiter("1_000/hour", name="chat", store=store)
    budget = TokenBudget("1_000/day", name="tokens", store=store)
    limiter.acquire("alice")
    hold, kept = budget.reserve("alice", 100), budget.reserve("alice", 100)
    kept.settle(5)
    before(monkeypatch, store, fail)
    store.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forks beside threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            hold.settle(999)  # the parent's to settle
            budget.reserve("alice", 100).settle(3)
            for _ in range(50):
                limiter.acquire("alice")
            asyncio.run(limiter.acquire_async("alice"))
            store.flush()
            status = 0
        finally:
            os._exit(status)
    for _ in range(50):
        limiter.acquire("alice")
    assert os.waitpid(child, 0)[1] == 0
    hold.settle(7)
    assert limiter.peek("alice").used == 102
    assert budget.peek("alice").used == 5 + 3 + 7
    store.close()


async def test_a_fork_under_a_loop_leaves_its_connections_to_the_parent(store: RedisStore) -> None:
    limiter = RateLimiter("9/hour", name="chat", store=store)
    await limiter.acquire_async("alice")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            gc.collect()
            limiter.acquire("alice")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert (await limiter.acquire_async("alice")).used == 3


def test_a_unix_socket_and_a_password(own_server: Callable[..., servers.Server], prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    own_server("--unixsocket", str(path))
    limiter = RateLimiter("2/hour", name="chat", store=RedisStore(f"unix://{path}", prefix=prefix))
    assert [limiter.allow("alice"), asyncio.run(limiter.allow_async("alice")), limiter.allow("alice")] == [1, 1, 0]
    server = own_server()
    with server.client() as client:
        client.config_set("requirepass", "s3cret")
    right = RateLimiter("2/hour", name="chat", store=store_from_url(f"redis://:s3cret@127.0.0.1:{server.port}"))
    assert [right.allow("alice"), asyncio.run(right.allow_async("alice")), right.allow("alice")] == [1, 1, 0]
    wrong = RateLimiter("2/hour", name="chat", store=RedisStore(f"redis://:wr0ng@127.0.0.1:{server.port}"))
    with pytest.raises(StoreUnavailable) as failure:
        wrong.allow("alice")
    assert "wr0ng" not in str(failure.value)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rule_11_no_number_is_said_to_a_server_where_an_interrupt_would_crash(
    url: str, prefix: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hiredis ends the interpreter (SIGSEGV) if a signal handler raises while it packs an int."""
    said: list[object] = []

    def pack(words: tuple[Any, ...]) -> bytes:
        said.extend(words)
        return packed(words)

    packed = hiredis.pack_command
    monkeypatch.setattr(hiredis, "pack_command", pack)
    monkeypatch.setattr(links, "_pack", pack)
    store = RedisStore(url.replace("/0", "/3"), prefix=prefix, timeout=10)
    budget = TokenBudget("10/hour", name="tokens", store=store)
    with servers.server().client() as client:
        client.script_flush()  # so that the script itself is said, too
    said.clear()
    hold = budget.reserve("alice", 5) if mode == "sync" else asyncio.run(_held(budget))
    hold.settle(2)
    store.flush()
    assert {"EVALSHA", "EVAL", "3"} <= {word for word in said if isinstance(word, str)}
    assert {type(word) for word in said} == {str, bytes}
    store.close()


async def _held(budget: TokenBudget) -> Hold:
    return await budget.reserve_async("alice", 5)


def test_a_client_of_redis_py_says_where_the_server_is(url: str, prefix: str) -> None:
    port = servers.server().port
    node = servers.cluster().nodes[0].port
    clients: list[Callable[[], Any]] = [
        lambda: redis.Redis(port=port, decode_responses=True),
        lambda: redis.asyncio.Redis.from_url(url),
        lambda: redis.RedisCluster("127.0.0.1", node),
        lambda: redis.asyncio.RedisCluster("127.0.0.1", node),
    ]

    async def run() -> None:
        for number, make in enumerate(clients):
            client = make()
            store = RedisStore(client, prefix=prefix, timeout=10)
            limiter = RateLimiter("2/hour", name=f"chat {number}", store=store)
            assert [limiter.allow("al"), await limiter.allow_async("al"), limiter.allow("al")] == [True, True, False]
            store.close()
            if number % 2:
                await client.aclose()
            else:
                client.close()

    asyncio.run(run())


def test_connections_are_opened_without_compiling(store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11 fails with SystemError where two threads build syntax trees at once, as `inspect` does for the
    signatures of what is written in C (python/cpython#106905)."""
    limiter = RateLimiter("2/minute", name="calls", store=store)
    with monkeypatch.context() as patched:
        patched.setattr(ast, "parse", lambda *_: pytest.fail("a syntax tree was built"))
        limiter.acquire("alice")
        asyncio.run(limiter.acquire_async("alice"))


@pytest.mark.parametrize(
    "option",
    [
        *("decode_responses=true", "encoding=latin-1", "encoding_errors=ignore", "protocol=3", "max_connections=1"),
        *("socket_timeout=9", "socket_keepalive=true", "socket_read_size=1", "health_check_interval=1", "timeout=3"),
        *("retry_on_timeout=true", "retry_on_error=ConnectionError", "lib_name=x", "client_name=x", "db=3"),
    ],
)
def test_rule_11_a_url_may_say_what_the_store_does_its_own_way(url: str, prefix: str, option: str) -> None:
    """What is read the wrong way would be charged, and the call would fail."""
    store = RedisStore(f"{url.removesuffix('/0')}?{option}", prefix=prefix, timeout=10)
    budget = TokenBudget("10/hour", name="tokens", store=store)
    budget.charge("alice", 2)
    asyncio.run(budget.charge_async("alice", 3))
    assert budget.peek("alice").used == 5
    store.close()


@pytest.mark.parametrize(
    "option",
    [
        *("parser_class", "encoder_class", "command_packer", "credential_provider", "redis_connect_func", "retry"),
        *("socket_type", "maint_notifications_config", "event_dispatcher", "driver_info", "path", "decode_response"),
    ],
)
def test_what_a_url_asks_for_that_cannot_be_done_is_refused_by_name(option: str) -> None:
    with pytest.raises(ValueError, match=f"cannot do what {option}= asks for") as refusal:
        RedisStore(f"redis://:s3cret@localhost?{option}=1")
    assert "s3cret" not in str(refusal.value)


def test_what_only_tls_can_do_is_refused_without() -> None:
    with pytest.raises(ValueError, match="ssl_cert_reqs"):
        RedisStore("redis://localhost?ssl_cert_reqs=required")


@pytest.mark.parametrize("hello", [b"redis", b"valkey"])
def test_a_server_that_is_too_old_is_refused_with_the_remedy(hello: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [b"server", hello, b"version", b"6.2.1" if hello == b"redis" else b"7.2.4", b"mode", b"standalone"]
    store = RedisStore("redis://nowhere")
    monkeypatch.setattr(store._links, "_said", lambda *_: old)
    with pytest.raises(StoreUnavailable, match="needs Redis 7 or Valkey 8"):
        RateLimiter("5/minute", name="chat", store=store).acquire("alice")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"server": "http://localhost"}, ValueError, "redis://"),
        ({"server": 7}, TypeError, "a URL or a client"),
        ({"prefix": "a{b"}, ValueError, "braces"),
        ({"prefix": ""}, ValueError, "prefix"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"on_unavailable": "never"}, ValueError, "on_unavailable"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    known = set(WRITER.known)
    with pytest.raises(error, match=says) as refusal:
        RedisStore(**{"server": "redis://localhost", **arguments})
    assert set(WRITER.known) == known, "at the exit, the writer closes what it knows, be it made or half made"
    del refusal


def test_without_redis_py_it_is_said_what_to_install() -> None:
    code = "import sys; sys.modules['redis'] = None; import quotalimit.stores.redis"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "ImportError: RedisStore needs redis-py: pip install 'quotalimit[redis]'" in run.stderr


def test_rule_21_a_local_function_needs_a_name(store: RedisStore) -> None:
    with pytest.raises(InvalidLimit, match="name="):

        @rate_limited("5/minute", key="user", store=store)
        def local(user: str) -> None: ...


# Memory of the server


def test_a_sliding_window_keeps_eleven_bytes_a_call(store: RedisStore, server: Any, prefix: str) -> None:
    limiter = RateLimiter("1_000/hour", name="chat", store=store)
    for _ in range(1_000):
        limiter.acquire("alice")
    limiter.acquire("bob")
    assert server.memory_usage(f"{prefix}:{{salice}}:chat:0:sliding:3600000000", samples=0) <= 11_000
    assert server.memory_usage(f"{prefix}:{{sbob}}:chat:0:sliding:3600000000", samples=0) <= 200


def test_what_is_out_of_the_window_leaves_the_server(url: str, prefix: str, server: Any) -> None:
    now = 1_800_000_000_000_000
    store = RedisStore(url, prefix=prefix, clock=lambda: now)
    units = RateLimiter("20/second", name="units", store=store)
    held = TokenBudget(SlidingWindow("40/second"), name="held", store=store)
    for _ in range(600):
        now += 50_000
        units.acquire("alice")
        held.charge("alice", 2)
    assert server.llen(f"{prefix}:{{salice}}:units:0:sliding:1000000") < 60
    assert server.memory_usage(f"{prefix}:{{salice}}:held:0:sliding:1000000", samples=0) < 1_500
    store.close()


def test_what_was_settled_leaves_the_server_once_it_is_known_to_be_made(
    store: RedisStore, prefix: str, server: Any
) -> None:
    budget = TokenBudget("1_000/day", name="tokens", store=store)
    for _ in range(9):
        budget.reserve("alice", 10).settle(1)
        store.flush()
    (journal,) = server.scan_iter(f"{prefix}:journal:*")
    assert server.zcard(journal) == 1


@pytest.mark.parametrize("step", ["redis.Unsure", "redis.Want", "redis.RedisStore._turns", "links.Links._said"])
def test_rule_11_what_is_settled_as_a_call_is_interrupted_is_written_by_the_next(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    budget = TokenBudget("100/day", name="tokens", store=store)
    enclosing = budget.reserve("bob", 10)
    budget.reserve("alice", 30).settle(4)
    with monkeypatch.context() as patched:
        patched.setattr(f"quotalimit.stores.{step}", interrupt)
        with pytest.raises(KeyboardInterrupt) as interrupted:  # whose traceback keeps alive what was under way
            budget.charge("bob", 1)
    store.flush()
    assert not store.behind
    assert budget.peek("alice").used == 4
    enclosing.settle(10)
    del interrupted
