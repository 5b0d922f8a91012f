"""Rules 23 and 24: who is asked what, and for how long, with servers that say what a test has them say."""

from __future__ import annotations

import asyncio
from typing import Any

import hiredis
import pytest
import redis
import redis.asyncio
from redis.credentials import UsernamePasswordCredentialProvider
from redis.exceptions import AskError, MovedError, NoPermissionError, ResponseError
from redis.exceptions import ConnectionError as LostConnection

from quotalimit import StoreUnavailable, clock
from quotalimit.stores import links
from quotalimit.stores.links import Links, Node, NoTime, Patience, Send, Waiting
from quotalimit.stores.scripts import Script

SCRIPT = Script("return 1")
ONE, TWO, THREE, FOUR = ((f"10.0.0.{number}", number) for number in (1, 2, 3, 4))
SAME_HOST = (ONE[0], 2)

Said = list[tuple[Node, str]]


class Play:
    """What servers answer, by node and first word or by first word alone; and what was said to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[Any, Any] = {"HELLO": about(), "EVALSHA": b"done"}
        self.said: Said = []
        self.asking: list[Node] = []
        self.deadlines: list[Any] = []
        self.seconds = 0.0
        monkeypatch.setattr(clock, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(links, "key_slot", int)
        monkeypatch.setattr(Links, "_said", lambda _links, step, deadline: self._answer(step, deadline))

        async def said(waiting: Waiting) -> Any:
            return self._answer(waiting._step, waiting._patience)

        monkeypatch.setattr(Waiting, "said", said)

    def _answer(self, step: Send, deadline: object) -> Any:
        name = str(step.words[0])
        self.said.append((step.node, name))
        self.deadlines.append(deadline)
        self.seconds += 0.1
        if step.asking:
            self.asking.append(step.node)
        answer = self.answers.get((step.node, name), self.answers.get(name))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cluster(self, *nodes: Node) -> None:
        """Let the servers be a cluster of these, each with ten slots."""
        self.answers["HELLO"] = about(mode="cluster")
        self.answers["CLUSTER"] = slots(*nodes)

    def heard(self) -> Said:
        """What was said since this was last asked."""
        said, self.said = self.said, []
        return said


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    return Play(monkeypatch)


def about(**differences: str) -> list[Any]:
    """What a server says of itself, as Redis 7 and Valkey 8 do."""
    told: dict[str, Any] = {"server": "redis", "version": "7.4.0", "proto": 2, "id": 7, "mode": "standalone"}
    told |= {**differences, "role": "master", "modules": []}
    return [word.encode() if isinstance(word, str) else word for name, value in told.items() for word in (name, value)]


def slots(*nodes: Node) -> list[Any]:
    """What a cluster says of its slots, the last ones first."""
    told = [[10 * number, 10 * number + 9, [host.encode(), port, b"id"]] for number, (host, port) in enumerate(nodes)]
    return told[::-1]


def call(store: Links, key: bytes = b"0") -> Any:
    """A call of a script, as the store makes it: opened before, if need be."""
    if not store.known:
        store.drive(store.opened())
    return store.drive(store.called(SCRIPT, [key], []))


def store_on(node: Node, cluster: bool | None = None) -> Links:
    return Links(f"redis://{node[0]}:{node[1]}", 1.0, cluster)


# Who is there


@pytest.mark.parametrize(
    ("server", "version"),
    [("redis", "7.0.0"), ("valkey", "8.0.0"), ("of-another-make", "0.9"), ("redis", "unstable")],
)
def test_a_server_that_is_new_enough_is_used(play: Play, server: str, version: str) -> None:
    play.answers["HELLO"] = about(server=server, version=version)
    assert call(store_on(ONE)) == b"done"


@pytest.mark.parametrize(("server", "version"), [("redis", "6.2.9"), ("valkey", "7.2.9")])
def test_a_server_that_is_too_old_is_not(play: Play, server: str, version: str) -> None:
    play.answers["HELLO"] = about(server=server, version=version)
    with pytest.raises(StoreUnavailable, match=rf"{server} {version} is too old"):
        call(store_on(ONE))


def test_a_server_that_does_not_know_hello_is_too_old(play: Play) -> None:
    play.answers["HELLO"] = ResponseError("unknown command `HELLO`, with args beginning with: ")
    with pytest.raises(StoreUnavailable, match="older than Redis 7 or Valkey 8: upgrade it"):
        call(store_on(ONE))


@pytest.mark.parametrize("word", ["HELLO", "CLUSTER"])
def test_a_server_that_does_not_let_us_ask_says_so_itself(play: Play, word: str) -> None:
    play.cluster(ONE)
    play.answers[word] = NoPermissionError(f"this user has no permissions to run {word}")
    with pytest.raises(StoreUnavailable, match=f"cannot answer: this user has no permissions to run {word}"):
        call(store_on(ONE))


@pytest.mark.parametrize("mode", ["cluster", "standalone"])
@pytest.mark.parametrize("wanted", [True, False, None])
def test_whether_a_server_is_of_a_cluster_is_what_the_store_was_told_or_else_what_the_server_says(
    play: Play, mode: str, wanted: bool | None
) -> None:
    play.cluster(ONE, TWO)
    play.answers["HELLO"] = about(mode=mode)
    store = store_on(ONE, wanted)
    call(store, b"15")
    expected = mode == "cluster" if wanted is None else wanted
    assert play.heard()[-1][0] == (TWO if expected else ONE)


@pytest.mark.parametrize("host", [b"", None])
def test_rule_23_each_slot_is_asked_for_where_it_is_also_by_a_node_that_does_not_know_its_own_name(
    play: Play, host: bytes | None
) -> None:
    play.cluster(ONE, TWO, THREE)
    play.answers["CLUSTER"][-1][2][0] = host
    store = store_on(ONE)
    call(store)
    assert [store.node_of(b"%d" % slot) for slot in (0, 9, 10, 19, 20, 29, 30)] == [
        ONE,
        ONE,
        TWO,
        TWO,
        THREE,
        THREE,
        ONE,
    ]


def test_a_cluster_is_asked_by_the_node_that_answered_last_and_by_all_it_has_if_that_fails(play: Play) -> None:
    play.cluster(ONE, TWO, THREE)
    store = store_on(ONE)
    call(store, b"15")
    assert play.heard() == [(ONE, "HELLO"), (ONE, "CLUSTER"), (TWO, "EVALSHA")]
    play.answers |= {(ONE, word): LostConnection("of one") for word in ("HELLO", "EVALSHA")}
    with pytest.raises(StoreUnavailable, match="of one"):
        call(store)
    call(store, b"15")
    assert play.heard() == [(ONE, "EVALSHA"), (TWO, "HELLO"), (TWO, "CLUSTER"), (TWO, "EVALSHA")]
    play.answers |= {(TWO, word): LostConnection("of two") for word in ("HELLO", "EVALSHA")}
    play.cluster(ONE, THREE, FOUR)
    with pytest.raises(StoreUnavailable, match="of two"):
        call(store, b"15")
    call(store, b"15")
    assert play.heard() == [(TWO, "EVALSHA"), (THREE, "HELLO"), (THREE, "CLUSTER"), (THREE, "EVALSHA")]
    play.answers["HELLO"] = play.answers["EVALSHA"] = LostConnection("of another")
    with pytest.raises(StoreUnavailable, match="of another"):
        call(store, b"15")
    play.heard()
    with pytest.raises(StoreUnavailable, match="of one"):  # what befell the first that was asked
        call(store)
    assert play.heard() == [(ONE, "HELLO"), (FOUR, "HELLO"), (THREE, "HELLO")]
    play.answers |= {"HELLO": about(mode="cluster"), "EVALSHA": b"done", (THREE, "EVALSHA"): LostConnection("of three")}
    call(store, b"25")
    with pytest.raises(StoreUnavailable, match="of three"):
        call(store, b"15")
    call(store, b"25")
    opened = [(FOUR, "HELLO"), (FOUR, "CLUSTER"), (FOUR, "EVALSHA")]
    assert play.heard() == [(ONE, "HELLO"), *opened, (THREE, "EVALSHA"), *opened]


@pytest.mark.parametrize("word", ["HELLO", "EVALSHA"])
def test_a_node_for_which_there_was_no_time_is_not_taken_for_one_that_failed(play: Play, word: str) -> None:
    play.cluster(ONE, TWO, THREE)
    store = store_on(ONE)
    call(store)
    store.known = False
    play.heard()
    play.answers[word] = NoTime("no reply in 1 s")
    with pytest.raises(StoreUnavailable, match="no reply"):
        call(store)
    assert {node for node, _ in play.heard()} == {ONE}
    play.answers |= {"HELLO": about(mode="cluster"), "EVALSHA": b"done"}
    call(store)
    assert play.heard()[0] == (ONE, "HELLO")


# Where a slot has gone


def said_in_two_calls(play: Play, told: Exception) -> Said:
    """What is said in two calls on a slot, whose node, the first, answers so."""
    play.cluster(ONE, THREE)
    store = store_on(ONE)
    call(store)
    play.answers[ONE, "EVALSHA"] = told
    play.heard()
    assert [call(store, b"5") for _ in range(2)] == [b"done"] * 2
    return play.heard()


@pytest.mark.parametrize(
    ("told", "goes"),
    [
        *((MovedError("5 10.0.0.2:2"), TWO), (MovedError("5 :2"), SAME_HOST)),
        *((ResponseError("MOVED 5 10.0.0.2:2"), TWO), (ResponseError("MOVED 5 :2"), SAME_HOST)),  # as redis-py 5 has it
    ],
)
def test_a_slot_that_has_moved_is_asked_for_there_from_now_on(play: Play, told: Exception, goes: Node) -> None:
    assert said_in_two_calls(play, told) == [(ONE, "EVALSHA"), (goes, "EVALSHA"), (goes, "EVALSHA")]
    assert play.asking == []


@pytest.mark.parametrize(
    ("told", "goes"),
    [
        *((AskError("5 10.0.0.2:2"), TWO), (AskError("5 :2"), SAME_HOST)),
        *((ResponseError("ASK 5 10.0.0.2:2"), TWO), (ResponseError("ASK 5 :2"), SAME_HOST)),
    ],
)
def test_a_slot_that_is_moving_is_asked_for_where_it_goes_this_once(play: Play, told: Exception, goes: Node) -> None:
    assert said_in_two_calls(play, told) == [(ONE, "EVALSHA"), (goes, "EVALSHA")] * 2
    assert play.asking == [goes, goes]


@pytest.mark.parametrize("told", ["ERR no way:1", "MOVED on", "ERR something else altogether"])
def test_any_other_error_fails_the_call(play: Play, told: str) -> None:
    play.answers["EVALSHA"] = ResponseError(told)
    with pytest.raises(StoreUnavailable, match=told):
        call(store_on(ONE))


def test_nodes_that_send_to_each_other_are_left(play: Play) -> None:
    play.cluster(ONE, TWO)
    play.answers |= {(ONE, "EVALSHA"): MovedError("5 10.0.0.2:2"), (TWO, "EVALSHA"): MovedError("5 10.0.0.1:1")}
    with pytest.raises(StoreUnavailable, match="from node to node"):
        call(store_on(ONE))


# For how long


def talk_of_four(play: Play, **how: bool) -> tuple[Links, Any]:
    """A store, and what it says in a call that opens it and is sent on to another node: four things."""
    play.cluster(ONE, TWO)
    play.answers[ONE, "EVALSHA"] = MovedError("5 10.0.0.2:2")
    store = store_on(ONE)

    def talk() -> Any:
        yield from store.opened()
        yield from store.called(SCRIPT, [b"5"], [], **how)

    return store, talk()


def test_rule_24_the_timeout_is_for_all_that_a_call_says_unless_that_is_to_begin_anew(play: Play) -> None:
    store, talk = talk_of_four(play)
    store.drive(talk)
    assert play.deadlines == [1.0] * 4
    play.deadlines.clear()
    play.seconds = 10.0
    store, talk = talk_of_four(play, anew=True)
    store.drive(talk)
    assert play.deadlines == pytest.approx([11.0, 11.0, 11.2, 11.2])


@pytest.mark.parametrize("anew", [False, True])
async def test_rule_24_so_it_is_on_an_event_loop(play: Play, anew: bool) -> None:
    store, talk = talk_of_four(play, anew=anew)
    await store.drive_async(talk, lambda _: None)
    first, second, third, fourth = play.deadlines
    assert first is second
    assert third is fourth
    assert (third is not first) == anew
    store.close()


@pytest.mark.parametrize(("left", "error"), [(0.5, LostConnection), (0.0, NoTime), (-1.0, NoTime)])
def test_rule_24_nothing_is_said_once_the_time_is_over(
    left: float, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "monotonic", lambda: 100.0)
    store = Links("unix:///there/is/no/such/socket", 1.0, None)
    with pytest.raises(error):
        store._said(Send(ONE, ("HELLO",)), 100.0 + left)


class Loop:
    """The time of the event loop that runs, which stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 100.0
        self.told: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.told.append(context))
        monkeypatch.setattr(loop, "time", lambda: self.seconds)
        monkeypatch.setattr(clock, "monotonic", lambda: self.seconds)

    async def passes(self, seconds: float) -> None:
        self.seconds += seconds
        for _ in range(5):
            await asyncio.sleep(0)

    async def given_up(self, patience: Patience, step: float) -> int:
        """In which step of so many seconds each the patience is over that a call has with a server."""
        steps = 0
        try:
            async with patience:
                for _ in range(20):
                    steps += 1
                    await self.passes(step)
        except TimeoutError:
            return steps
        return -1


async def test_rule_24_an_event_loop_waits_for_as_long_as_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch)
    patience = Patience(1.0)
    assert await loop.given_up(patience, 0.125) == 8
    assert await loop.given_up(patience, 0.125) == 0


async def test_rule_24_what_is_said_one_after_the_other_shares_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch)
    patience = Patience(1.0)
    for _ in range(7):
        async with patience:
            loop.seconds += 0.125
        await loop.passes(60)  # between them nobody waits
    assert await loop.given_up(patience, 0.0625) == 2
    assert loop.told == []


async def test_rule_24_of_a_loop_that_is_blocked_a_quarter_of_the_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch)
    patience = Patience(1.0)
    async with patience:
        loop.seconds += 60
    async with patience:
        await loop.passes(60)
        await loop.passes(60)
    async with patience:
        await loop.passes(0.125)
    assert await loop.given_up(patience, 60) == 1
    patience = Patience(1.0)
    for _ in range(4):
        async with patience:
            loop.seconds += 60
    assert await loop.given_up(patience, 60) == 0


# What is said


@pytest.mark.parametrize("words", [("HELLO",), ("EVAL", "réponse", b"1", b"\0\r\n$3\r\n", b"")])
def test_without_hiredis_the_same_is_said(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_pack", None)
    assert links._packed(words) == hiredis.pack_command(words)


# Where the server is


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://", "localhost:6379/0"),
        ("redis://:s3cret@example.org:7/5", "example.org:7/5"),
        ("unix:///run/valkey.sock?db=2", "/run/valkey.sock"),
    ],
)
def test_the_address_is_shown_as_it_is_meant(url: str, shown: str) -> None:
    assert str(Links(url, 1.0, None)) == shown


@pytest.mark.parametrize("make", [redis.Redis, redis.asyncio.Redis])
def test_of_a_client_is_used_where_the_server_is_and_who_asks(make: Any) -> None:
    login: dict[str, Any] = {"username": "alice", "password": "s3cret", "client_name": "worker"}
    client = make(host="example.org", port=7, db=5, decode_responses=True, socket_timeout=9, **login)
    store = Links(client, 1.0, None)
    assert str(store) == "example.org:7/5"
    made = store.make_async(ONE)
    assert {name: getattr(made, name) for name in login} == login
    assert (made.host, made.port, made.db) == (*ONE, "5")
    assert (made.encoder.decode_responses, made.socket_timeout) == (False, None)


def test_a_client_may_have_somebody_to_ask_who_asks() -> None:
    login = UsernamePasswordCredentialProvider("alice", "s3cret")
    assert Links(redis.Redis(credential_provider=login), 1.0, None).make_async(ONE).credential_provider is login


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("make", [redis.Redis, redis.asyncio.Redis, redis.RedisCluster, redis.asyncio.RedisCluster])
def test_a_client_over_tls_means_tls(make: Any, tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for asks in ("NodesManager.initialize", "CommandsParser"):  # the server, as soon as the client is made
        monkeypatch.setattr(f"redis.cluster.{asks}", lambda _: None)
    store = Links(make(host="10.0.0.1", port=7, ssl=tls), 1.0, None)
    assert str(store) == "10.0.0.1:7/0"
    assert isinstance(store.make_async(ONE), redis.asyncio.connection.SSLConnection) == tls


def test_a_client_whose_servers_others_know_is_refused() -> None:
    sentinel: Any = redis.Sentinel
    client = sentinel([("10.0.0.1", 7)]).master_for("counts")
    with pytest.raises(TypeError, match="SentinelManagedConnection: give it the server's URL"):
        Links(client, 1.0, None)
