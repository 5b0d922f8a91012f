"""Objects that stream, of whatever class, come back as themselves and are charged when they end (rules 8, 12, 16)."""

from __future__ import annotations

import asyncio
import csv
import gc
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace, coroutine
from typing import Any

import pytest
import wrapt

from quotalimit import TokenBudget, rate_limited, record_usage, token_budget

from .helpers import open_holds, reply, used

pytestmark = pytest.mark.usefixtures("time", "small_heap")

RESERVE = 500


def charged(result: Any, use: Callable[[Any], Any], reserve: int | None = RESERVE, **options: Any) -> int:
    """What a call is charged that returns something, which is then used, and dropped."""
    budget = TokenBudget("1_000_000/day")
    function = token_budget(budget, key="user", reserve=reserve, **options)(lambda user: result())
    use(function("alice"))
    gc.collect()
    assert open_holds(budget) == 0
    return used(budget)


def drain(stream: Any) -> None:
    assert len(list(stream)) == 2


def drain_async(stream: Any) -> None:
    async def count() -> int:
        return len([item async for item in stream])

    assert asyncio.run(count()) == 2


def drop(stream: Any) -> None:
    del stream


class Items:
    """A stream, sync and async in one, that tells 12 tokens."""

    response = "r"

    def __init__(self) -> None:
        self.items = ["x", reply(12)]

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self.items:
            raise StopIteration
        return self.items.pop(0)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if not self.items:
            raise StopAsyncIteration
        return self.items.pop(0)


# Proxies, as those who trace calls put around streams.


class Traced(wrapt.ObjectProxy):  # type: ignore[type-arg]
    """OpenLLMetry's, and Datadog's."""

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self.__wrapped__.__next__()

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        return await self.__wrapped__.__anext__()


@pytest.mark.parametrize("proxy", [wrapt.ObjectProxy, Traced, lambda stream: Traced(Traced(stream))])
@pytest.mark.parametrize("end", [drain, drain_async])
def test_rule_16_a_stream_behind_a_proxy_comes_back_as_itself(proxy: Any, end: Any) -> None:
    if proxy is wrapt.ObjectProxy and end is drain_async:
        proxy = wrapt.AutoObjectProxy  # the plain one does not iterate asynchronously

    def use(stream: Any) -> None:
        assert type(stream) is not Items
        assert isinstance(stream, Items)
        assert stream.response == "r"
        end(stream)

    assert charged(lambda: proxy(Items()), use) == 12
    assert charged(lambda: proxy(Items()), drop) == RESERVE


# What cannot be watched


def cursor() -> Any:
    return sqlite3.connect(":memory:").execute("values (1), (2)")


def fetch(rows: Any) -> None:
    assert rows.fetchall() == [(1,), (2,)]


def read(rows: Any) -> None:
    assert (next(rows), rows.line_num) == (["a", "b"], 1)


def close(entries: Any) -> None:
    entries.close()


@pytest.mark.parametrize(
    ("make", "use"), [(cursor, fetch), (lambda: csv.reader(["a,b"]), read), (lambda: os.scandir("."), close)]
)
def test_rule_16_an_iterator_that_cannot_be_watched_and_is_more_than_that_comes_back_as_itself(
    make: Callable[[], Any], use: Callable[[Any], None]
) -> None:
    assert charged(make, use) == RESERVE


def test_rule_16_a_call_that_is_charged_no_tokens_returns_any_iterator_itself() -> None:
    limited = rate_limited("5/minute", key="user", refund_on=ConnectionError)(lambda user: map(str, (1, 2)))
    assert type(limited("alice")) is map


def test_rule_8_a_mere_iterator_of_c_is_charged_by_its_items() -> None:
    assert charged(lambda: map(reply, (4, 5)), lambda it: list(it) and None) == 9


# What is a stream by its name alone


@dataclass
class StreamReport:
    usage: Any

    def __iter__(self) -> Iterator[Any]:
        return iter((self.usage,))


def test_rule_8_a_record_is_settled_at_once_though_it_is_called_a_stream() -> None:
    budget = TokenBudget("1000/day")
    result = StreamReport(reply(12).usage)
    function = token_budget(budget, key="user")(lambda user: result)
    assert function("alice") is result
    assert type(result) is StreamReport
    assert (open_holds(budget), used(budget)) == (0, 12)


class StreamedAnswer:
    """One that made its request before it is entered, and tells its usage itself."""

    def __init__(self, usage: Any = None) -> None:
        self.usage = usage

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class StreamManager(StreamedAnswer):
    """One that makes it when it is entered."""


def enter(manager: Any) -> None:
    with manager:
        pass


@pytest.mark.parametrize("end", [drop, enter])
def test_rule_8_what_may_have_made_its_request_is_charged_though_it_is_not_used(end: Callable[[Any], None]) -> None:
    assert charged(lambda: StreamedAnswer(reply(12).usage), end) == 12
    assert charged(StreamedAnswer, end) == RESERVE
    assert charged(StreamManager, end) == (0 if end is drop else RESERVE)


class EnteredOnly:
    __enter__ = StreamedAnswer.__enter__


def test_rule_8_what_can_be_entered_but_not_left_is_no_stream() -> None:
    stream = type("AStream", (EnteredOnly,), {})()
    assert charged(lambda: stream, drop) == RESERVE
    assert type(stream).__mro__[1] is EnteredOnly


# Streams with slots, and those that only make an iterator


class Slotted:
    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items = ["x", reply(12)]

    __iter__, __next__, __aiter__, __anext__ = Items.__iter__, Items.__next__, Items.__aiter__, Items.__anext__


class MakesItems:
    def __aiter__(self) -> AsyncIterator[Any]:
        return Items()


class MakesGenerator:
    async def __aiter__(self) -> AsyncIterator[Any]:
        yield "x"
        yield reply(12)


class MyStream:
    def __iter__(self) -> Iterator[Any]:
        return iter(("x", reply(12)))


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        (Slotted, drain),
        (Slotted, drain_async),
        (MakesItems, drain_async),
        (MakesGenerator, drain_async),
        (MyStream, drain),
    ],
)
def test_rule_16_whatever_iterates_is_charged_at_its_end(kind: type, end: Callable[[Any], None]) -> None:
    def use(stream: Any) -> None:
        assert isinstance(stream, kind)
        end(stream)

    assert charged(kind, use) == 12
    assert charged(kind, drop) == RESERVE


async def test_rule_11_the_iterator_that_a_stream_makes_is_closed_with_it() -> None:
    cleaned_up = []

    class Cleaning:
        async def __aiter__(self) -> AsyncIterator[Any]:
            try:
                yield "x"
                yield "y"
            finally:
                await asyncio.sleep(0)
                cleaned_up.append(True)

    budget = TokenBudget("1000/day")
    items: Any = aiter(token_budget(budget, key="user", reserve=50)(lambda user: Cleaning())("alice"))
    await anext(items)
    await items.aclose()
    assert (cleaned_up, open_holds(budget), used(budget)) == ([True], 0, 50)


# What looks like a future


class Rpc:
    """A call of gRPC: it has `add_done_callback`, but no `result`."""

    def add_done_callback(self, callback: Any) -> None:
        callback(self)


class RpcOfOne(Rpc):
    code = "OK"

    def __await__(self) -> Generator[Any, Any, Any]:
        yield from asyncio.sleep(0).__await__()
        return reply(12)


class RpcOfMany(Rpc, MakesItems):
    pass


class SyncRpcOfMany(Rpc, Items):
    """That of a sync stub, which is a future too."""

    def result(self) -> Any:
        raise AssertionError


def test_rule_8_what_has_callbacks_but_is_more_or_less_than_a_future_is_charged_by_its_items() -> None:
    assert charged(RpcOfMany, drain_async) == 12
    assert charged(SyncRpcOfMany, drain) == 12


def test_rule_16_an_awaitable_object_comes_back_as_itself() -> None:
    async def use(rpc: Any) -> None:
        assert rpc.code == "OK"
        assert (await rpc).usage.total_tokens == 12
        assert (await rpc).usage.total_tokens == 12

    assert charged(RpcOfOne, lambda rpc: asyncio.run(use(rpc))) == 12


def test_rule_13_an_awaitable_object_that_raises_releases_its_hold() -> None:
    class Failing:
        def __await__(self) -> Generator[Any, Any, Any]:
            yield from asyncio.sleep(0).__await__()
            raise ConnectionRefusedError

    async def use(failing: Any) -> None:
        with pytest.raises(ConnectionRefusedError):
            await failing

    assert charged(Failing, lambda failing: asyncio.run(use(failing))) == 0


def test_rule_8_a_future_that_takes_no_callback_is_returned_all_the_same() -> None:
    class Odd:
        result = None

        def add_done_callback(self, _callback: Any) -> None:
            raise RuntimeError

    assert charged(Odd, drop) == RESERVE


# What a stream does is part of the call


class Working:
    """A stream that asks a model at each step."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self.ask = ask
        self.left = 2

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> str:
        if not self.left:
            raise StopIteration
        self.left -= 1
        self.ask()
        return "x"

    def __enter__(self) -> Any:
        self.ask()
        return self

    def __exit__(self, *_: object) -> None:
        self.ask()


class WorkingAsync:
    def __init__(self, ask: Callable[[], None]) -> None:
        self.sync = Working(ask)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        try:
            return next(self.sync)
        except StopIteration:
            raise StopAsyncIteration from None


class WorkingStream:
    def __init__(self, ask: Callable[[], None]) -> None:
        self.sync = Working(ask)

    def __iter__(self) -> Iterator[Any]:
        yield from self.sync


def drain_in_with(stream: Any) -> None:
    with stream as same:
        assert same is stream
        drain(stream)


@pytest.mark.parametrize(
    ("kind", "end", "asked"),
    [(Working, drain, 2), (Working, drain_in_with, 3), (WorkingAsync, drain_async, 2), (WorkingStream, drain, 2)],
)
def test_rule_12_what_a_stream_asks_on_its_way_is_inside_its_call(
    kind: Callable[[Any], Any], end: Callable[[Any], None], asked: int
) -> None:
    """What is asked when it is left comes after its end, when it was read to that."""
    budget = TokenBudget("1000/day")
    recorded = []

    @token_budget(budget, key="user", reserve=100)
    def ask(user: str) -> Any:
        return reply(10)

    def work() -> None:
        if not recorded or open_holds(budget):
            ask("alice")
            recorded.append(record_usage(5))

    agent = token_budget(budget, key="user", reserve=1000)(lambda user: kind(work))
    end(agent("alice"))
    assert recorded == [True] * asked
    assert (open_holds(budget), used(budget)) == (0, 15 * asked)
    assert record_usage(5) is False


# Streams inside of what a call returns


class Runner:
    """Anthropic's, whose items are streams."""

    def __init__(self) -> None:
        self.items = [Items(), Items()]

    __iter__, __next__ = Items.__iter__, Items.__next__


def test_rule_8_a_stream_that_is_an_item_of_a_stream_is_read_too() -> None:
    def use(runner: Any) -> None:
        for stream in runner:
            drain(stream)

    assert charged(Runner, use) == 24


def test_rule_8_an_item_that_is_a_stream_does_not_end_the_call() -> None:
    budget = TokenBudget("1000/day")
    runner = token_budget(budget, key="user", reserve=50)(lambda user: Runner())("alice")
    drain(next(runner))
    assert (open_holds(budget), used(budget)) == (1, 50)
    drain(next(runner))
    with pytest.raises(StopIteration):
        next(runner)
    assert (open_holds(budget), used(budget)) == (0, 24)


class Live:
    """A run of pydantic-ai, which alone tells its usage."""

    def __init__(self) -> None:
        self.items: list[Any] = ["x", "y"]

    __iter__, __next__, __aiter__, __anext__ = Items.__iter__, Items.__next__, Items.__aiter__, Items.__anext__

    @property
    def usage(self) -> Any:
        return reply(6 * (2 - len(self.items))).usage


def step(stream: Any) -> None:
    next(stream)


@pytest.mark.parametrize(("end", "total"), [(drain, 12), (drain_async, 12), (step, 6)])
def test_rule_8_a_stream_whose_items_tell_no_usage_is_asked_for_it(end: Callable[[Any], None], total: int) -> None:
    assert charged(Live, end) == total


class Totalled(Items):
    """A stream that tells usage in its items, and its total."""

    @property
    def usage(self) -> Any:
        return reply(12).usage


@pytest.mark.parametrize("end", [drain, drain_async])
def test_rule_8_a_stream_whose_items_tell_usage_is_not_asked_for_it(end: Callable[[Any], None]) -> None:
    assert charged(Totalled, end) == 12


def test_rule_12_usage_that_a_stream_tells_of_itself_counts_once_for_nested_calls() -> None:
    inner, outer = TokenBudget("1000/day"), TokenBudget("1000/day")
    ask = token_budget(inner, key="user", reserve=50)(lambda user: Live())
    drain(token_budget(outer, key="user", reserve=50)(ask)("alice"))
    drain(token_budget(outer, key="user", reserve=50)(lambda user: ask(user))("alice"))
    assert (used(inner), used(outer)) == (24, 24)


class Itself:
    """A stream that is awaited, and yields itself before its items."""

    def __init__(self) -> None:
        self.items: list[Any] = [self, reply(12)]

    __iter__, __next__ = Items.__iter__, Items.__next__

    def __await__(self) -> Generator[Any, Any, Any]:
        yield from asyncio.sleep(0).__await__()
        return self


def test_rule_8_a_stream_that_is_its_own_result_and_item_counts_once() -> None:
    async def main(stream: Any) -> None:
        assert await stream is stream
        drain(stream)

    assert charged(Itself, lambda stream: asyncio.run(main(stream))) == 12


def generator() -> Iterator[Any]:
    yield "x"
    yield reply(12)


async def async_generator() -> AsyncIterator[Any]:
    yield "x"
    yield reply(12)


@pytest.mark.parametrize(
    ("entered", "read"),
    [(lambda: reply(12), drop), (Items, drain), (generator, drain), (lambda: SimpleNamespace(**vars(Live())), drop)],
)
def test_rule_8_what_a_context_manager_yields_is_the_result_of_the_call(entered: Any, read: Any) -> None:
    total = 12 if read is drain else charged(entered, drop)

    @contextmanager
    def manage() -> Iterator[Any]:
        yield entered()

    def use(manager: Any) -> None:
        with manager as it:
            read(it)

    @asynccontextmanager
    async def manage_async() -> AsyncIterator[Any]:
        yield entered()

    async def use_async(manager: Any) -> None:
        async with manager as it:
            read(it)

    assert charged(manage, use) == total
    assert charged(manage_async, lambda manager: asyncio.run(use_async(manager))) == total
    assert charged(manage, drop) == charged(manage_async, drop) == 0  # its body never ran


async def test_rule_8_an_async_generator_that_a_context_manager_yields_is_charged_by_its_items() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    @asynccontextmanager
    async def manage(user: str) -> AsyncIterator[Any]:
        yield async_generator()

    async with manage("alice") as items:
        assert len([item async for item in items]) == 2
    assert (open_holds(budget), used(budget)) == (0, 12)


def test_a_context_manager_that_is_made_anew_to_decorate_is_left_alone() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    @contextmanager
    def manage(user: str) -> Iterator[Any]:
        yield reply(12)

    assert [manage("alice")(lambda: 7)() for _ in range(2)] == [7, 7]


# Odd classes


class Unhashable(type):
    def __eq__(cls, other: object) -> bool:
        return cls is other

    __hash__ = None  # type: ignore[assignment]


class OddMeta(metaclass=Unhashable):
    def __init__(self) -> None:
        self.usage = reply(12).usage


class OddModule:
    def __init__(self) -> None:
        self.usage = reply(12).usage

    __module__ = property(lambda self: "odd")  # type: ignore[assignment]


class OddText(str):
    def encode(self, *_: object) -> bytes:  # type: ignore[override]
        raise RuntimeError


class OddClass:
    @property
    def __class__(self) -> Any:
        raise RuntimeError


@pytest.mark.parametrize(
    ("make", "total"), [(OddMeta, 12), (OddModule, 12), (lambda: OddText("x" * 40), 12), (OddClass, 2)]
)
def test_rule_8_an_odd_result_is_returned_and_charged(make: Callable[[], Any], total: int) -> None:
    results = []
    assert charged(make, results.append, None) == total
    assert len(results) == 1


# Small things of generators


def test_rule_15_a_generator_that_can_be_awaited_still_can() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    @coroutine
    def ask(user: str) -> Generator[Any, Any, Any]:
        yield from asyncio.sleep(0).__await__()
        return reply(12)

    async def main() -> Any:
        return await ask("alice")  # type: ignore[misc]

    assert asyncio.run(main()).usage.total_tokens == 12
    assert (open_holds(budget), used(budget)) == (0, 12)


def test_rule_15_a_generator_has_the_name_of_its_function() -> None:
    decorate = token_budget("1000/day", key="user")

    def talk(user: str) -> Iterator[int]:
        yield 1

    async def talk_async(user: str) -> AsyncIterator[int]:
        yield 1

    async def main() -> list[tuple[str, str]]:
        made: list[Any] = [decorate(function)("alice") for function in (talk, talk_async)]
        return [(each.__name__, each.__qualname__) for each in made]

    names = [(function.__name__, function.__qualname__) for function in (talk, talk_async)]
    assert asyncio.run(main()) == names


def test_rule_8_a_stream_without_items_has_nothing_that_usage_could_read(caplog: pytest.LogCaptureFixture) -> None:
    def empty() -> Iterator[str]:
        yield from ()

    assert charged(empty, list, usage=len) == RESERVE
    assert charged(lambda: iter(()), list, usage=len) == RESERVE
    assert not caplog.records
