"""Streams: generators and what is awaited later are charged once, when they end, however they end (rules 8, 11, 16)."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from typing import Any
from weakref import ref

import pytest

from quotalimit import (
    RELEASE,
    Settlement,
    TokenBudget,
    TokenBudgetExceeded,
    collect_decisions,
    rate_limited,
    record_usage,
    token_budget,
)

from .helpers import open_holds, reply, used

pytestmark = pytest.mark.usefixtures("time")
CHUNK = "x" * 40  # ten tokens of text


class Talk:
    """A budget, and the functions it guards: each yields four chunks of text, and then one that reports 12 tokens."""

    def __init__(self, reserve: int | None = 50, **options: Any) -> None:
        self.budget = TokenBudget("1_000_000/day", name="talk")
        self.cleaned_up = 0
        decorate = token_budget(self.budget, key="user", reserve=reserve, **options)

        @decorate
        def stream(user: str, error: BaseException | None = None) -> Generator[Any, Any, Any]:
            try:
                for number in range(4):
                    yield CHUNK
                    if error is not None and number == 1:
                        raise error
                yield reply(12)
            finally:
                self.cleaned_up += 1

        @decorate
        async def stream_async(user: str, error: BaseException | None = None) -> AsyncGenerator[Any, Any]:
            try:
                for number in range(4):
                    yield CHUNK
                    await asyncio.sleep(0)
                    if error is not None and number == 1:
                        raise error
                yield reply(12)
            finally:
                self.cleaned_up += 1

        self.stream, self.stream_async = stream, stream_async

    def settled(self, *, key: str = "alice") -> int:
        """What the streams were charged in all, no hold being left."""
        assert open_holds(self.budget, key) == 0
        return used(self.budget, key)


# How a generator can end. Each leaves what it is charged: with a reserve of 50; and without one, where all of the text
# is counted: the argument "alice" of five bytes and the chunks that came of ten tokens.


def exhaust(stream: Generator[Any, Any, Any]) -> None:
    assert len(list(stream)) == 5


def break_off(stream: Generator[Any, Any, Any]) -> None:
    for _ in stream:
        break


def close(stream: Generator[Any, Any, Any]) -> None:
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def close_unstarted(stream: Generator[Any, Any, Any]) -> None:
    stream.close()


def drop_unstarted(stream: Generator[Any, Any, Any]) -> None:
    del stream


def drop_half_way(stream: Generator[Any, Any, Any]) -> None:
    next(stream)
    next(stream)
    del stream


def drop_in_a_cycle(stream: Generator[Any, Any, Any]) -> None:
    next(stream)
    cycle: list[Any] = [stream]
    cycle.append(cycle)
    del stream, cycle
    gc.collect()


def throw(stream: Generator[Any, Any, Any]) -> None:
    next(stream)
    with pytest.raises(ValueError, match="thrown in"):
        stream.throw(ValueError("thrown in"))


def throw_timeout(stream: Generator[Any, Any, Any]) -> None:
    next(stream)
    with pytest.raises(TimeoutError):
        stream.throw(TimeoutError())


def throw_unstarted(stream: Generator[Any, Any, Any]) -> None:
    with pytest.raises(ValueError, match="thrown in"):
        stream.throw(ValueError("thrown in"))


def throw_exit(stream: Generator[Any, Any, Any]) -> None:
    next(stream)
    with pytest.raises(GeneratorExit):
        stream.throw(GeneratorExit())


@pytest.mark.parametrize(
    ("end", "with_reserve", "without"),
    [
        (exhaust, 12, 12),
        (break_off, 50, 12),
        (close, 50, 12),
        (drop_half_way, 50, 22),
        (drop_in_a_cycle, 50, 12),
        (throw_timeout, 50, 12),
        (throw_exit, 50, 12),
        (throw, 50, 12),  # it had begun to answer: the provider bills what it wrote
        (close_unstarted, 0, 0),
        (drop_unstarted, 0, 0),
        (throw_unstarted, 0, 0),
    ],
)
@pytest.mark.parametrize("reserve", [50, None])
def test_rule_11_a_generator_is_charged_once_however_it_ends(
    end: Callable[[Any], None], with_reserve: int, without: int, reserve: int | None
) -> None:
    talk = Talk(reserve)
    streams = [talk.stream("alice")]
    assert (used(talk.budget), open_holds(talk.budget)) == (reserve or 0, 1)
    end(streams.pop())
    charged = without if reserve is None else with_reserve
    assert talk.settled() == charged
    assert talk.settled() == charged
    assert talk.cleaned_up == (end not in (close_unstarted, drop_unstarted, throw_unstarted))


@pytest.mark.parametrize(
    ("error", "charged"), [(ValueError("mine"), 50), (TimeoutError("mine"), 50), (KeyboardInterrupt("mine"), 50)]
)
def test_rule_13_a_generator_that_raises_after_it_began_keeps_its_hold(error: BaseException, charged: int) -> None:
    talk = Talk()
    with pytest.raises(type(error), match="mine") as caught:
        list(talk.stream("alice", error))
    assert caught.value is error
    assert talk.settled() == charged


def test_rule_13_on_error_decides_for_streams_too() -> None:
    talk = Talk(on_error=lambda error: RELEASE if isinstance(error, TimeoutError) else 7)
    for error in (TimeoutError(), ValueError()):
        with pytest.raises(type(error)):
            list(talk.stream("alice", error))
    assert talk.settled() == 7


def test_rule_16_a_generator_function_is_checked_when_it_is_called() -> None:
    budget = TokenBudget("100/day")

    @token_budget(budget, key="user", reserve=60)
    def stream(user: str) -> Generator[int]:
        yield 1

    held = stream("alice")
    with pytest.raises(TokenBudgetExceeded):
        stream("alice")
    list(held)


async def test_rule_16_an_async_generator_function_is_checked_when_it_is_called() -> None:
    budget = TokenBudget("100/day")

    @token_budget(budget, key="user", reserve=60)
    async def stream(user: str) -> AsyncGenerator[int]:
        yield 1

    held = stream("alice")
    with pytest.raises(TokenBudgetExceeded):
        stream("alice")
    assert [item async for item in held] == [1]


def test_a_generator_keeps_send_throw_and_return() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    def talk(user: str) -> Generator[Any, Any, Any]:
        got = yield "first"
        try:
            got = yield got
        except KeyError as error:
            got = yield error
        return (yield got)

    stream = talk("alice")
    with pytest.raises(TypeError, match="just-started"):
        stream.send("too early")
    stream = talk("alice")
    error = KeyError("caught inside")
    assert next(stream) == "first"
    assert stream.send("sent") == "sent"
    assert stream.throw(error) is error
    assert stream.send("again") == "again"
    response = reply(9)
    with pytest.raises(StopIteration) as stop:
        stream.send(response)
    assert stop.value.value is response
    assert used(budget) == 9
    assert open_holds(budget) == 0


def test_the_value_that_a_generator_returns_reports_its_usage() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    def stream(user: str) -> Generator[str, None, Any]:
        yield CHUNK
        return reply(9)

    def drain(user: str) -> Generator[str, None, None]:
        returned.append((yield from stream(user)))

    returned: list[Any] = []
    assert list(drain("alice")) == [CHUNK]
    assert [response.usage.total_tokens for response in returned] == [9]
    assert used(budget) == 9


def test_numbers_of_the_callers_own_reader_add_up_and_unknown_items_do_not_count() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50, usage=lambda item: item if item != "?" else None)
    def stream(user: str) -> Generator[Any, None, Any]:
        yield from (3, "?", 4, -100, True)
        return 5

    assert len(list(stream("alice"))) == 5
    assert used(budget) == 12


def test_a_stream_broken_off_is_charged_what_its_items_reported_so_far() -> None:
    budget = TokenBudget("1000/day")
    stream = token_budget(budget, key="user", reserve=50, usage=len)(lambda user: (word for word in ("ab", "abc", "")))
    items = stream("alice")
    next(items)
    next(items)
    items.close()
    assert used(budget) == 5


ANTHROPIC = {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 100, "output_tokens": 1}}}


@pytest.mark.parametrize("handed_on", [False, True])
@pytest.mark.parametrize("end", ["closed", "failed", "ended"])
@pytest.mark.parametrize("told", [ANTHROPIC, reply(100, 1)], ids=["before the answer", "meanwhile"])
def test_rule_8_text_that_came_after_the_last_usage_of_a_stream_is_estimated(
    told: object, end: str, handed_on: bool
) -> None:
    inside, outside = TokenBudget("1000/day"), TokenBudget("1000/day")

    @token_budget(inside, key="user")
    def inner(user: str) -> Generator[Any]:
        yield told
        yield "word" * 10
        if end == "failed":
            raise TimeoutError
        if end == "closed":
            yield "not read"

    outer = token_budget(outside, key="user")(lambda user: (yield from inner(user)))
    stream = (outer if handed_on else inner)("alice")
    with suppress(TimeoutError):
        for item in stream:
            if end == "closed" and item is not told:
                stream.close()
    whole = end == "ended" and told is not ANTHROPIC  # such a stream tells all that it used before it ends
    charged = 101 if whole else 111
    assert (used(inside), used(outside)) == (charged, charged if handed_on else 0)


def test_rule_8_the_text_of_a_stream_is_counted_when_nothing_else_is_known() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user")
    def stream(user: str, prompt: str) -> Generator[Any, None, str]:
        yield "abcd"
        yield {"delta": "efgh"}
        yield 7
        return "ijkl"

    with collect_decisions() as seen:
        list(stream("", prompt="mnop"))
    assert seen[0].settlement == Settlement(budget.name, 4, 4, 0, "estimated")
    assert used(budget, "") == 4


def test_rule_8_a_chunk_that_is_recorded_and_yielded_counts_once() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    def stream(user: str) -> Generator[Any]:
        yield CHUNK
        chunk = reply(7)
        record_usage(chunk)
        yield chunk
        yield CHUNK

    list(stream("alice"))
    assert used(budget) == 7


def test_usage_recorded_in_the_body_is_charged_and_that_of_the_consumer_is_not() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    def stream(user: str) -> Generator[int]:
        record_usage(3)
        yield 1
        record_usage(4)

    with collect_decisions() as seen:
        for _ in stream("alice"):
            assert record_usage(1000) is False
    assert (seen[0].settlement and seen[0].settlement.source, used(budget)) == ("recorded", 7)


def test_the_settlement_of_a_stream_appears_when_it_has_ended() -> None:
    talk = Talk()
    with collect_decisions() as seen:
        stream = talk.stream("alice")
        next(stream)
        assert seen[0].settlement is None
    list(stream)
    assert seen[0].settlement == Settlement("talk", 12, 12, 50, "reported")


def test_a_refund_of_a_rate_limit_waits_for_the_end_of_the_stream() -> None:
    @rate_limited("1/day", key="user", refund_on=ValueError)
    def stream(user: str, error: bool) -> Generator[int]:
        yield 1
        if error:
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        list(stream("alice", error=True))
    assert list(stream("alice", error=False)) == [1]


# Async generators.


async def exhaust_async(stream: AsyncGenerator[Any, Any]) -> None:
    assert len([item async for item in stream]) == 5


async def break_off_async(stream: AsyncGenerator[Any, Any]) -> None:
    async for _ in stream:
        break


async def close_async(stream: AsyncGenerator[Any, Any]) -> None:
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def aclosing_async(stream: AsyncGenerator[Any, Any]) -> None:
    async with aclosing(stream):
        async for _ in stream:
            break


async def close_unstarted_async(stream: AsyncGenerator[Any, Any]) -> None:
    await stream.aclose()


async def drop_unstarted_async(stream: AsyncGenerator[Any, Any]) -> None:
    del stream


async def drop_half_way_async(stream: AsyncGenerator[Any, Any]) -> None:
    await anext(stream)
    await anext(stream)
    del stream


async def throw_async(stream: AsyncGenerator[Any, Any]) -> None:
    await anext(stream)
    with pytest.raises(ValueError, match="thrown in"):
        await stream.athrow(ValueError("thrown in"))


async def throw_unstarted_async(stream: AsyncGenerator[Any, Any]) -> None:
    with pytest.raises(ValueError, match="thrown in"):
        await stream.athrow(ValueError("thrown in"))


async def cancel_while_the_body_waits(stream: AsyncGenerator[Any, Any]) -> None:
    async def consume() -> None:
        async for _ in stream:
            pass

    task = asyncio.create_task(consume())
    await asyncio.sleep(0)  # it has its first chunk, and waits for the second
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_while_the_consumer_waits(stream: AsyncGenerator[Any, Any]) -> None:
    async def consume() -> None:
        async with aclosing(stream):
            async for _ in stream:
                await asyncio.Event().wait()

    task = asyncio.create_task(consume())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


ASYNC_ENDS = [
    (exhaust_async, 12, 12),
    (break_off_async, 50, 12),
    (close_async, 50, 12),
    (aclosing_async, 50, 12),
    (drop_half_way_async, 50, 22),
    (cancel_while_the_body_waits, 50, 12),
    (cancel_while_the_consumer_waits, 50, 12),
    (throw_async, 50, 12),
    (close_unstarted_async, 0, 0),
    (drop_unstarted_async, 0, 0),
    (throw_unstarted_async, 0, 0),
]


@pytest.mark.parametrize(("end", "with_reserve", "without"), ASYNC_ENDS)
@pytest.mark.parametrize("reserve", [50, None])
@pytest.mark.parametrize("called_in_the_loop", [True, False])
def test_rule_11_an_async_generator_is_charged_once_however_it_ends(
    end: Callable[[Any], Coroutine[Any, Any, None]],
    with_reserve: int,
    without: int,
    reserve: int | None,
    called_in_the_loop: bool,
) -> None:
    talk = Talk(reserve)
    streams = [] if called_in_the_loop else [talk.stream_async("alice")]

    async def use() -> int:
        if called_in_the_loop:
            streams.append(talk.stream_async("alice"))
        assert (used(talk.budget), open_holds(talk.budget)) == (reserve or 0, 1)
        await end(streams.pop())
        for _ in range(10):
            await asyncio.sleep(0)
        return talk.settled()

    charged = without if reserve is None else with_reserve
    assert asyncio.run(use()) == charged
    assert talk.settled() == charged
    assert talk.cleaned_up == (end not in (close_unstarted_async, drop_unstarted_async, throw_unstarted_async))


def test_rule_11_the_end_of_the_event_loop_settles_streams_that_are_still_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    budget = TokenBudget("1000/day")
    kept: list[AsyncGenerator[Any, Any]] = []
    cleaned_up = []

    @token_budget(budget, key="user", reserve=50)
    async def stream(user: str) -> AsyncGenerator[str]:
        try:
            yield CHUNK
            yield CHUNK
        finally:
            await asyncio.sleep(0)
            cleaned_up.append(user)

    async def main() -> None:
        for user in ("alice", "bob"):
            kept.append(stream(user))
            await anext(kept[-1])
        kept.append(stream("carol"))

    asyncio.run(main())
    assert sorted(cleaned_up) == ["alice", "bob"]
    assert open_holds(budget, "alice", "bob", "carol") == 0
    assert [used(budget, user) for user in ("alice", "bob", "carol")] == [50, 50, 0]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize(("error", "charged"), [(ValueError("mine"), 50), (TimeoutError("mine"), 50)])
async def test_rule_13_an_async_generator_that_raises_after_it_began_keeps_its_hold(
    error: BaseException, charged: int
) -> None:
    talk = Talk()
    with pytest.raises(type(error), match="mine") as caught:
        await exhaust_async(talk.stream_async("alice", error))
    assert caught.value is error
    assert talk.settled() == charged


async def test_an_async_generator_keeps_asend_and_athrow() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    async def talk(user: str) -> AsyncGenerator[Any, Any]:
        got = yield "first"
        try:
            yield got
        except KeyError as error:
            yield error

    stream = talk("alice")
    error = KeyError("caught inside")
    assert await anext(stream) == "first"
    response = reply(9)
    assert await stream.asend(response) is response
    assert await stream.athrow(error) is error
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert used(budget) == 9
    assert open_holds(budget) == 0


# Functions that return a stream, or what is awaited later.


def test_a_function_that_returns_a_generator_is_charged_at_the_generators_end() -> None:
    talk = Talk()
    inner = talk.stream.__wrapped__  # type: ignore[attr-defined]
    budget = TokenBudget("1000/day")
    stream = token_budget(budget, key="user", reserve=50)(lambda user: inner(user))
    it = stream("alice")
    assert inspect.isgenerator(it)
    next(it)
    assert (used(budget), open_holds(budget)) == (50, 1)
    assert len(list(it)) == 4
    assert (used(budget), open_holds(budget)) == (12, 0)
    stream("alice").close()
    assert used(budget) == 12


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_function_that_returns_an_async_generator_is_charged_at_its_end(is_async: bool) -> None:
    talk = Talk()
    inner = talk.stream_async.__wrapped__  # type: ignore[attr-defined]
    budget = TokenBudget("1000/day")

    async def answer(user: str) -> AsyncIterator[Any]:
        return inner(user)  # type: ignore[no-any-return]

    stream = token_budget(budget, key="user", reserve=50)(answer if is_async else lambda user: inner(user))
    it = await stream("alice") if is_async else stream("alice")
    assert inspect.isasyncgen(it)
    await anext(it)
    assert (used(budget), open_holds(budget)) == (50, 1)
    assert len([item async for item in it]) == 4
    assert (used(budget), open_holds(budget)) == (12, 0)


async def later(result: Any) -> Any:
    """Answer, or raise, after a turn of the event loop."""
    await asyncio.sleep(0)
    if isinstance(result, BaseException):
        raise result
    return result


@pytest.mark.parametrize("how", ["await", "task", "gather", "wait_for"])
async def test_a_function_that_returns_a_coroutine_is_charged_when_that_has_run(how: str) -> None:
    budget = TokenBudget("1000/day")
    response = reply(9)
    ask = token_budget(budget, key="user", reserve=50)(lambda user: later(response))
    coroutine = ask("alice")
    assert inspect.isawaitable(coroutine)
    assert (used(budget), open_holds(budget)) == (50, 1)
    if how == "await":
        assert await coroutine is response
    elif how == "task":
        assert await asyncio.create_task(coroutine) is response
    elif how == "gather":
        assert await asyncio.gather(coroutine) == [response]
    else:
        assert await asyncio.wait_for(coroutine, 60) is response
    assert (used(budget), open_holds(budget)) == (9, 0)


@pytest.mark.parametrize(("error", "charged"), [(ValueError("mine"), 0), (TimeoutError("mine"), 50)])
def test_a_returned_coroutine_that_raises_is_charged_as_a_call_that_raises(error: Exception, charged: int) -> None:
    budget = TokenBudget("1000/day")
    ask = token_budget(budget, key="user", reserve=50)(lambda user: later(error))
    with pytest.raises(type(error), match="mine") as caught:
        asyncio.run(ask("alice"))
    assert caught.value is error
    assert (used(budget), open_holds(budget)) == (charged, 0)


async def test_a_returned_coroutine_that_is_cancelled_keeps_its_hold() -> None:
    budget = TokenBudget("1000/day")
    waiting = asyncio.Event()

    async def forever(user: str) -> None:
        waiting.set()
        await asyncio.Event().wait()

    ask = token_budget(budget, key="user", reserve=50)(lambda user: forever(user))
    task = asyncio.create_task(ask("alice"))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (used(budget), open_holds(budget)) == (50, 0)


async def test_a_function_that_starts_a_task_is_charged_though_nobody_awaits_it() -> None:
    budget = TokenBudget("1000/day")
    ran = asyncio.Event()
    running: set[asyncio.Task[Any]] = set()

    async def work() -> Any:
        ran.set()
        return reply(9)

    @token_budget(budget, key="user", reserve=50)
    def start(user: str) -> Any:
        task = asyncio.get_running_loop().create_task(work())
        running.add(task)
        return task

    start("alice")
    await ran.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    assert used(budget) in (9, 50)
    assert open_holds(budget) == 0


# Many, and their kinds.


def test_ten_thousand_abandoned_generators_leave_no_hold() -> None:
    talk = Talk(reserve=7)
    for number in range(10_000):
        stream = talk.stream("alice")
        if number % 2:
            next(stream)
    del stream
    assert talk.settled() == 5_000 * 7


def test_ten_thousand_abandoned_async_generators_leave_no_hold() -> None:
    talk = Talk(reserve=7)

    async def abandon() -> None:
        for number in range(10_000):
            stream = talk.stream_async("alice")
            if number % 2:
                await anext(stream)

    asyncio.run(abandon())
    assert talk.settled() == 5_000 * 7


def test_ten_thousand_async_generators_abandoned_without_a_loop_leave_no_hold() -> None:
    talk = Talk(reserve=7)
    for _ in range(10_000):
        talk.stream_async("alice")
    assert talk.settled() == 0


class Slow:
    """A budget and a stream that takes its time to clean up."""

    def __init__(self) -> None:
        self.budget = TokenBudget("1000/day")
        self.cleaned_up = 0

        @token_budget(self.budget, key="user", reserve=50)
        async def stream(user: str) -> AsyncGenerator[str]:
            try:
                yield CHUNK
            finally:
                await asyncio.sleep(0)
                self.cleaned_up += 1

        self.stream = stream

    def ended(self) -> tuple[int, int, int]:
        """How many streams are open, were cleaned up, and what they were charged."""
        return open_holds(self.budget), self.cleaned_up, used(self.budget)


def test_rule_16_an_async_generator_called_outside_of_an_event_loop_is_closed_by_the_one_that_runs_it() -> None:
    slow = Slow()
    slow.stream("alice")
    assert slow.ended() == (0, 0, 0)

    async def leave(streams: list[Any]) -> None:
        async for _ in streams.pop():
            break
        for _ in range(5):  # its loop closes it
            await asyncio.sleep(0)

    asyncio.run(leave([slow.stream("alice")]))
    assert slow.ended() == (0, 1, 50)


def test_rule_11_an_async_generator_that_no_event_loop_closes_is_settled_when_it_is_dropped() -> None:
    slow = Slow()
    items = slow.stream("alice")
    with pytest.raises(StopIteration):
        items.__anext__().__await__().__next__()
    with silenced_unraisable():  # Python says that it was not closed
        del items
        gc.collect()
    assert slow.ended() == (0, 0, 50)


@contextmanager
def silenced_unraisable() -> Iterator[None]:
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


async def test_rule_16_an_async_generator_that_dies_in_a_cycle_is_cleaned_up_by_its_loop() -> None:
    slow = Slow()
    cycle: list[Any] = [slow.stream("alice")]
    cycle.append(cycle)
    await anext(cycle[0])
    del cycle
    gc.collect()
    for _ in range(5):
        await asyncio.sleep(0)
    assert slow.ended() == (0, 1, 50)


def test_an_exception_that_was_thrown_in_is_let_go_of() -> None:
    talk = Talk()
    made: list[ref[Thrown]] = []

    def make() -> Thrown:
        error = Thrown()
        made.append(ref(error))
        return error

    def throw_in() -> None:
        stream = talk.stream("alice")
        next(stream)
        with suppress(Thrown):
            stream.throw(make())

    async def throw_in_async() -> None:
        stream = talk.stream_async("alice")
        await anext(stream)
        with suppress(Thrown):
            await stream.athrow(make())

    gc.disable()
    try:
        throw_in()
        asyncio.run(throw_in_async())
        assert [error() for error in made] == [None, None]
    finally:
        gc.enable()


class Thrown(Exception):
    pass


def test_streams_keep_their_kind() -> None:
    talk = Talk()
    assert inspect.isgeneratorfunction(talk.stream)
    assert inspect.isasyncgenfunction(talk.stream_async)
    assert not inspect.iscoroutinefunction(talk.stream_async)
    stream, stream_async = talk.stream("alice"), talk.stream_async("alice")
    assert inspect.isgenerator(stream)
    assert isinstance(stream, Generator)
    assert inspect.isasyncgen(stream_async)
    assert isinstance(stream_async, AsyncGenerator)
    asyncio.run(stream_async.aclose())


class Dropped:
    """An SDK's stream that lets go of its connection when it is dropped, and whose `close` has options."""

    let_go = 0
    closed_with = 0.0

    def __iter__(self) -> Dropped:
        return self

    def __next__(self) -> str:
        return CHUNK

    def close(self, *, timeout: float = 0.0) -> None:
        Dropped.closed_with = timeout

    def __del__(self) -> None:
        Dropped.let_go += 1


def test_rule_16_a_stream_keeps_its_own_finalizer_and_the_options_of_its_close() -> None:
    open_stream = token_budget("100/day", key="user", reserve=1)(lambda user: Dropped())
    stream = open_stream("alice")
    stream.close(timeout=2.5)
    del stream
    gc.collect()
    assert (Dropped.let_go, Dropped.closed_with) == (1, 2.5)


def test_rule_17_items_that_are_equal_and_constant_each_count(caplog: pytest.LogCaptureFixture) -> None:
    """A constant tuple is one object each time; and the end of a generator, None, is no item to be read."""
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", usage=lambda item: item[1])
    def tell(user: str) -> Generator[tuple[str, int]]:
        for _ in range(10):
            yield ("word", 1)

    assert len(list(tell("alice"))) == 10
    assert used(budget) == 10
    assert not caplog.records


@pytest.mark.usefixtures("wide_races")
def test_a_stream_may_be_read_by_several_threads() -> None:
    class Shared:
        def __init__(self) -> None:
            self.left = iter(range(5_000))

        def __iter__(self) -> Shared:
            return self

        def __next__(self) -> Any:
            return reply(1, next(self.left))

    stream = token_budget("1_000_000/day", key="user", reserve=1)(lambda user: Shared())("alice")
    with ThreadPoolExecutor(4) as threads:
        counts = [each.result() for each in [threads.submit(lambda: sum(1 for _ in stream)) for _ in range(4)]]
    assert sum(counts) == 5_000
