"""Agents of SDKs, which ask models several times and run tools in between, are charged for all of it (rules 8, 12)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import beta_async_tool, beta_tool
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel

from quotalimit import TokenBudget, record_usage, token_budget

from ..helpers import open_holds, used

pytestmark = pytest.mark.usefixtures("time", "small_heap")

TEXT = {"type": "text", "text": "done"}
TOOL = {"type": "tool_use", "name": "look_up", "input": {"name": "x"}}


def messages() -> Iterator[dict[str, Any]]:
    """What the model answers: two calls of a tool, and a text. Each is 120 tokens."""
    for number, block in enumerate((TOOL, TOOL, TEXT)):
        yield {
            "id": f"m{number}", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None,
            "content": [{**block, "id": f"t{number}"} if block is TOOL else block],
            "stop_reason": "tool_use" if block is TOOL else "end_turn",
            "usage": {"input_tokens": 100, "output_tokens": 20},
        }  # fmt: skip


def events(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same as a stream."""
    (block,) = message["content"]
    usage = {"input_tokens": 100, "output_tokens": 1}
    yield {"type": "message_start", "message": {**message, "content": [], "stop_reason": None, "usage": usage}}
    if block["type"] == "text":
        start, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
    else:
        start = {**block, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
    yield {"type": "content_block_start", "index": 0, "content_block": start}
    yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    end = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": end, "usage": {"output_tokens": 20}}
    yield {"type": "message_stop"}


class Model:
    """Answers requests, sync and async."""

    def __init__(self) -> None:
        self.messages = messages()

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        message = next(self.messages)
        if not json.loads(request.content).get("stream"):
            return httpx2.Response(200, json=message)
        wire = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events(message))
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=wire.encode())

    async def answer_async(self, request: httpx2.Request) -> httpx2.Response:
        return self.answer(request)


class Nested:
    """A budget, an agent on it, and a limited function that its tools call."""

    def __init__(self) -> None:
        self.budget = TokenBudget("1000/day")
        self.recorded: list[bool] = []
        self.ask = token_budget(self.budget, key="user", reserve=100)(lambda user: record_usage(10))

    def work(self) -> str:
        """What a tool does: it asks a model, and reports what it used besides."""
        self.ask("alice")
        self.recorded.append(record_usage(5))
        return "found"

    def agent(self, make: Callable[[], Any]) -> Any:
        return token_budget(self.budget, key="user", reserve=1000)(lambda user: make())("alice")

    def settled(self) -> int:
        assert open_holds(self.budget) == 0
        assert self.recorded == [True, True]
        return used(self.budget)


ASKED: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("streaming", [False, True])
def test_rule_12_the_tools_of_a_runner_are_inside_the_call_that_returned_it(streaming: bool) -> None:
    nested = Nested()

    @beta_tool
    def look_up(name: str) -> str:
        """Look something up."""
        return nested.work()

    http = httpx2.Client(transport=httpx2.MockTransport(Model().answer))
    client = anthropic.Anthropic(api_key="k", max_retries=0, http_client=http)
    runner = nested.agent(lambda: client.beta.messages.tool_runner(tools=[look_up], stream=streaming, **ASKED))
    for item in runner:
        assert not streaming or list(item)
    assert nested.settled() == 3 * 120 + 2 * 15


@pytest.mark.parametrize("streaming", [False, True])
async def test_rule_12_the_tools_of_an_async_runner_are_inside_the_call_that_returned_it(streaming: bool) -> None:
    nested = Nested()

    @beta_async_tool
    async def look_up(name: str) -> str:
        """Look something up."""
        return nested.work()

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(Model().answer_async))
    client = anthropic.AsyncAnthropic(api_key="k", max_retries=0, http_client=http)
    runner = nested.agent(lambda: client.beta.messages.tool_runner(tools=[look_up], stream=streaming, **ASKED))
    async for item in runner:
        assert not streaming or [event async for event in item]
    assert nested.settled() == 3 * 120 + 2 * 15


async def stream_text(stream: Any) -> Any:
    async for _ in stream.stream_text():
        pass
    return stream.usage


async def run_nodes(run: Any) -> Any:
    async for _ in run:
        pass
    return run.usage


async def run_by_hand(run: Any) -> Any:
    node = run.next_node
    while not hasattr(node, "data"):
        node = await run.next(node)
    return run.usage


async def see_events(stream: Any) -> Any:
    return [event async for event in stream][-1].result.usage


@pytest.mark.parametrize(
    ("method", "use"),
    [
        ("run_stream", stream_text),
        ("iter", run_nodes),
        ("iter", run_by_hand),
        ("run_stream_events", see_events),
    ],
)
async def test_rule_8_a_run_of_pydantic_ai_is_charged_what_it_tells(
    method: str, use: Callable[[Any], Awaitable[Any]]
) -> None:
    budget = TokenBudget("1000/day")
    agent = Agent(TestModel(custom_output_text="hello " * 20))
    run = token_budget(budget, key="user", reserve=500)(lambda user: getattr(agent, method)("hi"))
    async with run("alice") as entered:
        usage = await use(entered)
    assert usage.output_tokens > 10
    assert (open_holds(budget), used(budget)) == (0, usage.total_tokens)


@pytest.fixture
def own_loop() -> Iterator[None]:
    """An event loop for what would make one, and leave it open."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.usefixtures("own_loop")
def test_rule_8_a_sync_stream_of_pydantic_ai_is_charged_what_it_tells() -> None:
    budget = TokenBudget("1000/day")
    agent = Agent(TestModel(custom_output_text="hello " * 20))
    with token_budget(budget, key="user", reserve=500)(lambda user: agent.run_stream_sync("hi"))("alice") as stream:
        list(stream.stream_text())
    assert (open_holds(budget), used(budget)) == (0, stream.usage.total_tokens)


class StreamInfo(BaseModel):
    """What a model made, and no stream."""

    title: str
    usage: dict[str, int]


def test_rule_8_a_model_of_pydantic_is_settled_at_once_though_it_is_called_a_stream() -> None:
    budget = TokenBudget("1000/day")
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    info = token_budget(budget, key="user")(lambda user: StreamInfo(title="x", usage=usage))("alice")
    assert type(info) is StreamInfo
    assert info.model_dump() == {"title": "x", "usage": usage}
    assert (open_holds(budget), used(budget)) == (0, 12)
