"""LiteLLM's own objects, whole and in streams, sync and async, over HTTP from what each provider sends (rules 8 to 17).

It makes its objects of the wire of others: what is charged is that wire's numbers, whatever LiteLLM makes of them.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import pytest

from quotalimit import Settlement, TokenBudget, Usage, collect_decisions, estimate_tokens, read_usage, token_budget

from ..helpers import open_holds, used
from .server import Server
from .test_sdk_streams import ANTHROPIC, CHAT, CHAT_WITHOUT_USAGE, HELLO

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the internet for prices
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import litellm
    from litellm.types.llms.openai import ResponsesAPIResponse

RESERVE = 500

pytestmark = [
    pytest.mark.usefixtures("time"),
    pytest.mark.filterwarnings("ignore"),  # LiteLLM's own, of many kinds
]


@pytest.fixture(autouse=True)
async def no_client_of_another_loop() -> AsyncIterator[None]:
    """LiteLLM keeps its clients, whose connections belong to the event loop of one test."""
    litellm.in_memory_llm_clients_cache.flush_cache()
    litellm.disable_aiohttp_transport = True
    yield
    litellm.in_memory_llm_clients_cache.flush_cache()


CHAT_ANSWER = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"}],
    "usage": {
        "prompt_tokens": 1200, "completion_tokens": 300, "total_tokens": 1500,
        "prompt_tokens_details": {"cached_tokens": 1000}, "completion_tokens_details": {"reasoning_tokens": 200},
    },
}  # fmt: skip
ANTHROPIC_ANSWER = {
    "id": "m", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn", "stop_sequence": None,
    "content": [{"type": "text", "text": "Hello."}],
    "usage": {
        "input_tokens": 10, "cache_creation_input_tokens": 200, "cache_read_input_tokens": 3000, "output_tokens": 50,
    },
}  # fmt: skip
RESPONSES_ANSWER = {
    "id": "r", "object": "response", "created_at": 1, "model": "m", "status": "completed", "parallel_tool_calls": True,
    "tool_choice": "auto", "tools": [], "output": [],
    "usage": {
        "input_tokens": 500, "output_tokens": 80, "total_tokens": 580, "input_tokens_details": {"cached_tokens": 400},
        "output_tokens_details": {"reasoning_tokens": 64},
    },
}  # fmt: skip
EMBEDDINGS = {
    "object": "list", "model": "m", "data": [{"object": "embedding", "index": 0, "embedding": [0.25, 0.5]}],
    "usage": {"prompt_tokens": 8, "total_tokens": 8},
}  # fmt: skip

Ask = Callable[..., Any]


class Case(NamedTuple):
    """What is asked of LiteLLM, sync and async, what the provider sends, and the tokens that this reports."""

    name: str
    ask: Ask
    ask_async: Ask
    options: dict[str, Any]
    wire: list[bytes]
    total: int

    @property
    def is_stream(self) -> bool:
        return "stream" in self.options


def case(name: str, kind: str, wire: Any, total: int, **options: Any) -> Case:
    is_json = isinstance(wire, dict)
    wire = [json.dumps(wire).encode()] if is_json else wire
    return Case(name, getattr(litellm, kind), getattr(litellm, f"a{kind}"), options, wire, total)


TO_OPENAI = {"model": "openai/m", "messages": HELLO}
TO_ANTHROPIC = {"model": "anthropic/m", "messages": HELLO}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}

CASES = [
    case("OpenAI chat", "completion", CHAT_ANSWER, 1500, **TO_OPENAI),
    case("Anthropic", "completion", ANTHROPIC_ANSWER, 10 + 200 + 3000 + 50, **TO_ANTHROPIC),
    case("OpenAI embeddings", "embedding", EMBEDDINGS, 8, model="openai/m", input=["hello"]),
    case("OpenAI chat, streamed", "completion", CHAT, 55, **TO_OPENAI, **STREAM),
    case("Anthropic, streamed", "completion", ANTHROPIC, 71, **TO_ANTHROPIC, **STREAM),
]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_stream = pytest.mark.parametrize(
    "case", [case for case in CASES if case.is_stream], ids=[case.name for case in CASES if case.is_stream]
)


class Guarded:
    """A budget and the functions that it guards, sync and async: each returns what LiteLLM gives."""

    def __init__(self, case: Case, server: Server, reserve: Any = RESERVE) -> None:
        kind = "text/event-stream" if case.is_stream else "application/json"
        server.script(*case.wire, kind=kind)
        options = {**case.options, "api_base": server.url, "api_key": "k", "num_retries": 0, "max_retries": 0}
        self.budget = TokenBudget("1_000_000/day")
        decorate = token_budget(self.budget, key="user", reserve=reserve)

        @decorate
        def call(user: str) -> Any:
            return case.ask(**options)

        @decorate
        async def call_async(user: str) -> Any:
            return await case.ask_async(**options)

        self.call = call
        self.call_async = call_async

    def settled(self) -> int:
        for _ in range(1_000):
            gc.collect()
            if not open_holds(self.budget):
                break
            threading.Event().wait(0.01)  # LiteLLM's logging threads still have the stream
        assert open_holds(self.budget) == 0
        return used(self.budget)


@every_case
def test_a_call_is_charged_what_the_wire_reports(case: Case, server: Server) -> None:
    guarded = Guarded(case, server)
    with collect_decisions() as seen:
        answer = guarded.call("alice")
        if case.is_stream:
            assert isinstance(answer, litellm.CustomStreamWrapper)
            assert open_holds(guarded.budget) == 1
            list(answer)
    assert guarded.settled() == case.total
    assert isinstance(seen[0].settlement, Settlement)
    assert seen[0].settlement.source == "reported"


@every_case
async def test_an_async_call_is_charged_what_the_wire_reports(case: Case, server: Server) -> None:
    guarded = Guarded(case, server)
    answer = await guarded.call_async("alice")
    if case.is_stream:
        assert isinstance(answer, litellm.CustomStreamWrapper)
        assert open_holds(guarded.budget) == 1
        async for _ in answer:
            pass
    assert guarded.settled() == case.total


def test_a_response_of_its_own_is_read() -> None:
    """`litellm.responses` wants packages that LiteLLM does not come with; this is what it makes of OpenAI's wire."""
    assert read_usage(ResponsesAPIResponse(**RESPONSES_ANSWER)) == Usage(500, 80, 400, 0, 64, 580)


@every_stream
def test_rule_11_an_abandoned_stream_is_charged_and_leaves_no_hold(case: Case, server: Server) -> None:
    guarded = Guarded(case, server)
    stream = guarded.call("alice")
    next(stream)
    assert open_holds(guarded.budget) == 1
    del stream
    assert guarded.settled() == RESERVE


@every_stream
async def test_rule_11_an_abandoned_async_stream_is_charged_and_leaves_no_hold(case: Case, server: Server) -> None:
    guarded = Guarded(case, server)
    stream = await guarded.call_async("alice")
    await anext(stream)
    assert open_holds(guarded.budget) == 1
    del stream
    await asyncio.sleep(0)
    assert guarded.settled() == RESERVE


def test_rule_8_a_stream_that_was_not_asked_for_usage_is_charged_its_reserve(server: Server) -> None:
    silent = case("", "completion", CHAT_WITHOUT_USAGE, RESERVE, **TO_OPENAI, stream=True)
    guarded = Guarded(silent, server)
    list(guarded.call("alice"))
    assert guarded.settled() == RESERVE


def test_rule_8_with_no_reserve_it_is_charged_the_text_that_came(server: Server) -> None:
    silent = case("", "completion", CHAT_WITHOUT_USAGE, 42, **TO_OPENAI, stream=True)
    guarded = Guarded(silent, server, None)
    list(guarded.call("alice"))
    assert guarded.settled() == 2 + 40


@pytest.mark.parametrize(
    ("status", "charged"), [(400, 0), (401, 0), (429, 0), (500, 0), (503, 0), (408, RESERVE), (504, RESERVE)]
)
def test_rule_13_a_call_that_fails_is_charged_if_the_provider_may_have_billed(
    status: int, charged: int, server: Server
) -> None:
    guarded = Guarded(CASES[0], server)
    server.script(b"{}", status=status, kind="application/json")
    with pytest.raises(litellm.exceptions.openai.OpenAIError):
        guarded.call("alice")
    assert guarded.settled() == charged


def test_rule_13_a_call_that_times_out_keeps_its_hold(server: Server) -> None:
    timed = CASES[0]._replace(options={**CASES[0].options, "timeout": 0.05})
    guarded = Guarded(timed, server)
    server.script(end="hang")
    with pytest.raises(litellm.Timeout):
        guarded.call("alice")
    assert guarded.settled() == RESERVE


def test_rule_7_the_arguments_of_a_call_are_estimated(server: Server) -> None:
    def call(user: str, **options: Any) -> None:
        assert used(budget) == estimate_tokens(user, **options)

    budget = TokenBudget("1_000_000/day")
    token_budget(budget, key="user", reserve=estimate_tokens)(call)("alice", **TO_OPENAI, max_tokens=100)
