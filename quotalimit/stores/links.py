"""Connections to a Redis server or cluster: of threads and of event loops, each used by one call at a time.

What is said to a server is written once, as generators that yield what to `Send` and get the reply; `drive` and
`drive_async` do it. Nothing is said twice that a server may have heard: a reply that is lost is an error.
"""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop, CancelledError, Semaphore, Task
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from functools import cache
from inspect import signature
from types import TracebackType
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar, cast

from quotalimit import clock
from quotalimit.errors import StoreUnavailable
from quotalimit.stores.scripts import Script

try:
    import redis.asyncio.connection
    import redis.connection
    from redis.asyncio.retry import Retry as AsyncRetry
    from redis.backoff import NoBackoff
    from redis.crc import key_slot
    from redis.exceptions import AskError, MovedError, NoScriptError, ReadOnlyError, RedisError, ResponseError
    from redis.exceptions import ConnectionError as LostConnection
    from redis.exceptions import TimeoutError as NoReply
    from redis.retry import Retry
except ImportError as error:
    raise ImportError("RedisStore needs redis-py: pip install 'quotalimit[redis]'") from error

Words: TypeAlias = "tuple[str | bytes, ...]"
"""A command. No number is among its words: hiredis crashes on one if a signal handler raises meanwhile."""

_pack: Callable[[tuple[Any, ...]], bytes] | None
try:
    from hiredis import pack_command as _pack
except ImportError:  # slower, but not needed
    _pack = None

T = TypeVar("T")

_OLDEST: Final = {"redis": 7, "valkey": 8}
_MOST_REDIRECTS: Final = 8
_MOST_CONNECTIONS: Final = 64
"""Of one event loop to one server; more calls at once wait for one."""

_TURNS: Final = 4
"""In which a time-out passes on an event loop. What blocks the loop, however long, takes one."""

_DESCRIBING: Final = ("host", "port", "db", "username", "password", "path", "client_name")
"""What of a client's or a URL's options says where the server is and who asks, with those that begin with `ssl_`."""

_OWN: Final = (
    *("decode_responses", "encoding", "encoding_errors", "legacy_responses", "protocol", "lib_name", "lib_version"),
    *("socket_timeout", "socket_connect_timeout", "socket_keepalive", "socket_read_size", "timeout", "max_connections"),
    *("retry_on_timeout", "retry_on_error", "health_check_interval"),
)
"""What of a URL's options is passed over: how the server is read, waited for and tried again is the store's own."""

Node: TypeAlias = tuple[str, int]
"""A server of a cluster."""


class Send(NamedTuple):
    """What to say to a server. The time for a talk is that for all it says, unless it begins `anew`."""

    node: Node
    words: Words
    asking: bool = False
    anew: bool = False


class NoTime(NoReply):
    """Nothing was said, as the time was over."""


Talk: TypeAlias = Generator[Send, Any, T]


class Links:
    """All connections of one store."""

    def __init__(self, server: Any, timeout: float, cluster: bool | None) -> None:
        options = _from_url(server) if isinstance(server, str) else _from_client(server)
        self._kind: str = options.pop("kind")
        if options.get("db"):
            options["db"] = str(options["db"])  # a word, as redis-py sends it as it is
        self._options = options
        self._timeout = timeout
        self._cluster_wanted = cluster
        self._home: Node = (options.pop("host", "localhost"), int(options.pop("port", 6379)))
        self._nodes: list[Node] = [self._home]
        """In the order in which they are asked where the slots are: those that failed last, last."""
        self._slots: dict[int, Node] = {}
        self.known = False
        """Whether it is known what server this is: once it was `opened`, and until a call fails."""
        self.cluster = False
        self._idle: dict[Node, list[Any]] = {}
        self._loops: dict[AbstractEventLoop, LoopLinks] = {}

    def __str__(self) -> str:
        """The server's address, without the password."""
        if "path" in self._options:
            return str(self._options["path"])
        return f"{self._home[0]}:{self._home[1]}/{self._options.get('db', 0)}"

    def unavailable(self, reason: object) -> StoreUnavailable:
        return StoreUnavailable(f"Redis at {self} cannot answer: {reason}")

    def opened(self) -> Talk[None]:
        """Make sure that the server is known to be new enough, and where the slots of a cluster are."""
        failure: Exception | None = None
        for node in list(self._nodes):
            try:
                yield from self._open(node)
            except StoreUnavailable as error:
                failure = failure or error
                if isinstance(error.__cause__, NoTime):
                    break
                self._ask_last(node)
            else:
                return
        assert failure is not None
        raise failure

    def _ask_last(self, node: Node) -> None:
        self._nodes = [*(other for other in self._nodes if other != node), node]

    def _open(self, node: Node) -> Talk[None]:
        try:
            hello = yield Send(node, ("HELLO",))
        except RedisError as error:
            if isinstance(error, ResponseError) and "unknown command" in str(error).lower():
                raise self.unavailable("it is older than Redis 7 or Valkey 8: upgrade it") from error
            raise self.unavailable(error) from error
        about = {_text(hello[place]): _text(hello[place + 1]) for place in range(0, len(hello) - 1, 2)}
        name, version = about.get("server", "redis"), about.get("version", "")
        major = version.split(".")[0]
        if major.isdigit() and int(major) < _OLDEST.get(name, 0):
            raise self.unavailable(f"{name} {version} is too old: RedisStore needs Redis 7 or Valkey 8 at least")
        self.cluster = about.get("mode") == "cluster" if self._cluster_wanted is None else self._cluster_wanted
        if self.cluster:
            try:
                slots = yield Send(node, ("CLUSTER", "SLOTS"))
            except RedisError as error:
                raise self.unavailable(error) from error
            self._slots = {
                slot: (_text(main[0]) or node[0], main[1])
                for first, last, main, *_ in slots
                for slot in range(first, last + 1)
            }
            there = {self._home, *self._slots.values()}
            known = [node for node in self._nodes if node in there]
            self._nodes = [*known, *sorted(there.difference(known))]
        self.known = True

    def _failed(self, node: Node, error: RedisError) -> StoreUnavailable:
        """What is raised when a call failed; the next one looks again who is there."""
        self.known = False
        if not isinstance(error, NoTime):
            self._ask_last(node)
        return self.unavailable(error)

    def node_of(self, key: bytes) -> Node:
        """The server that has a key, as far as is known."""
        return self._slots.get(key_slot(key), self._home) if self.cluster else self._home

    def called(self, script: Script, keys: list[bytes], arguments: list[bytes], *, anew: bool = False) -> Talk[bytes]:
        """Call a script. Raises `StoreUnavailable` if it was not, or if nobody knows whether it was."""
        words: Words = ("EVALSHA", script.digest, b"%d" % len(keys), *keys, *arguments)
        node = self.node_of(keys[0])
        asking = False
        for _ in range(_MOST_REDIRECTS):
            try:
                reply = yield Send(node, words, asking, anew)
            except NoScriptError:
                words = ("EVAL", script.source, *words[2:])
            except ResponseError as error:
                _cut_words(error)
                redirected = _redirected(error, node)
                if redirected is None:
                    raise self._failed(node, error) from error
                node, asking = redirected
                if not asking:
                    self._slots[key_slot(keys[0])] = node
            except RedisError as error:
                raise self._failed(node, error) from error
            else:
                return cast("bytes", reply)
            anew = False
        raise self._failed(node, RedisError("a cluster that sends from node to node"))

    # Threads

    def drive(self, talk: Talk[T]) -> T:
        deadline = clock.monotonic() + self._timeout
        try:
            step = next(talk)
            while True:
                if step.anew:
                    deadline = clock.monotonic() + self._timeout
                try:
                    reply = self._said(step, deadline)
                except RedisError as error:
                    step = talk.throw(error)
                else:
                    step = talk.send(reply)
        except StopIteration as stop:
            return cast("T", stop.value)
        finally:
            talk.close()

    def _said(self, step: Send, deadline: float) -> Any:
        left = deadline - clock.monotonic()
        if left <= 0:
            raise NoTime(self.no_reply)
        idle = self._idle.setdefault(step.node, [])
        try:
            connection = idle.pop()
        except IndexError:
            connection = self._connection(step.node, redis.connection, Retry(NoBackoff(), 0))
        else:
            _reopen_if_closed(connection)
        connection.socket_connect_timeout = connection.socket_timeout = left
        if connection._sock is not None:
            connection._sock.settimeout(left)
        try:
            if step.asking:
                connection.send_command("ASKING")
                connection.read_response()
            connection.send_packed_command([_packed(step.words)], check_health=False)
            reply = connection.read_response()
        except BaseException as error:
            if not isinstance(error, ResponseError) or isinstance(error, ReadOnlyError):
                connection.disconnect()  # also where a failover has left it with a replica
                raise
            idle.append(connection)
            raise
        idle.append(connection)
        return reply

    # Event loops

    async def drive_async(self, talk: Talk[T], abandon: Callable[[T], None]) -> T:
        """Do what a generator says. If that is cancelled, the reply is heard all the same, and its result abandoned."""
        links = await self._of_loop()
        patience = Patience(self._timeout)
        try:
            step = next(talk)
            while True:
                if step.anew:
                    patience = Patience(self._timeout)
                waiting = Waiting(self, links, step, patience)
                try:
                    reply = await waiting.said()
                except RedisError as error:
                    step = talk.throw(error)
                except CancelledError:
                    links.finish(self._finished(waiting, talk, abandon))
                    raise
                else:
                    step = talk.send(reply)
        except StopIteration as stop:
            return cast("T", stop.value)

    async def _finished(self, waiting: Waiting, talk: Talk[T], abandon: Callable[[T], None]) -> None:
        """Hear the reply that a cancelled call was waiting for, so that what it took can be given back.

        Nothing more is said for it: a talk that has more to say is closed, and gives back what it took so far.
        """
        patience = Patience(self._timeout)
        try:
            try:
                reply = await waiting.heard(patience)
            except RedisError as error:
                talk.throw(error)
            else:
                talk.send(reply)
        except StopIteration as stop:
            abandon(stop.value)
        except StoreUnavailable:
            pass
        finally:
            talk.close()

    async def _of_loop(self) -> LoopLinks:
        loop = asyncio.get_running_loop()
        links = self._loops.get(loop)
        if links is None:
            for other in list(self._loops.values()):
                other.abandon_if_closed()
            links = self._loops[loop] = LoopLinks(self._loops, loop)
            await links.open()
        return links

    def make_async(self, node: Node) -> Any:
        return self._connection(node, redis.asyncio.connection, AsyncRetry(NoBackoff(), 0))

    @property
    def no_reply(self) -> str:
        return f"no reply in {self._timeout} s"

    def close(self) -> None:
        """Close the connections of threads, and have those of event loops closed by their loops."""
        for idle in list(self._idle.values()):
            while idle:
                idle.pop().disconnect()
        for links in list(self._loops.values()):
            links.close_soon()

    def forget(self) -> None:
        """After a fork, let go of the parent's connections without a word to the server."""
        _inherited.append((self._idle, self._loops))
        self._idle, self._loops = {}, {}

    def _connection(self, node: Node, module: Any, retry: Any) -> Any:
        """A new connection, without time-outs: who uses it sets them, or has `Patience`."""
        options = dict(self._options, protocol=2, retry=retry, socket_connect_timeout=None, socket_timeout=None)
        options["host"], options["port"] = node  # which a Unix socket does not take
        kind = getattr(module, self._kind)
        taken = _options_taken(kind)
        return kind(**{name: option for name, option in options.items() if name in taken})


_inherited: Final[list[Any]] = []
"""Connections of the parent process, which must be neither closed nor collected here."""


class LoopLinks:
    """The connections of one event loop. They are closed as it shuts down."""

    def __init__(self, loops: dict[AbstractEventLoop, LoopLinks], loop: AbstractEventLoop) -> None:
        self._loops = loops
        self._loop = loop
        self._closing = self._closed_with_the_loop()
        self._unfinished: set[Task[None]] = set()
        self.idle: dict[Node, list[Any]] = {}
        self.closed = False
        """Whether what is no longer used is closed, and not kept."""
        self.room = Semaphore(_MOST_CONNECTIONS)

    async def open(self) -> None:
        await anext(self._closing)

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something in the background."""
        task = self._loop.create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)

    async def _closed_with_the_loop(self) -> AsyncGenerator[None]:
        """`asyncio.run` and its like close the asynchronous generators of their loop before it ends."""
        try:
            yield
        finally:
            self.closed = True
            self._loops.pop(self._loop, None)
            others = self._unfinished - {asyncio.current_task()}
            if others:
                await asyncio.wait(others)
            for idle in self.idle.values():
                while idle:
                    await _let_go(idle.pop())

    def close_soon(self) -> None:
        """Have the loop close the connections, if it still runs."""
        try:
            self._loop.call_soon_threadsafe(self._close)
        except RuntimeError:
            self.abandon_if_closed()

    def _close(self) -> None:
        if not self.closed:
            self.closed = True
            self.finish(self._closing.aclose())

    def abandon_if_closed(self) -> None:
        """Let go of the connections of a loop that was closed without shutting down."""
        if not self._loop.is_closed():
            return
        self._loops.pop(self._loop, None)
        for idle in self.idle.values():
            while idle:
                connection = idle.pop()
                writer, connection._writer = connection._writer, None
                if writer is not None:
                    _close_without_loop(writer.transport)


class Waiting:
    """One thing said to a server on an event loop, and the wait for its reply."""

    __slots__ = ("_connection", "_owner", "_patience", "_step", "links")

    def __init__(self, owner: Links, links: LoopLinks, step: Send, patience: Patience) -> None:
        self._owner = owner
        self._step = step
        self._patience = patience
        self._connection: Any = None
        """What it is said on, if it was cancelled there."""
        self.links = links

    async def said(self) -> Any:
        """The reply, or `NoTime` if the time was over before a connection was free."""
        try:
            async with self._patience, self.links.room:
                return await self._exchanged()
        except TimeoutError:
            if self._connection is None:
                raise NoTime(self._owner.no_reply) from None
            await _let_go(self._connection)
            raise NoReply(self._owner.no_reply) from None

    async def _exchanged(self) -> Any:
        links, node = self.links, self._step.node
        idle = links.idle.setdefault(node, [])
        connection = idle.pop() if idle else self._owner.make_async(node)
        keep = False
        try:
            await _reopen_async_if_closed(connection)
            if self._step.asking:
                await connection.send_command("ASKING")
                await connection.read_response()
            await connection.send_packed_command([_packed(self._step.words)], check_health=False)
            reply = await connection.read_response(disconnect_on_error=False)
            keep = True
        except CancelledError:
            self._connection = connection
            raise
        except ResponseError as error:
            keep = not isinstance(error, ReadOnlyError)  # a failover has left it with a replica
            raise
        finally:
            if keep and not links.closed:
                idle.append(connection)
            elif connection is not self._connection:
                await _let_go(connection)
        return reply

    async def heard(self, patience: Patience) -> Any:
        """The reply, for which nobody waited to the end."""
        connection = self._connection
        if connection is None or not connection.is_connected:
            raise LostConnection("cancelled before it was said")
        try:
            async with patience:
                return await connection.read_response(disconnect_on_error=False)
        except TimeoutError:
            raise NoReply(self._owner.no_reply) from None
        finally:
            await _let_go(connection)


class Patience:
    """The time for all that a talk says. It passes only while the event loop runs: one that is blocked hears no reply.

    Entered for each thing said, one after the other; raises `TimeoutError` once no time is left.
    """

    __slots__ = ("_left", "_loop", "_since", "_timeout", "_timer", "_turn")

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._left = seconds
        self._turn = seconds / _TURNS

    async def __aenter__(self) -> None:
        if self._left <= 0:
            raise TimeoutError
        self._timeout = asyncio.timeout(None)
        await self._timeout.__aenter__()
        self._begin_turn()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._left -= min(clock.monotonic() - self._since, self._turn)
        await self._timeout.__aexit__(kind, error, trace)

    def _begin_turn(self) -> None:
        self._since = clock.monotonic()
        self._timer = self._loop.call_later(min(self._turn, self._left), self._pass)

    def _pass(self) -> None:
        """One turn has passed, however long it took, and whatever a clock says that a test has frozen."""
        self._left -= self._turn
        if self._left > 0:
            self._begin_turn()
        else:
            self._timeout.reschedule(0)  # a moment that is over


def _redirected(error: ResponseError, node: Node) -> tuple[Node, bool] | None:
    """The node of a cluster that a reply sends to, and whether for this once; None for any other error."""
    if isinstance(error, AskError):
        return (error.host or node[0], int(error.port)), not isinstance(error, MovedError)
    words = str(error).split()
    if len(words) == 3 and words[0] in ("MOVED", "ASK"):  # as redis-py 5 has it
        host, _, port = words[2].rpartition(":")
        return (host or node[0], int(port)), words[0] == "ASK"
    return None


def _cut_words(error: ResponseError) -> None:
    """Cut off what a server repeats of a command that it does not know: keys are identities, which no log may show."""
    error.args = (str(error).partition(", with args beginning with")[0],)


def _packed(words: Words) -> bytes:
    """Words as a command, in the protocol of Redis."""
    if _pack is not None:
        return _pack(words)
    written = [word if isinstance(word, bytes) else word.encode() for word in words]
    return b"*%d\r\n%b" % (len(written), b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in written))


def _reopen_if_closed(connection: Any) -> None:
    """Close our end of a connection that the server has closed: it is opened again before anything is said."""
    try:
        if not connection.can_read():
            return
    except RedisError:
        pass
    connection.disconnect()


async def _reopen_async_if_closed(connection: Any) -> None:
    """The twin of `_reopen_if_closed`."""
    if not connection.is_connected:
        return
    try:
        look = getattr(connection, "can_read", None) or connection.can_read_destructive  # until redis-py 8
        if not await look():
            return
    except RedisError:
        pass
    await _let_go(connection)


async def _let_go(connection: Any) -> None:
    """Close a connection at once: TLS would first wait for the server's goodbye, and perhaps longer than the loop."""
    if connection._writer is not None:
        connection._writer.transport.abort()
    await connection.disconnect(nowait=True)


def _close_without_loop(transport: Any) -> None:
    """Close the socket of a transport whose loop is closed, which asyncio has no word for."""
    below = getattr(getattr(transport, "_ssl_protocol", None), "_transport", transport)  # of TLS: what has the socket
    try:
        transport.abort()
    except RuntimeError:  # as the loop is closed, but what can be done without it is done
        pass
    try:
        below._call_connection_lost(None)
    except Exception:
        pass  # TLS would tell the loop; one of another make closes its sockets as they are collected


def _from_url(url: str) -> dict[str, Any]:
    try:
        options: dict[str, Any] = dict(cast("Any", redis.connection).parse_url(url))
    except ValueError:
        raise ValueError(
            "the URL of a RedisStore is written redis://, rediss:// or unix://, such as redis://localhost:6379/0"
        ) from None
    kind = options.pop("connection_class", redis.connection.Connection)
    if url.startswith("rediss://") and options.get("ssl_cert_reqs") != "none":
        options.setdefault("ssl_check_hostname", True)  # redis-py did not look at the name before version 6
    options = {name: option for name, option in options.items() if name not in _OWN}
    for name in options:
        if not _describes(name) or name not in _options_taken(kind):
            raise ValueError(f"a RedisStore cannot do what {name}= asks for in such a URL: leave it out")
    return {**options, "kind": kind.__name__}


def _from_client(client: Any) -> dict[str, Any]:
    """The options of a client of redis-py, sync or asyncio, for a server or for a cluster."""
    kind = "Connection"
    if hasattr(client, "nodes_manager"):
        node = client.get_default_node() or next(iter(client.nodes_manager.startup_nodes.values()))
        given = {**getattr(client, "connection_kwargs", {}), **getattr(client.nodes_manager, "connection_kwargs", {})}
        given |= {"host": node.host, "port": node.port}
    elif hasattr(client, "connection_pool"):
        given = client.connection_pool.connection_kwargs
        kind = client.connection_pool.connection_class.__name__
    else:
        raise TypeError(f"RedisStore needs a URL or a client of redis-py, not {type(client).__name__}")
    kind = getattr(given.get("connection_class"), "__name__", kind)
    if given.get("ssl"):
        kind = "SSLConnection"
    if kind not in ("Connection", "SSLConnection", "UnixDomainSocketConnection"):
        raise TypeError(f"RedisStore cannot make connections like the client's {kind}: give it the server's URL")
    options = {name: given[name] for name in given if _describes(name) or name == "credential_provider"}
    return {**{name: option for name, option in options.items() if option is not None}, "kind": kind}


def _describes(name: str) -> bool:
    return name in _DESCRIBING or name.startswith("ssl_")


@cache
def _options_taken(kind: type) -> frozenset[str]:
    """The names of the options that a kind of connection takes, by itself or by what it inherits."""
    makers = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base) and base is not object]
    return frozenset(name for maker in makers for name in signature(maker).parameters)


def _text(word: Any) -> str:
    """Text of a server's; "" for anything else."""
    return word.decode() if isinstance(word, bytes) else ""
