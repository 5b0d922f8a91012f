"""Calls that fail (rule 13): what is charged, that no hold is left, and that the exception is the SDK's own, unchanged.

The official clients of OpenAI and Anthropic talk to a server on loopback, which refuses, hangs or is not there.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import anthropic
import cohere.core
import httpx2
import ollama
import openai
import pytest
import urllib3.exceptions as urllib3_exceptions
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    ReadTimeoutError,
)
from google.genai import errors as genai_errors
from openai.types import CompletionUsage
from pydantic import BaseModel

from quotalimit import KEEP, TokenBudget, Usage, collect_decisions, record_usage, token_budget

from ..helpers import open_holds, used
from .server import Server

RESERVE = 500
HELLO: list[Any] = [{"role": "user", "content": "hello"}]

pytestmark = pytest.mark.usefixtures("time")


class Point(BaseModel):
    """What a structured answer is parsed into."""

    x: int


def ask_openai(clients: Any, **options: Any) -> Any:
    return clients.openai.chat.completions.create(model="m", messages=HELLO, **options)


def ask_responses(clients: Any, **options: Any) -> Any:
    return clients.openai.responses.create(model="m", input="hello", **options)


def ask_anthropic(clients: Any, **options: Any) -> Any:
    return clients.anthropic.messages.create(model="m", max_tokens=9, messages=HELLO, **options)


def parse(clients: Any) -> Any:
    return clients.openai.chat.completions.parse(model="m", messages=HELLO, response_format=Point)


Ask = Callable[..., Any]
SDKS = pytest.mark.parametrize(
    ("sdk", "ask"), [(openai, ask_openai), (openai, ask_responses), (anthropic, ask_anthropic)]
)
RESERVES = pytest.mark.parametrize("reserve", [RESERVE, None])
WAYS = pytest.mark.parametrize("way", ["sync", "async", "a sync function that returns a coroutine"])


class Caller:
    """Makes decorated calls in one of three ways, with real clients, and keeps what the SDK raised in them."""

    def __init__(self, url: str, way: str) -> None:
        self.budget = TokenBudget("1_000_000/day")
        self.url = url
        self.way = way
        self.raised: list[tuple[BaseException, dict[str, Any]]] = []

    async def call(self, ask: Ask, reserve: int | None = RESERVE, timeout: float = 30, **options: Any) -> Any:
        decorate = token_budget(self.budget, key="user", reserve=reserve, **options)
        settings: dict[str, Any] = {"base_url": self.url, "api_key": "k", "max_retries": 0, "timeout": timeout}
        if self.way == "sync":
            with httpx2.Client(verify=False) as http:
                settings["http_client"] = http
                clients = SimpleNamespace(openai=openai.OpenAI(**settings), anthropic=anthropic.Anthropic(**settings))
                return decorate(lambda user: self.watch(lambda: ask(clients)))("alice")
        async with httpx2.AsyncClient(verify=False) as http:
            settings["http_client"] = http
            clients = SimpleNamespace(
                openai=openai.AsyncOpenAI(**settings), anthropic=anthropic.AsyncAnthropic(**settings)
            )

            async def chat(user: str) -> Any:
                return await self.watch_async(lambda: ask(clients))

            return await decorate(chat if self.way == "async" else lambda user: chat(user))("alice")

    def watch(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except BaseException as error:
            self.raised.append((error, dict(vars(error))))
            raise

    async def watch_async(self, ask: Callable[[], Any]) -> Any:
        try:
            return await ask()
        except BaseException as error:
            self.raised.append((error, dict(vars(error))))
            raise

    def is_unchanged(self, error: BaseException) -> bool:
        """Whether what reached the caller is what the SDK raised, with nothing added."""
        ((raised, fields),) = self.raised
        return error is raised and vars(error) == fields and not hasattr(error, "__notes__")

    def settled(self) -> int:
        assert open_holds(self.budget) == 0
        return used(self.budget)


STATUSES = [
    (400, "BadRequestError"),
    (401, "AuthenticationError"),
    (403, "PermissionDeniedError"),
    (404, "NotFoundError"),
    (422, "UnprocessableEntityError"),
    (429, "RateLimitError"),
    (500, "InternalServerError"),
    (503, "InternalServerError"),
]


@SDKS
@WAYS
@pytest.mark.parametrize(("status", "kind"), STATUSES)
async def test_rule_13_a_call_that_the_provider_refuses_is_not_charged(
    sdk: Any, ask: Ask, way: str, status: int, kind: str, server: Server
) -> None:
    body = {"type": "error", "error": {"type": "some_error", "message": "not today"}}
    server.script(json.dumps(body).encode(), status=status, kind="application/json")
    caller = Caller(server.url, way)
    with pytest.raises(getattr(sdk, kind), match="not today") as caught:
        await caller.call(ask)
    assert caught.value.status_code == status
    assert caller.is_unchanged(caught.value)
    assert caller.settled() == 0
    assert len(server.requests) == 1


@SDKS
@WAYS
async def test_rule_13_a_stream_that_the_provider_refuses_is_not_charged(
    sdk: Any, ask: Ask, way: str, server: Server
) -> None:
    server.script(b"{}", status=429, kind="application/json")
    caller = Caller(server.url, way)
    with pytest.raises(sdk.RateLimitError) as caught:
        await caller.call(lambda clients: ask(clients, stream=True))
    assert caller.is_unchanged(caught.value)
    assert caller.settled() == 0


@SDKS
@WAYS
async def test_rule_13_a_call_whose_connection_is_refused_is_not_charged(sdk: Any, ask: Ask, way: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    caller = Caller(f"http://127.0.0.1:{port}", way)
    with pytest.raises(sdk.APIConnectionError) as caught:
        await caller.call(ask)
    assert not isinstance(caught.value, sdk.APITimeoutError)
    assert caller.is_unchanged(caught.value)
    assert caller.settled() == 0


@SDKS
@WAYS
@RESERVES
async def test_rule_13_a_call_that_times_out_keeps_its_hold_or_is_estimated(
    sdk: Any, ask: Ask, way: str, reserve: int | None, server: Server
) -> None:
    server.script(end="hang")
    caller = Caller(server.url, way)
    with collect_decisions() as seen, pytest.raises(sdk.APITimeoutError) as caught:
        await caller.call(ask, reserve, timeout=0.02)
    assert caller.is_unchanged(caught.value)
    assert caller.settled() == (reserve or 2)
    assert seen[0].settlement is not None
    assert seen[0].settlement.source == ("reserved" if reserve else "estimated")


@SDKS
@WAYS
@RESERVES
@pytest.mark.parametrize("end", ["drop", "cut"])
async def test_rule_13_a_connection_that_breaks_after_the_request_was_sent_keeps_the_hold(
    sdk: Any, ask: Ask, way: str, reserve: int | None, end: str, server: Server
) -> None:
    """The model may have written, and been paid for, an answer that nobody got."""
    server.script(b'{"id": ', kind="application/json", end=end)
    caller = Caller(server.url, way)
    with pytest.raises((sdk.APIConnectionError, httpx2.RemoteProtocolError)) as caught:
        await caller.call(ask, reserve)
    assert caller.is_unchanged(caught.value)
    assert len(server.requests) == 1
    assert caller.settled() == (reserve or 2)


@SDKS
@WAYS
@pytest.mark.parametrize("status", [408, 504, 524])
async def test_rule_13_a_gateway_that_gave_up_waiting_keeps_the_hold(
    sdk: Any, ask: Ask, way: str, status: int, server: Server
) -> None:
    server.script(b"{}", status=status, kind="application/json")
    caller = Caller(server.url, way)
    with pytest.raises(sdk.APIStatusError) as caught:
        await caller.call(ask)
    assert caught.value.status_code == status
    assert caller.settled() == RESERVE


def raising(kind: type[Exception]) -> Any:
    """A way to a server that ends in an exception of the HTTP client."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        raise kind("no")

    return httpx2.MockTransport(handle)


@pytest.mark.parametrize(
    ("kind", "charged"),
    [
        (httpx2.ConnectError, 0),
        (httpx2.ConnectTimeout, 0),
        (httpx2.PoolTimeout, 0),
        (httpx2.WriteError, 0),
        (httpx2.WriteTimeout, 0),
        (httpx2.LocalProtocolError, 0),
        (httpx2.ReadTimeout, RESERVE),
        (httpx2.ReadError, RESERVE),
        (httpx2.RemoteProtocolError, RESERVE),
    ],
)
@pytest.mark.parametrize("sdk", [openai, anthropic])
def test_rule_13_the_hold_is_kept_if_the_request_was_sent(sdk: Any, kind: type[Exception], charged: int) -> None:
    budget = TokenBudget("1_000_000/day")
    with httpx2.Client(transport=raising(kind)) as http:
        settings: dict[str, Any] = {"api_key": "k", "max_retries": 0, "http_client": http}
        clients = SimpleNamespace(openai=openai.OpenAI(**settings), anthropic=anthropic.Anthropic(**settings))
        ask = ask_openai if sdk is openai else ask_anthropic
        chat = token_budget(budget, key="user", reserve=RESERVE)(lambda user: ask(clients))
        with pytest.raises(sdk.APIConnectionError) as caught:
            chat("alice")
    assert isinstance(caught.value.__cause__, kind)
    assert (used(budget), open_holds(budget)) == (charged, 0)


@WAYS
async def test_rule_13_a_parsed_answer_that_was_filtered_is_charged(way: str, server: Server) -> None:
    """What was written before the filter stopped it is billed; of OpenAI's exceptions the later ones say how much."""
    choices = [{**COMPLETION["choices"][0], "finish_reason": "content_filter"}]
    server.script(json.dumps({**COMPLETION, "choices": choices}).encode(), kind="application/json")
    caller = Caller(server.url, way)
    with pytest.raises(openai.ContentFilterFinishReasonError) as caught:
        await caller.call(parse)
    assert caller.settled() == (30 if hasattr(caught.value, "completion") else RESERVE)


@pytest.mark.parametrize("sdk", [openai, anthropic])
def test_rule_13_an_answer_that_the_sdk_cannot_read_keeps_the_hold(sdk: Any, server: Server) -> None:
    server.script(b'{"id": 7}', kind="application/json")
    budget = TokenBudget("1_000_000/day")
    with httpx2.Client(verify=False) as http:
        settings: dict[str, Any] = {"base_url": server.url, "api_key": "k", "max_retries": 0, "http_client": http}
        settings["_strict_response_validation"] = True
        clients = SimpleNamespace(openai=openai.OpenAI(**settings), anthropic=anthropic.Anthropic(**settings))
        ask = ask_openai if sdk is openai else ask_anthropic
        chat = token_budget(budget, key="user", reserve=RESERVE)(lambda user: ask(clients))
        with pytest.raises(sdk.APIResponseValidationError):
            chat("alice")
    assert (used(budget), open_holds(budget)) == (RESERVE, 0)


def boto3_error(status: int) -> Exception:
    return ClientError({"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Converse")


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "charged"),
    [
        (boto3_error(408), RESERVE),
        (boto3_error(400), 0),
        (ConnectionClosedError(endpoint_url="u"), RESERVE),
        (EndpointConnectionError(endpoint_url="u"), 0),
        (ReadTimeoutError(endpoint_url="u"), RESERVE),
        (ConnectTimeoutError(endpoint_url="u"), 0),
        (genai_errors.ServerError(504, {}), RESERVE),
        (genai_errors.ServerError(500, {}), 0),
        (cohere.core.ApiError(status_code=504), RESERVE),
        (cohere.core.ApiError(status_code=500), 0),
        (ollama.ResponseError("no", 504), RESERVE),
        (ollama.ResponseError("no", 500), 0),
        (type("ContentFilterFinishReasonError", (Exception,), {})("as in OpenAI 2"), RESERVE),
        (ConnectionResetError(), RESERVE),
        (ConnectionRefusedError(), 0),
        (caused(ValueError("the caller's own"), TimeoutError()), RESERVE),
        (caused(ValueError("the caller's own"), httpx2.ConnectTimeout("no")), 0),
        (OSError(urllib3_exceptions.ProtocolError("aborted", ConnectionResetError())), RESERVE),
    ],
    ids=repr,
)
def test_rule_13_other_clients_say_by_their_exceptions_whether_the_request_was_sent(
    error: Exception, charged: int
) -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=RESERVE)
    def chat(user: str) -> None:
        raise error

    with pytest.raises(type(error)):
        chat("alice")
    assert (used(budget), open_holds(budget)) == (charged, 0)


def test_rule_13_what_happened_to_the_call_before_is_not_held_against_the_one_that_takes_its_place() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=RESERVE)
    def second_choice(user: str) -> None:
        raise ZeroDivisionError

    def chat(user: str) -> None:
        try:
            raise TimeoutError
        except TimeoutError:
            second_choice(user)

    with pytest.raises(ZeroDivisionError) as caught:
        chat("alice")
    assert isinstance(caught.value.__context__, TimeoutError)
    assert (used(budget), open_holds(budget)) == (0, 0)


COMPLETION: dict[str, Any] = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": '{"x": 1'}, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 21, "completion_tokens": 9, "total_tokens": 30},
}  # fmt: skip


@WAYS
@RESERVES
async def test_rule_13_a_parsed_answer_that_reached_its_cap_is_charged_the_usage_on_the_exception(
    way: str, reserve: int | None, server: Server
) -> None:
    server.script(json.dumps(COMPLETION).encode(), kind="application/json")
    caller = Caller(server.url, way)
    with collect_decisions() as seen, pytest.raises(openai.LengthFinishReasonError) as caught:
        await caller.call(parse, reserve)
    assert caller.is_unchanged(caught.value)
    assert caught.value.completion.usage is not None
    assert caller.settled() == 30
    assert seen[0].settlement is not None
    assert seen[0].settlement.source == "reported"


@WAYS
async def test_rule_13_on_error_decides_and_leaves_the_rest_to_the_default(way: str, server: Server) -> None:
    def on_error(error: BaseException) -> Any:
        return KEEP if isinstance(error, openai.InternalServerError) else None

    caller = Caller(server.url, way)
    for status, charged in ((500, RESERVE), (400, RESERVE)):
        server.script(b"{}", status=status, kind="application/json")
        with pytest.raises(openai.APIStatusError):
            await caller.call(ask_openai, on_error=on_error)
        assert caller.settled() == charged


def test_rule_13_the_usage_of_all_attempts_that_instructors_exception_carries_is_charged() -> None:
    class InstructorRetryException(Exception):
        """As instructor has it: `total_usage` adds up the attempts."""

        def __init__(self) -> None:
            super().__init__("no answer fits the model")
            self.n_attempts = 3
            self.total_usage = CompletionUsage(prompt_tokens=60, completion_tokens=30, total_tokens=90)

    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=200)
    def chat(user: str) -> None:
        raise InstructorRetryException

    with pytest.raises(InstructorRetryException):
        chat("alice")
    assert (used(budget), open_holds(budget)) == (90, 0)


def test_rule_13_attempts_that_failed_before_one_that_did_not_are_not_charged(server: Server) -> None:
    budget = TokenBudget("1_000_000/day")
    with (
        httpx2.Client(verify=False) as http,
        openai.OpenAI(base_url=server.url, api_key="k", max_retries=0, http_client=http) as client,
    ):
        chat = token_budget(budget, key="user", reserve=RESERVE)(
            lambda user: client.chat.completions.create(model="m", messages=HELLO)
        )
        for _ in range(3):
            server.script(b"{}", status=503, kind="application/json")
            with pytest.raises(openai.InternalServerError):
                chat("alice")
        server.script(json.dumps(COMPLETION).encode(), kind="application/json")
        chat("alice")
    assert (used(budget), open_holds(budget)) == (30, 0)


# Cancellation.


@SDKS
@RESERVES
@pytest.mark.parametrize("way", ["async", "a sync function that returns a coroutine"])
async def test_rule_13_a_task_cancelled_in_the_middle_of_a_call_keeps_its_hold_or_is_estimated(
    sdk: Any, ask: Ask, reserve: int | None, way: str, server: Server
) -> None:
    server.script(end="hang")
    caller = Caller(server.url, way)
    task = asyncio.create_task(caller.call(ask, reserve))
    while not server.requests:
        await asyncio.sleep(0)
    assert open_holds(caller.budget) == 1
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert task.cancelled()
    assert caught.value.args == ("enough",)
    assert caller.settled() == (reserve or 2)


@RESERVES
@pytest.mark.parametrize("way", ["async", "a sync function that returns a coroutine"])
async def test_rule_13_a_timeout_around_a_call_keeps_its_hold_or_is_estimated(
    reserve: int | None, way: str, server: Server
) -> None:
    server.script(end="hang")
    caller = Caller(server.url, way)

    async def call() -> None:
        async with asyncio.timeout(None) as timeout:
            task = asyncio.ensure_future(caller.call(ask_openai, reserve))
            while not server.requests:
                await asyncio.sleep(0)
            timeout.reschedule(0)
            await task

    with pytest.raises(TimeoutError):
        await call()
    assert isinstance(caller.raised[0][0], asyncio.CancelledError)
    assert caller.settled() == (reserve or 2)


@pytest.mark.parametrize("reserve", [RESERVE, None])
async def test_rule_11_a_real_call_cancelled_at_any_moment_is_settled_once(reserve: int | None, server: Server) -> None:
    server.script(json.dumps(COMPLETION).encode(), kind="application/json")
    outcomes: set[int] = set()
    async with (
        httpx2.AsyncClient(verify=False) as http,
        openai.AsyncOpenAI(base_url=server.url, api_key="k", max_retries=0, http_client=http) as client,
    ):
        for steps in range(60):
            budget = TokenBudget("1_000_000/day")
            begun: list[None] = []

            @token_budget(budget, key="user", reserve=reserve)
            async def chat(user: str, begun: list[None] = begun) -> Any:
                begun.append(None)
                return await client.chat.completions.create(model="m", messages=HELLO)

            task = asyncio.create_task(chat("alice"))
            for _ in range(steps):
                await asyncio.sleep(0)
            cancelled = task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            assert open_holds(budget) == 0
            if isinstance(result, asyncio.CancelledError):
                assert cancelled
                assert used(budget) == ((reserve or 2) if begun else 0)
            else:
                assert used(budget) == 30
            outcomes.add(used(budget))
    assert {0, reserve or 2} <= outcomes


class Pause:
    """A point at which a coroutine can be cancelled."""

    def __await__(self) -> Iterator[None]:
        yield


def run(coroutine: Any, cancel_at: int) -> bool:
    """Run a coroutine up to one of its awaits, counted from 1, and cancel it there. False if it came to its end."""
    try:
        for _ in range(cancel_at):
            coroutine.send(None)
        coroutine.throw(asyncio.CancelledError())
        while True:  # it cleans up
            coroutine.send(None)
    except StopIteration:
        return False
    except asyncio.CancelledError:
        return True


Scene = Callable[[TokenBudget], Any]


def plain(budget: TokenBudget) -> Any:
    @token_budget(budget, key="user", reserve=50)
    async def call(user: str) -> Usage:
        await Pause()
        await Pause()
        return Usage(30)

    return call("alice")


def deferred(budget: TokenBudget) -> Any:
    async def work() -> Usage:
        await Pause()
        await Pause()
        return Usage(30)

    return token_budget(budget, key="user", reserve=50)(lambda user: work())("alice")


def recording(budget: TokenBudget) -> Any:
    @token_budget(budget, key="user", reserve=50)
    async def call(user: str) -> None:
        await Pause()
        record_usage(10)
        await Pause()
        record_usage(20)

    return call("alice")


def nested(budget: TokenBudget) -> Any:
    @token_budget(budget, key="user", reserve=20)
    async def inner(user: str) -> Usage:
        await Pause()
        return Usage(15)

    @token_budget(budget, key="user", reserve=50)
    async def outer(user: str) -> None:
        await Pause()
        await inner(user)
        await Pause()

    return outer("alice")


def by_hand(budget: TokenBudget) -> Any:
    async def call() -> None:
        async with budget.reserve_async("alice", 50) as hold:
            await Pause()
            await Pause()
            hold.settle(30)
            await Pause()

    return call()


def cleaning_up(budget: TokenBudget) -> Any:
    @token_budget(budget, key="user", reserve=50)
    async def call(user: str) -> Usage:
        try:
            await Pause()
        finally:
            await Pause()
        return Usage(30)

    return call("alice")


def streaming(budget: TokenBudget) -> Any:
    @token_budget(budget, key="user", reserve=50)
    async def stream(user: str) -> AsyncIterator[Any]:
        await Pause()
        yield "text"
        await Pause()
        yield Usage(30)
        await Pause()

    async def consume() -> None:
        async for _ in stream("alice"):
            pass

    return consume()


def streaming_object(budget: TokenBudget) -> Any:
    class Stream:
        """As an SDK's."""

        def __init__(self) -> None:
            self.items = iter(["text", Usage(30)])

        def __aiter__(self) -> Stream:
            return self

        async def __anext__(self) -> Any:
            await Pause()
            for item in self.items:
                return item
            raise StopAsyncIteration

    @token_budget(budget, key="user", reserve=50)
    async def stream(user: str) -> Stream:
        await Pause()
        return Stream()

    async def consume() -> None:
        async for _ in await stream("alice"):
            pass

    return consume()


@pytest.mark.parametrize(
    ("scene", "charged"),
    [
        # what is charged if it is cancelled before it starts, at its first await, at its second, …, and if it ends
        (plain, [0, 50, 50, 30]),
        (deferred, [0, 50, 50, 30]),
        (recording, [0, 50, 10, 30]),
        (nested, [0, 50, 20, 15, 15]),  # the inner call keeps its hold, which the outer one is not charged again
        (by_hand, [0, 50, 50, 30, 30]),
        (cleaning_up, [0, 50, 50, 30]),
        (streaming, [0, 50, 50, 30, 30]),
        (streaming_object, [0, 50, 50, 50, 30, 30]),
    ],
)
def test_rule_11_settlement_is_not_lost_to_a_cancellation_at_any_await(scene: Scene, charged: list[int]) -> None:
    for cancel_at, expected in enumerate(charged):
        budget = TokenBudget("1000/day")
        coroutine = scene(budget)
        assert run(coroutine, cancel_at) == (cancel_at < len(charged) - 1)
        del coroutine
        assert (used(budget), open_holds(budget)) == (expected, 0), cancel_at


def test_rule_11_a_call_that_outlives_its_cancellation_is_charged_what_it_returns() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    async def call(user: str) -> Usage:
        try:
            await Pause()
        except asyncio.CancelledError:
            await Pause()
        return Usage(30)

    coroutine = call("alice")
    coroutine.send(None)
    coroutine.throw(asyncio.CancelledError())
    assert open_holds(budget) == 1
    with pytest.raises(StopIteration):
        coroutine.send(None)
    assert (used(budget), open_holds(budget)) == (30, 0)


async def test_rule_11_the_calls_of_a_group_that_one_of_them_ends_are_all_settled() -> None:
    budget = TokenBudget("10_000/day")

    @token_budget(budget, key="user", reserve=50)
    async def call(user: str, number: int) -> Usage:
        if number == 7:
            raise ValueError("the seventh")
        if number < 7:
            return Usage(30)
        await asyncio.Event().wait()
        raise AssertionError

    async def call_all() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(call("alice", number))

    with pytest.raises(ExceptionGroup) as caught:
        await call_all()
    assert [str(error) for error in caught.value.exceptions] == ["the seventh"]
    assert open_holds(budget) == 0
    assert used(budget) == 7 * 30 + 12 * 50
