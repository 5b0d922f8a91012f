"""Stream objects of the SDKs come back as themselves and are charged once, however they end (rules 8, 11, 13, 16, 17).

The SDKs' own clients talk over HTTP to a server on loopback, which answers what the test has scripted.
"""

from __future__ import annotations

import asyncio
import binascii
import gc
import inspect
import json
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from itertools import islice
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import anthropic
import boto3
import cohere
import httpx2
import ollama
import openai
import pytest
from google import genai
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from llmock.pytest_plugin import LLMock
from mistralai.client import Mistral
from mistralai.client.utils.eventstreaming import EventStream, EventStreamAsync
from openai.lib.streaming import chat as chat_streaming
from openai.lib.streaming import responses as response_streaming
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

from quotalimit import Settlement, TokenBudget, TokenBudgetExceeded, collect_decisions, record_usage, token_budget

from ..helpers import open_holds, used
from .server import Server

CHUNK = "x" * 40
"""Ten tokens of text; the one argument of the decorated functions is "alice", five bytes."""

RESERVE = 500

pytestmark = pytest.mark.usefixtures("time", "small_heap")


# What each provider sends: four chunks of text, and its usage where it reports that.


def data(*events: Any) -> list[bytes]:
    return [b"data: %s\n\n" % json.dumps(event).encode() for event in events]


def named(*events: Any) -> list[bytes]:
    return [b"event: %s\n%s" % (event["type"].encode(), *data(event)) for event in events]


def chat_chunk(*, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


CHAT_USAGE = {"prompt_tokens": 11, "completion_tokens": 44, "total_tokens": 55}
CHAT_TEXTS = data(*[chat_chunk(role="assistant", content=CHUNK)] * 4, chat_chunk(finish="stop"))
DONE = b"data: [DONE]\n\n"
CHAT = [*CHAT_TEXTS, *data({**chat_chunk(), "choices": [], "usage": CHAT_USAGE}), DONE]
CHAT_WITHOUT_USAGE = [*CHAT_TEXTS, DONE]

RESPONSE = {
    "id": "r", "object": "response", "created_at": 1, "model": "m", "output": [], "parallel_tool_calls": True,
    "tool_choice": "auto", "tools": [], "status": "in_progress",
}  # fmt: skip
PART = {"type": "output_text", "text": "", "annotations": []}
MESSAGE = {"type": "message", "id": "i", "role": "assistant", "status": "in_progress", "content": []}
ANSWER = {**MESSAGE, "status": "completed", "content": [{**PART, "text": CHUNK * 4}]}
RESPONSES_USAGE = {
    "input_tokens": 12, "output_tokens": 45, "total_tokens": 57, "input_tokens_details": {"cached_tokens": 2},
    "output_tokens_details": {"reasoning_tokens": 5},
}  # fmt: skip
AT: dict[str, Any] = {"output_index": 0, "content_index": 0, "item_id": "i"}
RESPONSES_OPENING = [
    {"type": "response.created", "response": RESPONSE},
    {"type": "response.output_item.added", "output_index": 0, "item": MESSAGE},
    {"type": "response.content_part.added", **AT, "part": PART},
]
RESPONSES_TEXTS = [{"type": "response.output_text.delta", **AT, "delta": CHUNK, "logprobs": []}] * 4
RESPONSES_CLOSING = [
    {"type": "response.output_text.done", **AT, "text": CHUNK * 4, "logprobs": []},
    {"type": "response.content_part.done", **AT, "part": {**PART, "text": CHUNK * 4}},
    {"type": "response.output_item.done", "output_index": 0, "item": ANSWER},
]


def responses(*events: dict[str, Any]) -> list[bytes]:
    return named(*({**event, "sequence_number": number} for number, event in enumerate(events)))


def response_end(status: str) -> dict[str, Any]:
    response = {**RESPONSE, "status": status, "output": [ANSWER], "usage": RESPONSES_USAGE}
    return {"type": f"response.{status}", "response": response}


RESPONSES = responses(*RESPONSES_OPENING, *RESPONSES_TEXTS, *RESPONSES_CLOSING, response_end("completed"))

ANTHROPIC_USAGE = {"input_tokens": 13, "cache_creation_input_tokens": 4, "cache_read_input_tokens": 8}
ANTHROPIC_START = {
    "type": "message_start",
    "message": {
        "id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None,
        "stop_sequence": None, "usage": {**ANTHROPIC_USAGE, "output_tokens": 1},
    },
}  # fmt: skip


def block(start: dict[str, Any], deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": 0, "content_block": start},
        *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": 0},
    ]


ANTHROPIC = named(
    ANTHROPIC_START,
    *block({"type": "text", "text": ""}, [{"type": "text_delta", "text": CHUNK}] * 4),
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 46}},
    {"type": "message_stop"},
)

MISTRAL_USAGE = {"prompt_tokens": 14, "completion_tokens": 47, "total_tokens": 61}
MISTRAL = [*CHAT_TEXTS[:4], *data({**chat_chunk(content="", finish="stop"), "usage": MISTRAL_USAGE}), DONE]


def gemini_chunk(written: int, finish: str | None = None) -> dict[str, Any]:
    """A chunk with a running total: 15 read, so many written, and 6 thought."""
    metadata = {"promptTokenCount": 15, "candidatesTokenCount": written, "thoughtsTokenCount": 6}
    content = {"parts": [{"text": CHUNK}], "role": "model"}
    return {
        "candidates": [{"content": content, "finishReason": finish, "index": 0}],
        "usageMetadata": {**metadata, "totalTokenCount": 15 + written + 6},
    }


GEMINI = data(*map(gemini_chunk, (10, 20, 30)), gemini_chunk(40, "STOP"))

COHERE = named(
    {"type": "message-start", "id": "m", "delta": {"message": {"role": "assistant", "content": []}}},
    *[{"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": CHUNK}}}}] * 4,
    {
        "type": "message-end",
        "delta": {"finish_reason": "COMPLETE", "usage": {"tokens": {"input_tokens": 16.0, "output_tokens": 49.0}}},
    },
)

OLLAMA_CHUNK = {"model": "m", "created_at": "2026-11-23T12:00:00Z", "done": False}
OLLAMA = [
    json.dumps(line).encode() + b"\n"
    for line in (
        *[{**OLLAMA_CHUNK, "message": {"role": "assistant", "content": CHUNK}}] * 4,
        {
            **OLLAMA_CHUNK,
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "prompt_eval_count": 17,
            "eval_count": 50,
        },
    )
]

# The clients, and what is asked of them. An async client is asked the same, but where its method has another name.

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


UNUSED, UNUSED_ASYNC = httpx2.Client(verify=False), httpx2.AsyncClient(verify=False)


@pytest.fixture
def clients(server: Server) -> Iterator[Any]:
    """The sync clients."""
    with (
        httpx2.Client(verify=False) as http,
        openai.OpenAI(base_url=server.url, api_key="k", max_retries=0, http_client=http) as gpt,
        anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0, http_client=http) as claude,
        Mistral(server_url=server.url, api_key="k", client=http, async_client=UNUSED_ASYNC) as mistral,
    ):
        yield SimpleNamespace(openai=gpt, anthropic=claude, mistral=mistral, url=server.url)


@pytest.fixture
async def async_clients(server: Server) -> AsyncIterator[Any]:
    """The async clients."""
    async with (
        httpx2.AsyncClient(verify=False) as http,
        openai.AsyncOpenAI(base_url=server.url, api_key="k", max_retries=0, http_client=http) as gpt,
        anthropic.AsyncAnthropic(base_url=server.url, api_key="k", max_retries=0, http_client=http) as claude,
        Mistral(server_url=server.url, api_key="k", client=UNUSED, async_client=http) as mistral,
    ):
        yield SimpleNamespace(openai=gpt, anthropic=claude, mistral=mistral, url=server.url)


def ask_chat(clients: Any, **options: Any) -> Any:
    return clients.openai.chat.completions.create(model="m", messages=HELLO, stream=True, **options)


def ask_chat_with_usage(clients: Any) -> Any:
    return ask_chat(clients, stream_options={"include_usage": True})


def ask_responses(clients: Any) -> Any:
    return clients.openai.responses.create(model="m", input="hello", stream=True)


def ask_anthropic(clients: Any) -> Any:
    return clients.anthropic.messages.create(model="m", max_tokens=9, messages=HELLO, stream=True)


def ask_mistral(clients: Any) -> Any:
    return clients.mistral.chat.stream(model="m", messages=HELLO)


def ask_mistral_async(clients: Any) -> Any:
    return clients.mistral.chat.stream_async(model="m", messages=HELLO)


def manage_chat(clients: Any) -> Any:
    return clients.openai.chat.completions.stream(model="m", messages=HELLO, stream_options={"include_usage": True})


def manage_responses(clients: Any) -> Any:
    return clients.openai.responses.stream(model="m", input="hello")


def manage_anthropic(clients: Any) -> Any:
    return clients.anthropic.messages.stream(model="m", max_tokens=9, messages=HELLO)


Ask = Callable[[Any], Any]


class Sdk(NamedTuple):
    """A kind of stream: how it is asked for, what the wire has, and what that reports."""

    name: str
    ask: Ask
    ask_async: Ask
    wire: list[bytes]
    total: int | None
    """The usage that the whole wire reports; None if it reports none."""
    opening: int | None
    """The usage that it reports before the first text."""
    kind: type
    kind_async: type

    def charged(self, texts: int, reserve: int | None) -> int:
        """Rule 8: what a stream is charged of which so many texts have come, but not the end.

        What was told before it broke off and the text that came since; else the reserve; else the text of "alice",
        which with whole chunks of ten tokens makes two more.
        """
        if self.opening is not None and texts:
            return self.opening + 10 * texts
        return 2 + 10 * texts if reserve is None else reserve

    def charged_in_all(self, reserve: int | None) -> int:
        """What it is charged at its end."""
        return self.charged(4, reserve) if self.total is None else self.total


STREAMS = [
    Sdk("chat", ask_chat_with_usage, ask_chat_with_usage, CHAT, 55, None, openai.Stream, openai.AsyncStream),
    Sdk("chat, no usage", ask_chat, ask_chat, CHAT_WITHOUT_USAGE, None, None, openai.Stream, openai.AsyncStream),
    Sdk("responses", ask_responses, ask_responses, RESPONSES, 57, None, openai.Stream, openai.AsyncStream),
    Sdk("anthropic", ask_anthropic, ask_anthropic, ANTHROPIC, 71, 26, anthropic.Stream, anthropic.AsyncStream),
    Sdk("mistral", ask_mistral, ask_mistral_async, MISTRAL, 61, None, EventStream, EventStreamAsync),
]

CHAT_MANAGERS = chat_streaming.ChatCompletionStreamManager, chat_streaming.AsyncChatCompletionStreamManager
RESPONSE_MANAGERS = response_streaming.ResponseStreamManager, response_streaming.AsyncResponseStreamManager
MESSAGE_MANAGERS = anthropic.MessageStreamManager, anthropic.AsyncMessageStreamManager
MANAGERS = [
    Sdk("chat", manage_chat, manage_chat, CHAT, 55, None, *CHAT_MANAGERS),
    Sdk("responses", manage_responses, manage_responses, RESPONSES, 57, None, *RESPONSE_MANAGERS),
    Sdk("anthropic", manage_anthropic, manage_anthropic, ANTHROPIC, 71, 26, *MESSAGE_MANAGERS),
]

each_stream = pytest.mark.parametrize("sdk", STREAMS, ids=[sdk.name for sdk in STREAMS])
each_manager = pytest.mark.parametrize("sdk", MANAGERS, ids=[sdk.name for sdk in MANAGERS])
with_and_without_reserve = pytest.mark.parametrize("reserve", [RESERVE, None])


class Guarded:
    """A budget and the functions that it guards, sync and async: each returns what the SDK gives."""

    def __init__(self, reserve: int | None, ask: Ask, clients: Any) -> None:
        self.budget = TokenBudget("1_000_000/day")
        decorate = token_budget(self.budget, key="user", reserve=reserve)

        @decorate
        def call(user: str) -> Any:
            return ask(clients)

        @decorate
        async def call_async(user: str) -> Any:
            result = ask(clients)
            return await result if asyncio.iscoroutine(result) else result

        self.call, self.call_async = call, call_async
        self.reserve = reserve

    def running(self) -> bool:
        """Whether the stream is still held for."""
        return open_holds(self.budget) == 1 and used(self.budget) == (self.reserve or 0)

    def settled(self) -> int:
        """What the stream was charged, no hold being left."""
        gc.collect()
        assert open_holds(self.budget) == 0
        return used(self.budget)


TEXTS = ("content_block_delta", "content.delta", "response.output_text.delta")


def has_text(item: Any) -> bool:
    if getattr(item, "type", None) is not None:
        return item.type in TEXTS
    choices = getattr(item, "data", item).choices
    return bool(choices and choices[0].delta.content)


def read_two(stream: Any) -> None:
    """Read until two texts have come."""
    texts = 0
    while texts < 2:
        texts += has_text(next(stream))


async def read_two_async(stream: Any) -> None:
    texts = 0
    while texts < 2:
        texts += has_text(await anext(stream))


def read_two_and_raise(stream: Any, error: Exception) -> None:
    read_two(stream)
    raise error


async def read_two_and_raise_async(stream: Any, error: Exception) -> None:
    await read_two_async(stream)
    raise error


class Mine(Exception):
    """What the consumer of a stream raises."""


# How a stream can end, and how many of its four texts have come by then; None is all, and the end.


def exhaust(stream: Any) -> None:
    assert sum(has_text(item) for item in stream) == 4


def exhaust_by_next(stream: Any) -> None:
    while next(stream, None) is not None:
        pass
    assert list(stream) == []


def exhaust_in_with(stream: Any) -> None:
    with stream as same:
        assert same is stream
        exhaust(stream)


def break_and_close(stream: Any) -> None:
    texts = 0
    for item in stream:
        texts += has_text(item)
        if texts == 2:
            break
    stream.close()
    stream.close()


def break_in_with(stream: Any) -> None:
    with stream:
        read_two(stream)


def break_in_closing(stream: Any) -> None:
    with closing(stream):
        read_two(stream)


def raise_in_with(stream: Any) -> None:
    error = Mine()
    with pytest.raises(Mine) as caught, stream:
        read_two_and_raise(stream, error)
    assert caught.value is error


def break_and_drop(stream: Any) -> None:
    texts = 0
    for item in stream:
        texts += has_text(item)
        if texts == 2:
            break


def raise_and_drop(stream: Any) -> None:
    with pytest.raises(Mine):
        read_two_and_raise(stream, Mine())


def drop_in_a_cycle(stream: Any) -> None:
    read_two(stream)
    cycle: list[Any] = [stream]
    cycle.append(cycle)


def close_at_once(stream: Any) -> None:
    stream.close()


def leave_at_once(stream: Any) -> None:
    with stream:
        pass


def drop_at_once(stream: Any) -> None:
    pass


ENDS = [
    (exhaust, None),
    (exhaust_by_next, None),
    (exhaust_in_with, None),
    (break_and_close, 2),
    (break_in_with, 2),
    (break_in_closing, 2),
    (raise_in_with, 2),
    (break_and_drop, 2),
    (raise_and_drop, 2),
    (drop_in_a_cycle, 2),
    (close_at_once, 0),
    (leave_at_once, 0),
    (drop_at_once, 0),
]


@each_stream
@pytest.mark.parametrize(("end", "texts"), ENDS)
@with_and_without_reserve
def test_rule_11_a_stream_is_charged_once_however_it_ends(
    sdk: Sdk, end: Callable[[Any], None], texts: int | None, reserve: int | None, server: Server, clients: Any
) -> None:
    server.script(*sdk.wire)
    guarded = Guarded(reserve, sdk.ask, clients)
    streams = [guarded.call("alice")]
    assert guarded.running()
    end(streams.pop())
    charged = sdk.charged_in_all(reserve) if texts is None else sdk.charged(texts, reserve)
    assert guarded.settled() == charged
    assert guarded.settled() == charged
    assert len(server.requests) == 1


async def exhaust_async(stream: Any) -> None:
    assert sum([has_text(item) async for item in stream]) == 4


async def exhaust_by_anext(stream: Any) -> None:
    while await anext(stream, None) is not None:
        pass
    assert [item async for item in stream] == []


async def exhaust_in_async_with(stream: Any) -> None:
    async with stream as same:
        assert same is stream
        await exhaust_async(stream)


async def break_and_close_async(stream: Any) -> None:
    texts = 0
    async for item in stream:
        texts += has_text(item)
        if texts == 2:
            break
    await stream.close()
    await stream.close()


async def break_and_aclose(stream: Any) -> None:
    await read_two_async(stream)
    await getattr(stream, "aclose", stream.close)()  # only OpenAI's has the former


async def break_in_async_with(stream: Any) -> None:
    async with stream:
        await read_two_async(stream)


async def raise_in_async_with(stream: Any) -> None:
    error = Mine()
    with pytest.raises(Mine) as caught:
        async with stream:
            await read_two_and_raise_async(stream, error)
    assert caught.value is error


async def break_and_drop_async(stream: Any) -> None:
    texts = 0
    async for item in stream:
        texts += has_text(item)
        if texts == 2:
            break


async def cancel_the_consumer(stream: Any) -> None:
    async def consume(stream: Any) -> None:
        async with stream:
            await read_two_async(stream)
            reached.set()
            await asyncio.Event().wait()

    reached = asyncio.Event()
    task = asyncio.create_task(consume(stream))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def close_at_once_async(stream: Any) -> None:
    await stream.close()


async def leave_at_once_async(stream: Any) -> None:
    async with stream:
        pass


async def drop_at_once_async(stream: Any) -> None:
    pass


ASYNC_ENDS = [
    (exhaust_async, None),
    (exhaust_by_anext, None),
    (exhaust_in_async_with, None),
    (break_and_close_async, 2),
    (break_and_aclose, 2),
    (break_in_async_with, 2),
    (raise_in_async_with, 2),
    (break_and_drop_async, 2),
    (cancel_the_consumer, 2),
    (close_at_once_async, 0),
    (leave_at_once_async, 0),
    (drop_at_once_async, 0),
]


async def turns() -> None:
    """Let the event loop close what was dropped."""
    gc.collect()
    for _ in range(10):
        await asyncio.sleep(0)


@each_stream
@pytest.mark.parametrize(("end", "texts"), ASYNC_ENDS)
@with_and_without_reserve
async def test_rule_11_an_async_stream_is_charged_once_however_it_ends(
    sdk: Sdk,
    end: Callable[[Any], Coroutine[Any, Any, None]],
    texts: int | None,
    reserve: int | None,
    server: Server,
    async_clients: Any,
) -> None:
    server.script(*sdk.wire)
    guarded = Guarded(reserve, sdk.ask_async, async_clients)
    streams = [await guarded.call_async("alice")]
    assert guarded.running()
    await end(streams.pop())
    await turns()
    charged = sdk.charged_in_all(reserve) if texts is None else sdk.charged(texts, reserve)
    assert guarded.settled() == charged
    assert guarded.settled() == charged
    assert len(server.requests) == 1


@each_stream
@with_and_without_reserve
async def test_rule_11_a_task_cancelled_while_it_waits_for_an_item_is_charged_what_came(
    sdk: Sdk, reserve: int | None, server: Server, async_clients: Any
) -> None:
    cut = cut_after_two(sdk.wire)
    server.script(*cut, end="hang")
    guarded = Guarded(reserve, sdk.ask_async, async_clients)
    read = asyncio.Event()

    async def consume() -> None:
        stream = await guarded.call_async("alice")
        await read_two_async(stream)
        read.set()
        await anext(stream)

    task = asyncio.create_task(consume())
    await read.wait()
    await turns()
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert guarded.settled() == sdk.charged(2, reserve)


def cut_after_two(wire: list[bytes]) -> list[bytes]:
    """The wire up to the second text."""
    second = [number for number, part in enumerate(wire) if CHUNK.encode() in part][1]
    return wire[: second + 1]


@each_stream
@with_and_without_reserve
def test_rule_13_a_connection_that_breaks_in_the_middle_is_charged_what_came(
    sdk: Sdk, reserve: int | None, server: Server, clients: Any
) -> None:
    server.script(*cut_after_two(sdk.wire), end="cut")
    guarded = Guarded(reserve, sdk.ask, clients)
    with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)):
        exhaust(guarded.call("alice"))
    assert guarded.settled() == sdk.charged(2, reserve)


@each_stream
@with_and_without_reserve
async def test_rule_13_an_async_connection_that_breaks_in_the_middle_is_charged_what_came(
    sdk: Sdk, reserve: int | None, server: Server, async_clients: Any
) -> None:
    server.script(*cut_after_two(sdk.wire), end="cut")
    guarded = Guarded(reserve, sdk.ask_async, async_clients)
    with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)):
        await exhaust_async(await guarded.call_async("alice"))
    assert guarded.settled() == sdk.charged(2, reserve)


@each_stream
@with_and_without_reserve
def test_rule_8_a_stream_that_just_stops_is_charged_the_text_that_came(
    sdk: Sdk, reserve: int | None, server: Server, clients: Any
) -> None:
    server.script(*cut_after_two(sdk.wire))
    guarded = Guarded(reserve, sdk.ask, clients)
    for _ in guarded.call("alice"):
        pass
    assert guarded.settled() == sdk.charged(2, reserve)


OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "too much", "code": "overloaded"}}
REPORTED_ERRORS = [
    (STREAMS[0], data(OVERLOADED), openai.APIError),
    (STREAMS[3], named(OVERLOADED), anthropic.APIStatusError),
]


@pytest.mark.parametrize(("sdk", "error", "kind"), REPORTED_ERRORS, ids=["chat", "anthropic"])
@with_and_without_reserve
def test_rule_13_an_error_event_in_the_middle_is_charged_what_came(
    sdk: Sdk, error: list[bytes], kind: type[Exception], reserve: int | None, server: Server, clients: Any
) -> None:
    server.script(*cut_after_two(sdk.wire), *error)
    guarded = Guarded(reserve, sdk.ask, clients)
    with pytest.raises(kind, match="too much"):
        exhaust(guarded.call("alice"))
    assert guarded.settled() == sdk.charged(2, reserve)


# What comes back is that object.


@each_stream
def test_rule_16_a_stream_comes_back_as_itself(sdk: Sdk, server: Server, clients: Any) -> None:
    server.script(*sdk.wire)
    made: list[Any] = []

    def ask(clients: Any) -> Any:
        made.append(sdk.ask(clients))
        return made[0]

    stream = Guarded(RESERVE, ask, clients).call("alice")
    assert stream is made[0]
    assert isinstance(stream, sdk.kind)
    assert type(stream).__name__ == sdk.kind.__name__
    assert type(stream).__qualname__ == sdk.kind.__qualname__
    assert type(stream).__module__ == sdk.kind.__module__
    assert stream.response.status_code == 200
    assert stream.response.headers["content-type"] == "text/event-stream"
    assert iter(stream) is not None
    with stream as same:
        assert same is stream
    assert stream.response.is_closed


@each_stream
async def test_rule_16_an_async_stream_comes_back_as_itself(sdk: Sdk, server: Server, async_clients: Any) -> None:
    server.script(*sdk.wire)
    made: list[Any] = []

    async def ask(clients: Any) -> Any:
        made.append(await sdk.ask_async(clients))
        return made[0]

    stream = await Guarded(RESERVE, ask, async_clients).call_async("alice")
    assert stream is made[0]
    assert isinstance(stream, sdk.kind_async)
    assert type(stream).__name__ == sdk.kind_async.__name__
    assert stream.response.status_code == 200
    async with stream as same:
        assert same is stream
    assert stream.response.is_closed


@each_stream
def test_rule_16_a_decorated_stream_gives_the_items_of_a_bare_one(sdk: Sdk, server: Server, clients: Any) -> None:
    server.script(*sdk.wire)
    bare, decorated = list(sdk.ask(clients)), list(Guarded(None, sdk.ask, clients).call("alice"))
    assert decorated == bare


@each_stream
def test_a_stream_and_a_bare_one_of_its_class_do_not_disturb_each_other(sdk: Sdk, server: Server, clients: Any) -> None:
    server.script(*sdk.wire)
    guarded = Guarded(None, sdk.ask, clients)
    watched, bare = guarded.call("alice"), sdk.ask(clients)
    next(watched)
    exhaust(bare)
    bare.close()
    assert guarded.running()
    watched.close()
    assert open_holds(guarded.budget) == 0


@each_stream
def test_rule_11_what_a_stream_still_gives_after_close_is_not_charged_again(
    sdk: Sdk, server: Server, clients: Any
) -> None:
    server.script(*sdk.wire)
    guarded = Guarded(None, sdk.ask, clients)
    stream = guarded.call("alice")
    read_two(stream)
    stream.close()
    charged = guarded.settled()
    try:
        for _ in stream:
            pass
    except (httpx2.HTTPError, httpx2.StreamError, openai.APIConnectionError):  # what was not read yet is gone
        pass
    assert guarded.settled() == charged == sdk.charged(2, None)


@each_stream
async def test_a_sync_function_that_returns_an_async_clients_coroutine_is_charged(
    sdk: Sdk, server: Server, async_clients: Any
) -> None:
    server.script(*sdk.wire)
    guarded = Guarded(RESERVE, sdk.ask_async, async_clients)
    stream = await guarded.call("alice")
    assert isinstance(stream, sdk.kind_async)
    assert guarded.running()
    await exhaust_async(stream)
    assert guarded.settled() == sdk.charged_in_all(RESERVE)


def test_rule_16_a_stream_over_budget_is_never_asked_for(server: Server, clients: Any) -> None:
    server.script(*CHAT)
    guarded = Guarded(600_000, ask_chat_with_usage, clients)
    with guarded.call("alice"):
        with pytest.raises(TokenBudgetExceeded):
            guarded.call("alice")
        assert len(server.requests) == 1


def test_the_settlement_of_a_stream_appears_when_it_has_ended(server: Server, clients: Any) -> None:
    server.script(*CHAT)
    guarded = Guarded(50, ask_chat_with_usage, clients)
    with collect_decisions() as seen:
        stream = guarded.call("alice")
    assert seen[0].settlement is None
    exhaust(stream)
    assert seen[0].settlement == Settlement(guarded.budget.name, 55, 55, 50, "reported")
    assert seen[0].settlement.overrun == 5


# Reasoning and the arguments of tools are text too; what repeats earlier text is not.

TOOL = {"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": CHUNK}}
THOUGHT = {"type": "thinking", "thinking": "", "signature": ""}
TOOL_USE = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
WRITTEN = [
    ("content", ask_chat, data(chat_chunk(content=CHUNK)), 12),
    ("reasoning", ask_chat, data(chat_chunk(reasoning_content=CHUNK), chat_chunk(content=CHUNK)), 22),
    ("refusal", ask_chat, data(chat_chunk(refusal=CHUNK)), 12),
    ("tool arguments", ask_chat, data(chat_chunk(tool_calls=[TOOL])), 12),
    (
        "responses: reasoning",
        ask_responses,
        responses(
            {
                "type": "response.reasoning_summary_text.delta",
                "item_id": "i",
                "output_index": 0,
                "summary_index": 0,
                "delta": CHUNK,
            }
        ),
        12,
    ),
    (
        "responses: tool arguments",
        ask_responses,
        responses(
            {
                "type": "response.function_call_arguments.delta",
                "item_id": "i",
                "output_index": 0,
                "delta": CHUNK,
            }
        ),
        12,
    ),
    (
        "responses: text and its repetition",
        ask_responses,
        responses(*RESPONSES_OPENING, *RESPONSES_TEXTS, *RESPONSES_CLOSING),
        42,
    ),
    (
        "anthropic: thoughts",
        ask_anthropic,
        named(*block(THOUGHT, [{"type": "thinking_delta", "thinking": CHUNK}])),
        12,
    ),
    (
        "anthropic: tool arguments",
        ask_anthropic,
        named(*block(TOOL_USE, [{"type": "input_json_delta", "partial_json": CHUNK}])),
        12,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "wire", "tokens"), [row[1:] for row in WRITTEN], ids=[row[0] for row in WRITTEN])
def test_rule_8_all_that_a_model_wrote_counts_once_where_no_usage_is_reported(
    ask: Ask, wire: list[bytes], tokens: int, server: Server, clients: Any
) -> None:
    server.script(*wire)
    guarded = Guarded(None, ask, clients)
    for _ in guarded.call("alice"):
        pass
    assert tokens <= guarded.settled() <= tokens + 1  # the name of a tool is a fraction of a token


CALL = {"type": "function_call", "id": "i", "call_id": "t", "name": "f", "arguments": "", "status": "in_progress"}
MORE = {"index": 0, "function": {"arguments": CHUNK}}
ARGUMENTS = {"type": "response.function_call_arguments.delta", "item_id": "i", "output_index": 0, "delta": CHUNK}
DERIVED = [
    ("chat: tool arguments", manage_chat, data(*(chat_chunk(tool_calls=[part]) for part in (TOOL, MORE, MORE)))),
    ("chat: refusal", manage_chat, data(*[chat_chunk(refusal=CHUNK)] * 3)),
    (
        "responses: tool arguments",
        manage_responses,
        responses(
            {"type": "response.created", "response": RESPONSE},
            {"type": "response.output_item.added", "output_index": 0, "item": CALL},
            *[ARGUMENTS] * 3,
        ),
    ),
    (
        "anthropic: thoughts",
        manage_anthropic,
        named(ANTHROPIC_START, *block(THOUGHT, [{"type": "thinking_delta", "thinking": CHUNK}] * 3)),
    ),
]


@pytest.mark.parametrize(("ask", "wire"), [row[1:] for row in DERIVED], ids=[row[0] for row in DERIVED])
def test_rule_8_what_a_helper_derives_from_an_event_does_not_count_again(
    ask: Ask, wire: list[bytes], server: Server, clients: Any
) -> None:
    server.script(*wire, end="cut")
    guarded = Guarded(None, ask, clients)
    with (
        pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)),
        guarded.call("alice") as stream,
    ):
        stream.until_done()
    before = 26 if ask is manage_anthropic else 2
    assert before + 30 <= guarded.settled() <= before + 31


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_rule_17_each_end_of_a_response_reports_its_usage(status: str, server: Server, clients: Any) -> None:
    server.script(*responses(*RESPONSES_OPENING, *RESPONSES_TEXTS, response_end(status)))
    guarded = Guarded(RESERVE, ask_responses, clients)
    exhaust(guarded.call("alice"))
    assert guarded.settled() == 57


def test_rule_17_a_count_that_anthropic_leaves_out_keeps_its_earlier_value(server: Server, clients: Any) -> None:
    deltas = [
        {"output_tokens": 5, "input_tokens": None, "cache_read_input_tokens": None},
        {"output_tokens": 46, "input_tokens": 14},
    ]
    events = [{"type": "message_delta", "delta": {"stop_reason": None}, "usage": usage} for usage in deltas]
    server.script(*named(ANTHROPIC_START, *events, {"type": "message_stop"}))
    guarded = Guarded(RESERVE, ask_anthropic, clients)
    for _ in guarded.call("alice"):
        pass
    assert guarded.settled() == 14 + 4 + 8 + 46


# Managers: what yields a stream when it is entered, and makes the request then.


def iterate_inside(manager: Any) -> None:
    with manager as stream:
        exhaust(stream)


def read_two_inside(manager: Any) -> None:
    with manager as stream:
        read_two(stream)


def close_inside(manager: Any) -> None:
    with manager as stream:
        read_two(stream)
        stream.close()


def raise_inside(manager: Any) -> None:
    error = Mine()
    with pytest.raises(Mine) as caught, manager as stream:
        read_two_and_raise(stream, error)
    assert caught.value is error


def enter_and_leave(manager: Any) -> None:
    with manager:
        pass


def until_done_inside(manager: Any) -> None:
    with manager as stream:
        stream.until_done()


def final_inside(manager: Any) -> None:
    with manager as stream:
        if hasattr(stream, "text_stream"):
            assert "".join(stream.text_stream) == CHUNK * 4
            assert stream.get_final_text() == CHUNK * 4
            assert stream.get_final_message().usage.output_tokens == 46
            assert stream.current_message_snapshot.usage.output_tokens == 46
        elif hasattr(stream, "get_final_completion"):
            assert stream.get_final_completion().usage.total_tokens == 55
        else:
            assert stream.get_final_response().usage.total_tokens == 57


def keep_the_stream_alone(manager: Any) -> None:
    stream = manager.__enter__()
    del manager
    gc.collect()
    exhaust(stream)


def drop_inside(manager: Any) -> None:
    read_two(manager.__enter__())


MANAGER_ENDS = [
    (iterate_inside, None),
    (until_done_inside, None),
    (final_inside, None),
    (keep_the_stream_alone, None),
    (read_two_inside, 2),
    (close_inside, 2),
    (raise_inside, 2),
    (drop_inside, 2),
    (enter_and_leave, 0),
]


@each_manager
@pytest.mark.parametrize(("end", "texts"), MANAGER_ENDS)
@with_and_without_reserve
def test_rule_11_the_stream_of_a_manager_is_charged_once_however_it_ends(
    sdk: Sdk, end: Callable[[Any], None], texts: int | None, reserve: int | None, server: Server, clients: Any
) -> None:
    server.script(*sdk.wire)
    guarded = Guarded(reserve, sdk.ask, clients)
    managers = [guarded.call("alice")]
    assert isinstance(managers[0], sdk.kind)
    assert guarded.running()
    end(managers.pop())
    charged = sdk.charged_in_all(reserve) if texts is None else sdk.charged(texts, reserve)
    assert guarded.settled() == charged
    assert guarded.settled() == charged
    assert len(server.requests) == 1


async def iterate_inside_async(manager: Any) -> None:
    async with manager as stream:
        await exhaust_async(stream)


async def read_two_inside_async(manager: Any) -> None:
    async with manager as stream:
        await read_two_async(stream)


async def close_inside_async(manager: Any) -> None:
    async with manager as stream:
        await read_two_async(stream)
        await stream.close()


async def raise_inside_async(manager: Any) -> None:
    error = Mine()
    with pytest.raises(Mine) as caught:
        async with manager as stream:
            await read_two_and_raise_async(stream, error)
    assert caught.value is error


async def cancel_inside(manager: Any) -> None:
    await cancel_the_consumer(Entered(manager))


class Entered:
    """Passes a manager off as its stream, for a consumer that enters and reads it."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager

    async def __aenter__(self) -> Any:
        self.stream = await self.manager.__aenter__()
        return self.stream

    async def __aexit__(self, *error: Any) -> None:
        await self.manager.__aexit__(*error)

    async def __anext__(self) -> Any:
        return await anext(self.stream)


async def enter_and_leave_async(manager: Any) -> None:
    async with manager:
        pass


async def until_done_inside_async(manager: Any) -> None:
    async with manager as stream:
        await stream.until_done()


async def final_inside_async(manager: Any) -> None:
    async with manager as stream:
        if hasattr(stream, "text_stream"):
            assert "".join([text async for text in stream.text_stream]) == CHUNK * 4
            assert await stream.get_final_text() == CHUNK * 4
            assert (await stream.get_final_message()).usage.output_tokens == 46
        elif hasattr(stream, "get_final_completion"):
            assert (await stream.get_final_completion()).usage.total_tokens == 55
        else:
            assert (await stream.get_final_response()).usage.total_tokens == 57


MANAGER_ENDS_ASYNC = [
    (iterate_inside_async, None),
    (until_done_inside_async, None),
    (final_inside_async, None),
    (read_two_inside_async, 2),
    (close_inside_async, 2),
    (raise_inside_async, 2),
    (cancel_inside, 2),
    (enter_and_leave_async, 0),
]


@each_manager
@pytest.mark.parametrize(("end", "texts"), MANAGER_ENDS_ASYNC)
@with_and_without_reserve
async def test_rule_11_the_stream_of_an_async_manager_is_charged_once_however_it_ends(
    sdk: Sdk,
    end: Callable[[Any], Coroutine[Any, Any, None]],
    texts: int | None,
    reserve: int | None,
    server: Server,
    async_clients: Any,
) -> None:
    server.script(*sdk.wire)
    guarded = Guarded(reserve, sdk.ask_async, async_clients)
    managers = [guarded.call("alice")]
    assert isinstance(managers[0], sdk.kind_async)
    assert guarded.running()
    await end(managers.pop())
    await turns()
    charged = sdk.charged_in_all(reserve) if texts is None else sdk.charged(texts, reserve)
    assert guarded.settled() == charged
    assert guarded.settled() == charged
    assert len(server.requests) == 1


@each_manager
def test_rule_8_a_manager_that_was_never_entered_is_not_charged(sdk: Sdk, server: Server, clients: Any) -> None:
    guarded = Guarded(RESERVE, sdk.ask, clients)
    managers = [guarded.call("alice")]
    assert guarded.running()
    managers.pop()
    assert guarded.settled() == 0
    assert server.requests == []


@each_manager
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
async def test_rule_8_an_async_manager_that_was_never_entered_is_not_charged(
    sdk: Sdk, server: Server, async_clients: Any
) -> None:
    guarded = Guarded(RESERVE, sdk.ask, async_clients)
    managers = [guarded.call("alice")]
    assert guarded.running()
    managers.pop()
    assert guarded.settled() == 0
    assert server.requests == []


@each_manager
def test_rule_13_a_manager_whose_request_fails_is_not_charged(sdk: Sdk, server: Server, clients: Any) -> None:
    server.script(b"{}", status=500, kind="application/json")
    guarded = Guarded(RESERVE, sdk.ask, clients)
    manager = guarded.call("alice")
    with pytest.raises((openai.InternalServerError, anthropic.InternalServerError)), manager:
        pass
    assert guarded.settled() == 0
    assert len(server.requests) == 1


@each_manager
async def test_rule_13_an_async_manager_whose_request_fails_is_not_charged(
    sdk: Sdk, server: Server, async_clients: Any
) -> None:
    server.script(b"{}", status=500, kind="application/json")
    guarded = Guarded(RESERVE, sdk.ask, async_clients)
    manager = guarded.call("alice")
    with pytest.raises((openai.InternalServerError, anthropic.InternalServerError)):
        async with manager:
            pass
    assert guarded.settled() == 0
    assert len(server.requests) == 1


@each_manager
@with_and_without_reserve
def test_rule_13_a_managers_stream_that_breaks_in_the_middle_is_charged_what_came(
    sdk: Sdk, reserve: int | None, server: Server, clients: Any
) -> None:
    server.script(*cut_after_two(sdk.wire), end="cut")
    guarded = Guarded(reserve, sdk.ask, clients)
    with (
        pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)),
        guarded.call("alice") as stream,
    ):
        exhaust(stream)
    assert guarded.settled() == sdk.charged(2, reserve)


class Point(BaseModel):
    """What a structured answer is parsed into."""

    x: int


def test_rule_13_a_parsed_stream_that_reaches_its_cap_is_charged_the_text_that_came(
    server: Server, clients: Any
) -> None:
    text = json.dumps({"x": CHUNK * 4})[:-2]
    server.script(*data(chat_chunk(content=text), chat_chunk(finish="length")), DONE)
    guarded = Guarded(
        None,
        lambda clients: clients.openai.chat.completions.stream(model="m", messages=HELLO, response_format=Point),
        clients,
    )
    with pytest.raises(openai.LengthFinishReasonError), guarded.call("alice") as stream:
        stream.until_done()
    assert 42 <= guarded.settled() <= 42 + len('{"x": "')


# Generators and other shapes.


@contextmanager
def google(url: str) -> Iterator[Any]:
    with genai.Client(api_key="k", http_options={"base_url": url}) as client:
        yield client.models.generate_content_stream(model="m", contents="hello")


@contextmanager
def cohere_chat(url: str) -> Iterator[Any]:
    with cohere.ClientV2("k", base_url=url) as client:
        yield client.chat_stream(model="m", messages=HELLO)


@contextmanager
def ollama_chat(url: str) -> Iterator[Any]:
    with ollama.Client(url) as client:
        yield client.chat(model="m", messages=HELLO, stream=True)


@asynccontextmanager
async def google_async(url: str) -> AsyncIterator[Any]:
    async with genai.Client(api_key="k", http_options={"base_url": url}).aio as client:
        yield client.models.generate_content_stream(model="m", contents="hello")


@asynccontextmanager
async def cohere_chat_async(url: str) -> AsyncIterator[Any]:
    async with cohere.AsyncClientV2("k", base_url=url) as client:
        yield client.chat_stream(model="m", messages=HELLO)


@asynccontextmanager
async def ollama_chat_async(url: str) -> AsyncIterator[Any]:
    async with ollama.AsyncClient(url) as client:
        yield client.chat(model="m", messages=HELLO, stream=True)


# Of each: how it is asked, what it sends, and what is charged at its end; then how many items have two texts, and what
# is charged for these. Gemini tells as it goes.
GENERATORS = {
    "google": (google, google_async, GEMINI, "text/event-stream", 15 + 40 + 6, 2, 15 + 20 + 6),
    "cohere": (cohere_chat, cohere_chat_async, COHERE, "text/event-stream", 16 + 49, 3, 22),
    "ollama": (ollama_chat, ollama_chat_async, OLLAMA, "application/x-ndjson", 17 + 50, 2, 22),
}
each_generator = pytest.mark.parametrize("name", GENERATORS)


@each_generator
@pytest.mark.parametrize("whole", [True, False])
def test_rule_17_a_generator_of_an_sdk_is_charged_as_its_provider_means_it(
    name: str, whole: bool, server: Server
) -> None:
    ask, _, wire, kind, total, items, half = GENERATORS[name]
    server.script(*wire, kind=kind)
    with ask(server.url) as answer:
        guarded = Guarded(None, lambda answer: answer, answer)
        stream = guarded.call("alice")
        assert inspect.isgenerator(stream)
        assert guarded.running()
        with closing(stream):
            assert len(list(stream if whole else islice(stream, items))) >= items
        assert guarded.settled() == (total if whole else half)


@each_generator
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession")
async def test_rule_17_an_async_generator_of_an_sdk_is_charged_as_its_provider_means_it(
    name: str, whole: bool, server: Server
) -> None:
    _, ask, wire, kind, total, items, half = GENERATORS[name]
    server.script(*wire, kind=kind)
    async with ask(server.url) as answer:
        guarded = Guarded(None, lambda answer: answer, answer)
        stream = await guarded.call_async("alice")
        assert inspect.isasyncgen(stream)
        assert guarded.running()
        async with aclosing(stream):
            number = 0
            async for _ in stream:
                number += 1
                if number == items and not whole:
                    break
        assert guarded.settled() == (total if whole else half)


def frame(event: str, payload: Any) -> bytes:
    """A message of Amazon's binary event streams."""
    body = json.dumps(payload).encode()
    headers = b""
    for key, value in ((":message-type", "event"), (":event-type", event), (":content-type", "application/json")):
        headers += struct.pack("!B", len(key)) + key.encode() + struct.pack("!BH", 7, len(value)) + value.encode()
    prelude = struct.pack("!II", 16 + len(headers) + len(body), len(headers))
    message = prelude + struct.pack("!I", binascii.crc32(prelude)) + headers + body
    return message + struct.pack("!I", binascii.crc32(message))


BEDROCK = [
    frame("messageStart", {"role": "assistant"}),
    *[frame("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": CHUNK}})] * 4,
    frame("messageStop", {"stopReason": "end_turn"}),
    frame("metadata", {"usage": {"inputTokens": 18, "outputTokens": 51, "totalTokens": 69}}),
]


def exhaust_events(stream: Any) -> None:
    assert len(list(stream)) == 7


def break_and_close_events(stream: Any) -> None:
    events = iter(stream)
    for _ in range(3):
        next(events)
    stream.close()
    stream.close()


def break_and_drop_events(stream: Any) -> None:
    for number, _ in enumerate(stream):
        if number == 2:
            break


@pytest.mark.parametrize(
    ("end", "texts"),
    [
        (exhaust_events, None),
        (break_and_close_events, 2),
        (break_and_drop_events, 2),
        (close_at_once, 0),
        (drop_at_once, 0),
    ],
)
@with_and_without_reserve
@pytest.mark.filterwarnings("ignore:unclosed", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_rule_16_bedrocks_stream_inside_a_dict_is_charged_at_its_end(
    end: Callable[[Any], None], texts: int | None, reserve: int | None, server: Server
) -> None:
    server.script(*BEDROCK, kind="application/vnd.amazon.eventstream")
    client = boto3.client(
        "bedrock-runtime",
        endpoint_url=server.url,
        region_name="us-east-1",
        aws_access_key_id="k",
        aws_secret_access_key="k",
    )
    messages = [{"role": "user", "content": [{"text": "hello"}]}]
    guarded = Guarded(reserve, lambda client: client.converse_stream(modelId="m", messages=messages), client)
    answers = [guarded.call("alice")]
    assert type(answers[0]) is dict
    assert answers[0]["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert type(answers[0]["stream"]).__name__ == "EventStream"
    assert guarded.running()
    end(answers.pop()["stream"])
    client.close()
    if texts is None:
        assert guarded.settled() == 69
    elif reserve is not None:
        assert guarded.settled() == reserve
    else:
        assert guarded.settled() == 2 + 10 * texts


class CustomStreamWrapper:
    """Sync and async in one class, as LiteLLM's is."""

    def __init__(self, chunks: list[Any]) -> None:
        self.chunks = iter(chunks)
        self.model = "m"

    def __iter__(self) -> CustomStreamWrapper:
        return self

    def __aiter__(self) -> CustomStreamWrapper:
        return self

    def __next__(self) -> Any:
        return next(self.chunks)

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        try:
            return next(self.chunks)
        except StopIteration:
            raise StopAsyncIteration from None


def chunks() -> list[Any]:
    texts = [ChatCompletionChunk.model_validate(chat_chunk(content=CHUNK)) for _ in range(4)]
    return [*texts, ChatCompletionChunk.model_validate({**chat_chunk(), "choices": [], "usage": CHAT_USAGE})]


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("whole", [True, False])
async def test_a_stream_that_is_sync_and_async_in_one_is_charged_either_way(is_async: bool, whole: bool) -> None:
    guarded = Guarded(None, CustomStreamWrapper, chunks())
    stream = await guarded.call_async("alice") if is_async else guarded.call("alice")
    assert isinstance(stream, CustomStreamWrapper)
    assert stream.model == "m"
    if is_async and whole:
        await exhaust_async(item async for item in stream if item.choices)
    elif is_async:
        await read_two_async(stream)
    elif whole:
        exhaust(item for item in stream if item.choices)
    else:
        read_two(stream)
    assert guarded.running() == (not whole)
    del stream
    assert guarded.settled() == (55 if whole else 22)


# LangChain's chat models, whose `stream` and `astream` are generators of chunks that add up.


class Talker(BaseChatModel):
    """A chat model that says four chunks, of which the first tells what was read and each what was written."""

    @property
    def _llm_type(self) -> str:
        return "talker"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        usage: Any = {"input_tokens": 19, "output_tokens": 52, "total_tokens": 71}
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content=CHUNK, usage_metadata=usage))])

    def _stream(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        for number in range(4):
            read = 19 if number == 0 else 0
            usage: Any = {"input_tokens": read, "output_tokens": 13, "total_tokens": read + 13}
            yield ChatGenerationChunk(message=AIMessageChunk(content=CHUNK, usage_metadata=usage))


@pytest.mark.parametrize("whole", [True, False])
async def test_rule_17_the_chunks_of_langchain_add_up(whole: bool) -> None:
    model = Talker()
    guarded = Guarded(RESERVE, lambda model: model.stream("hello"), model)
    with closing(guarded.call("alice")) as stream:
        assert len(list(stream if whole else islice(stream, 2))) >= 2
    assert guarded.settled() == (71 if whole else 45)
    guarded = Guarded(RESERVE, lambda model: model.astream("hello"), model)
    async with aclosing(guarded.call("alice")) as items:
        number = 0
        async for _ in items:
            number += 1
            if number == 2 and not whole:
                break
    assert guarded.settled() == (71 if whole else 45)


async def test_rule_8_a_call_of_langchain_is_charged_what_its_message_tells() -> None:
    model = Talker()
    guarded = Guarded(RESERVE, lambda model: model.invoke("hello"), model)
    guarded.call("alice")
    assert guarded.settled() == 71
    guarded = Guarded(RESERVE, lambda model: model.ainvoke("hello"), model)
    await guarded.call_async("alice")
    assert guarded.settled() == 71


# Answers that are handed on as they came.

RAW: list[tuple[Ask, dict[str, Any], int]] = [
    (
        lambda clients: clients.openai.chat.completions.with_raw_response.create(model="m", messages=HELLO),
        {"id": "c", "object": "chat.completion", "choices": [], "usage": CHAT_USAGE},
        55,
    ),
    (
        lambda clients: clients.openai.responses.with_raw_response.create(model="m", input="hello"),
        {**RESPONSE, "status": "completed", "usage": RESPONSES_USAGE},
        57,
    ),
    (
        lambda clients: clients.anthropic.messages.with_raw_response.create(model="m", max_tokens=9, messages=HELLO),
        {"id": "m", "type": "message", "content": [], "usage": {**ANTHROPIC_USAGE, "output_tokens": 46}},
        71,
    ),
]


@pytest.mark.parametrize(("ask", "wire", "total"), RAW, ids=["chat", "responses", "anthropic"])
async def test_rule_8_a_raw_response_is_charged_what_its_body_tells(
    ask: Ask, wire: dict[str, Any], total: int, server: Server, clients: Any, async_clients: Any
) -> None:
    server.script(json.dumps(wire).encode(), kind="application/json")
    guarded = Guarded(RESERVE, ask, clients)
    assert guarded.call("alice").http_response.json() == wire
    assert guarded.settled() == total
    guarded = Guarded(RESERVE, ask, async_clients)
    await guarded.call_async("alice")
    assert guarded.settled() == total


@pytest.mark.parametrize("is_read", [True, False])
def test_rule_8_a_response_whose_body_is_read_later_is_charged_what_it_tells_else_its_reserve(
    is_read: bool, server: Server, clients: Any
) -> None:
    server.script(json.dumps(RAW[0][1]).encode(), kind="application/json")
    guarded = Guarded(
        RESERVE,
        lambda clients: clients.openai.chat.completions.with_streaming_response.create(model="m", messages=HELLO),
        clients,
    )
    with guarded.call("alice") as response:
        assert not is_read or response.parse().usage.total_tokens == 55
    assert guarded.settled() == (55 if is_read else RESERVE)


# Against a mock server that was written by others.


@pytest.mark.parametrize("sdk", [STREAMS[0], STREAMS[2], STREAMS[3], *MANAGERS[1:]], ids=lambda sdk: sdk.name)
def test_rule_17_streams_of_a_mock_server_are_charged_what_they_report(sdk: Sdk, llmock: LLMock) -> None:
    with openai.OpenAI(max_retries=0) as gpt, anthropic.Anthropic(max_retries=0) as claude:
        guarded = Guarded(5_000, sdk.ask, SimpleNamespace(openai=gpt, anthropic=claude))
        opened = guarded.call("alice")
        if sdk in MANAGERS:
            with opened as stream:
                items = list(stream)
        else:
            items = list(opened)
    assert guarded.settled() == tokens_told(items) > 1


def tokens_told(items: list[Any]) -> int:
    """The usage in a stream of OpenAI or Anthropic, read from the wire's own fields."""
    read = written = 0
    for item in items:
        holder = getattr(item, "response", None) or getattr(item, "message", None) or item
        usage = getattr(holder, "usage", None)
        if usage is not None:
            fields = usage.model_dump()
            read = fields.get("prompt_tokens") or fields.get("input_tokens") or read
            written = fields.get("completion_tokens") or fields.get("output_tokens") or written
    return read + written


# Ten thousand streams that nobody reads to the end.


def test_rule_11_ten_thousand_abandoned_streams_leave_no_hold_and_no_memory(clients: Any) -> None:
    body = b"".join(CHAT_WITHOUT_USAGE)

    def make(client: Any) -> Any:
        return openai.Stream(cast_to=ChatCompletionChunk, response=httpx2.Response(200, content=body), client=client)

    guarded = Guarded(7, make, clients.openai)

    def abandon(times: int) -> int:
        for number in range(times):
            stream = guarded.call("alice")
            if number % 2:
                next(stream)
        del stream
        gc.collect()
        return len(gc.get_objects())

    before = abandon(100)
    assert abandon(10_000) < before + 100
    assert guarded.settled() == 10_100 * 7


def test_rule_11_ten_thousand_abandoned_async_streams_leave_no_hold_and_no_memory() -> None:
    guarded = Guarded(7, CustomStreamWrapper, chunks())

    async def abandon(times: int) -> int:
        for number in range(times):
            stream = await guarded.call_async("alice")
            if number % 2:
                await anext(stream)
        del stream
        await turns()
        return len(gc.get_objects())

    async def main() -> tuple[int, int]:
        return await abandon(100), await abandon(10_000)

    before, after = asyncio.run(main())
    assert after < before + 100
    assert guarded.settled() == 10_100 * 7


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_rule_8_ten_thousand_managers_that_were_never_entered_leave_nothing(clients: Any) -> None:
    guarded = Guarded(7, manage_anthropic, clients)

    def abandon(times: int) -> int:
        for _ in range(times):
            guarded.call("alice")
        gc.collect()
        return len(gc.get_objects())

    before = abandon(100)
    assert abandon(10_000) < before + 100
    assert guarded.settled() == 0


# A stream that is very long.


class Chunk(dict[str, Any]):
    """An item off the wire of which one can see whether it is still alive."""


def test_rule_17_a_hundred_thousand_chunks_that_tell_usage_do_not_pile_up() -> None:
    """As vLLM's continuous_usage_stats has it: each tells the running total."""
    budget = TokenBudget("1_000_000/day")
    alive: WeakValueDictionary[int, Chunk] = WeakValueDictionary()

    @token_budget(budget, key="user", reserve=RESERVE)
    def stream(user: str) -> Iterator[Chunk]:
        for number in range(1, 100_001):
            alive[number] = chunk = Chunk(id="c", usage={"prompt_tokens": 9, "completion_tokens": number})
            yield chunk

    most = 0
    for _ in stream("alice"):
        most = max(most, len(alive))
    assert most <= 110
    assert (used(budget), open_holds(budget)) == (100_009, 0)


def test_rule_8_an_item_of_a_long_stream_that_is_recorded_after_it_was_yielded_counts_once() -> None:
    budget = TokenBudget("1_000_000/day")

    @token_budget(budget, key="user", reserve=RESERVE)
    def stream(user: str) -> Iterator[Chunk]:
        for number in range(1, 1_001):
            chunk = Chunk(id="c", usage={"prompt_tokens": 9, "completion_tokens": number})
            yield chunk
            record_usage(chunk)

    assert len(list(stream("alice"))) == 1_000
    assert used(budget) == 1_009


async def test_rule_12_a_long_stream_inside_another_call_is_charged_once() -> None:
    outer, inner = TokenBudget("1_000_000/day"), TokenBudget("1_000_000/day")

    @token_budget(inner, key="user", reserve=RESERVE)
    def stream(user: str) -> Iterator[Chunk]:
        for number in range(1, 1_001):
            yield Chunk(id="c", usage={"prompt_tokens": 9, "completion_tokens": number})

    @token_budget(outer, key="user", reserve=RESERVE)
    def agent(user: str) -> Chunk:
        return [*stream(user)][-1]

    agent("alice")
    assert (used(outer), used(inner)) == (1_009, 1_009)
