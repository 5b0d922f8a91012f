"""Usage of every SDK: its own objects and the same wire as plain dicts, whole and in streams (rules 8, 10 and 17).

Each SDK builds its objects from the wire itself. What is expected was computed by hand from the wire's numbers and what
the provider documents: every token processed, each once.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from unittest.mock import MagicMock, Mock, NonCallableMagicMock, create_autospec

import anthropic.types
import anthropic.types.beta
import botocore.session
import cohere
import cohere.v2.types
import langchain_core.messages
import ollama
import openai.types
import openai.types.chat
import openai.types.responses
import pydantic
import pytest
from anthropic._models import construct_type as anthropic_construct
from botocore.parsers import create_parser
from cohere.core.unchecked_base_model import construct_type as cohere_construct
from google.genai import types as genai
from hypothesis import given, settings
from hypothesis import strategies as st
from mistralai.client import models as mistral
from openai._models import construct_type as openai_construct
from pydantic_ai._agent_graph import GraphAgentState
from pydantic_ai.run import AgentRunResult
from pydantic_ai.usage import RunUsage

from quotalimit import (
    Settlement,
    TokenBudget,
    Usage,
    collect_decisions,
    read_usage,
    record_usage,
    token_budget,
)

from ..helpers import open_holds, shown, used

Wire = dict[str, Any]
Build = Callable[[Any], Any]
RESERVE = 50


# How each SDK makes its objects of a wire response.


def by_openai(kind: Any) -> Build:
    return lambda wire: openai_construct(value=wire, type_=kind)


def by_anthropic(kind: Any) -> Build:
    return lambda wire: anthropic_construct(value=wire, type_=kind)


def by_cohere(kind: Any) -> Build:
    return lambda wire: cohere_construct(type_=kind, object_=wire)


def by_pydantic(kind: Any) -> Build:
    return lambda wire: kind.model_validate(wire)


def by_langchain(kind: Any) -> Build:
    return lambda wire: kind(**wire)


@functools.cache
def converse() -> Any:
    """What boto3 knows of the answers of Bedrock's converse."""
    service = botocore.session.get_session().get_service_model("bedrock-runtime")
    return service.operation_model("Converse").output_shape


def by_boto(wire: Wire) -> Any:
    answer = {"body": json.dumps(wire).encode(), "headers": {}, "status_code": 200}
    return create_parser("rest-json").parse(answer, converse())


def by_pydantic_ai(wire: Wire) -> Any:
    return AgentRunResult(output=wire["output"], _state=GraphAgentState(usage=RunUsage(**wire["usage"])))


def as_it_is(wire: Wire) -> Wire:
    return wire


# Whole responses. Where the wire has an id it is ID.

ID = "id-of-the-first"


def openai_chat(**usage: Any) -> Wire:
    message = {"role": "assistant", "content": "Hello."}
    choices = [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
    return {"id": ID, "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage}


def openai_responses(tool_usage: Wire | None = None, **usage: Any) -> Wire:
    content = [{"type": "output_text", "text": "Hello.", "annotations": []}]
    output = [{"type": "message", "id": "msg", "role": "assistant", "status": "completed", "content": content}]
    wire = {"id": ID, "object": "response", "created_at": 1, "model": "m", "output": output, "usage": usage}
    return wire if tool_usage is None else {**wire, "tool_usage": tool_usage}


def openai_embeddings(**usage: Any) -> Wire:
    data = [{"object": "embedding", "index": 0, "embedding": [0.25, 0.5]}]
    return {"object": "list", "model": "m", "data": data, "usage": usage}


def anthropic_message(**usage: Any) -> Wire:
    content = [{"type": "text", "text": "Hello."}]
    message = {"id": ID, "type": "message", "role": "assistant", "model": "m", "content": content}
    return {**message, "stop_reason": "end_turn", "stop_sequence": None, "usage": usage}


def iteration(kind: str, tokens_in: int, tokens_out: int, read: int = 0, written: int = 0) -> Wire:
    caches = {"cache_read_input_tokens": read, "cache_creation_input_tokens": written, "cache_creation": None}
    return {"type": kind, "model": "m", "input_tokens": tokens_in, "output_tokens": tokens_out, **caches}


def gemini(**usage: Any) -> Wire:
    candidates = [{"content": {"role": "model", "parts": [{"text": "Hello."}]}, "finishReason": "STOP", "index": 0}]
    return {"candidates": candidates, "modelVersion": "m", "responseId": ID, "usageMetadata": usage}


def bedrock(**usage: Any) -> Wire:
    message = {"role": "assistant", "content": [{"text": "Hello."}]}
    return {"output": {"message": message}, "stopReason": "end_turn", "metrics": {"latencyMs": 900}, "usage": usage}


def mistral_embeddings(**usage: Any) -> Wire:
    return {"id": ID, "object": "list", "model": "m", "usage": usage, "data": []}


def cohere_chat(**usage: Any) -> Wire:
    message = {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}
    return {"id": ID, "finish_reason": "COMPLETE", "message": message, "usage": usage}


def cohere_embed(**meta: Any) -> Wire:
    meta = {"api_version": {"version": "2"}, **meta}
    return {
        "response_type": "embeddings_by_type",
        "id": ID,
        "embeddings": {"float": [[0.25]]},
        "texts": [],
        "meta": meta,
    }


def langchain(**usage: Any) -> Wire:
    return {"content": "Hello.", "id": ID, "usage_metadata": usage}


def ollama_chat(**counts: Any) -> Wire:
    message = {"role": "assistant", "content": "Hello."}
    durations = {"total_duration": 9_000, "load_duration": 7, "prompt_eval_duration": 11, "eval_duration": 13}
    return {"model": "m", "created_at": "2026-11-23T12:00:00Z", "message": message, "done": True, **durations, **counts}


def ollama_generate(**counts: Any) -> Wire:
    return {"model": "m", "created_at": "2026-11-23T12:00:00Z", "response": "Hello.", "done": True, **counts}


def ollama_embed(**counts: Any) -> Wire:
    return {"model": "m", "embeddings": [[0.25]], "total_duration": 9_000, "load_duration": 7, **counts}


def pydantic_ai_run(**usage: Any) -> Wire:
    return {"output": "Hello.", "usage": usage}


class Case(NamedTuple):
    """One response on the wire, how its SDK reads it, and what was used.

    The usage is (input, output, cache read, cache write, reasoning, total).
    """

    name: str
    build: Build
    wire: Wire
    usage: tuple[int, int, int, int, int, int]


CHAT = by_openai(openai.types.chat.ChatCompletion)
RESPONSE = by_openai(openai.types.responses.Response)
EMBEDDINGS = by_openai(openai.types.CreateEmbeddingResponse)
MESSAGE = by_anthropic(anthropic.types.Message)
BETA_MESSAGE = by_anthropic(anthropic.types.beta.BetaMessage)
GEMINI = by_pydantic(genai.GenerateContentResponse)
MISTRAL = by_pydantic(mistral.ChatCompletionResponse)
MISTRAL_EMBEDDINGS = by_pydantic(mistral.EmbeddingResponse)
COHERE = by_cohere(cohere.v2.types.V2ChatResponse)
COHERE_EMBED = by_cohere(cohere.EmbedByTypeResponse)
AI_MESSAGE = by_langchain(langchain_core.messages.AIMessage)

CASES = [
    Case(
        "OpenAI chat",
        CHAT,
        openai_chat(
            prompt_tokens=1200,
            completion_tokens=300,
            total_tokens=1500,
            prompt_tokens_details={"cached_tokens": 1000, "cache_write_tokens": 100, "audio_tokens": 3},
            completion_tokens_details={
                "reasoning_tokens": 200,
                "accepted_prediction_tokens": 5,
                "rejected_prediction_tokens": 7,
                "audio_tokens": 2,
            },
        ),
        (1200, 300, 1000, 100, 200, 1500),
    ),
    Case(
        "OpenAI chat, no details",
        CHAT,
        openai_chat(prompt_tokens=9, completion_tokens=12, total_tokens=21),
        (9, 12, 0, 0, 0, 21),
    ),
    Case(
        "OpenAI Responses",
        RESPONSE,
        openai_responses(
            input_tokens=500,
            output_tokens=80,
            total_tokens=580,
            input_tokens_details={"cached_tokens": 400, "cache_write_tokens": 50},
            output_tokens_details={"reasoning_tokens": 64},
        ),
        (500, 80, 400, 50, 64, 580),
    ),
    Case(
        "OpenAI Responses with a hosted tool's images",
        RESPONSE,
        openai_responses(
            {
                "image_gen": {
                    "input_tokens": 30,
                    "input_tokens_details": {"image_tokens": 10, "text_tokens": 20},
                    "output_tokens": 4000,
                    "total_tokens": 4030,
                },
                "web_search": {"num_requests": 2},
            },
            input_tokens=500,
            output_tokens=80,
            total_tokens=580,
            input_tokens_details={"cached_tokens": 0, "cache_write_tokens": 0},
            output_tokens_details={"reasoning_tokens": 64},
        ),
        (530, 4080, 0, 0, 64, 4610),
    ),
    Case(
        "OpenAI embeddings",
        EMBEDDINGS,
        openai_embeddings(prompt_tokens=8, total_tokens=8),
        (8, 0, 0, 0, 0, 8),
    ),
    Case(
        "Anthropic",
        MESSAGE,
        anthropic_message(
            input_tokens=10,
            cache_creation_input_tokens=200,
            cache_read_input_tokens=3000,
            cache_creation={"ephemeral_5m_input_tokens": 150, "ephemeral_1h_input_tokens": 50},
            output_tokens=50,
            output_tokens_details={"thinking_tokens": 30},
            server_tool_use={"web_search_requests": 1, "web_fetch_requests": 0},
            service_tier="standard",
        ),
        (3210, 50, 3000, 200, 30, 3260),
    ),
    Case(
        "Anthropic, no caches",
        MESSAGE,
        anthropic_message(input_tokens=25, output_tokens=15, output_tokens_details={"thinking_tokens": 10}),
        (25, 15, 0, 0, 10, 40),
    ),
    Case(  # "A `compaction` entry's tokens are not included in the top-level `usage` fields": BetaUsage.iterations
        "Anthropic beta with compaction",
        BETA_MESSAGE,
        anthropic_message(
            input_tokens=20,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=100,
            output_tokens=40,
            iterations=[iteration("compaction", 5000, 300, written=700), iteration("message", 20, 40, read=100)],
        ),
        (5820, 340, 100, 700, 0, 6160),
    ),
    Case(  # "Advisor tokens are not rolled into the top-level totals": Anthropic's page on the advisor tool
        "Anthropic beta with an advisor",
        BETA_MESSAGE,
        anthropic_message(
            input_tokens=412,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=0,
            output_tokens=531,
            iterations=[iteration("message", 412, 531), iteration("advisor_message", 823, 1612)],
        ),
        (1235, 2143, 0, 0, 0, 3378),
    ),
    Case(
        "Gemini",
        GEMINI,
        gemini(
            promptTokenCount=100,
            candidatesTokenCount=40,
            thoughtsTokenCount=300,
            toolUsePromptTokenCount=20,
            cachedContentTokenCount=64,
            totalTokenCount=460,
            promptTokensDetails=[{"modality": "TEXT", "tokenCount": 100}],
        ),
        (120, 340, 64, 0, 300, 460),
    ),
    Case(
        "Gemini, no candidates",
        GEMINI,
        gemini(promptTokenCount=7, totalTokenCount=7),
        (7, 0, 0, 0, 0, 7),
    ),
    Case(
        "Bedrock",
        by_boto,
        bedrock(inputTokens=10, outputTokens=20, totalTokens=590, cacheReadInputTokens=500, cacheWriteInputTokens=60),
        (570, 20, 500, 60, 0, 590),
    ),
    Case(
        "Bedrock, caches left out of its total",
        by_boto,
        bedrock(inputTokens=10, outputTokens=20, totalTokens=30, cacheReadInputTokens=500, cacheWriteInputTokens=60),
        (570, 20, 500, 60, 0, 590),
    ),
    Case(
        "Mistral",
        MISTRAL,
        openai_chat(prompt_tokens=11, completion_tokens=7, total_tokens=18),
        (11, 7, 0, 0, 0, 18),
    ),
    Case(
        "Mistral, details that its SDK does not know",
        MISTRAL,
        openai_chat(
            prompt_tokens=110, completion_tokens=7, total_tokens=117, prompt_tokens_details={"cached_tokens": 64}
        ),
        (110, 7, 64, 0, 0, 117),
    ),
    Case(
        "Mistral embeddings",
        MISTRAL_EMBEDDINGS,
        mistral_embeddings(prompt_tokens=5, completion_tokens=0, total_tokens=5),
        (5, 0, 0, 0, 0, 5),
    ),
    Case(
        "Cohere",
        COHERE,
        cohere_chat(
            billed_units={"input_tokens": 5.0, "output_tokens": 3.0},
            tokens={"input_tokens": 70.0, "output_tokens": 12.0},
            cached_tokens=60.0,
        ),
        (70, 12, 60, 0, 0, 82),
    ),
    Case(
        "Cohere, billed units alone",
        COHERE,
        cohere_chat(billed_units={"input_tokens": 5.0, "output_tokens": 3.0}),
        (5, 3, 0, 0, 0, 8),
    ),
    Case(
        "Cohere embeddings",
        COHERE_EMBED,
        cohere_embed(billed_units={"input_tokens": 6.0}),
        (6, 0, 0, 0, 0, 6),
    ),
    Case(
        "LangChain",
        AI_MESSAGE,
        langchain(
            input_tokens=350,
            output_tokens=240,
            total_tokens=590,
            input_token_details={"audio": 10, "cache_creation": 200, "cache_read": 100},
            output_token_details={"audio": 10, "reasoning": 200},
        ),
        (350, 240, 100, 200, 200, 590),
    ),
    Case(
        "LangChain, no details",
        AI_MESSAGE,
        langchain(input_tokens=8, output_tokens=304, total_tokens=312),
        (8, 304, 0, 0, 0, 312),
    ),
    Case(
        "LiteLLM",
        as_it_is,
        openai_chat(
            prompt_tokens=1210,
            completion_tokens=50,
            total_tokens=1260,
            prompt_tokens_details={"cached_tokens": 1000, "cache_write_tokens": 200, "cache_creation_tokens": 200},
            completion_tokens_details={"reasoning_tokens": 20, "text_tokens": 30},
            cache_creation_input_tokens=200,
            cache_read_input_tokens=1000,
        ),
        (1210, 50, 1000, 200, 20, 1260),
    ),
    Case(
        "LiteLLM, no details",
        as_it_is,
        openai_chat(
            prompt_tokens=1210,
            completion_tokens=50,
            total_tokens=1260,
            cache_creation_input_tokens=200,
            cache_read_input_tokens=1000,
        ),
        (1210, 50, 1000, 200, 0, 1260),
    ),
    Case(
        "Ollama chat",
        by_pydantic(ollama.ChatResponse),
        ollama_chat(prompt_eval_count=26, eval_count=298),
        (26, 298, 0, 0, 0, 324),
    ),
    Case(
        "Ollama generate",
        by_pydantic(ollama.GenerateResponse),
        ollama_generate(prompt_eval_count=4, eval_count=31),
        (4, 31, 0, 0, 0, 35),
    ),
    Case(
        "Ollama generate, prompt in its cache",
        by_pydantic(ollama.GenerateResponse),
        ollama_generate(eval_count=31),
        (0, 31, 0, 0, 0, 31),
    ),
    Case(
        "Ollama embed",
        by_pydantic(ollama.EmbedResponse),
        ollama_embed(prompt_eval_count=8),
        (8, 0, 0, 0, 0, 8),
    ),
    Case(
        "pydantic-ai",
        by_pydantic_ai,
        pydantic_ai_run(
            requests=3,
            tool_calls=2,
            input_tokens=900,
            output_tokens=80,
            cache_read_tokens=600,
            cache_write_tokens=100,
            output_reasoning_tokens=25,
            details={"reasoning_tokens": 25},
        ),
        (900, 80, 600, 100, 25, 980),
    ),
]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def dumped(response: Any) -> Any:
    """An SDK's object as a dict of its own making."""
    return response.model_dump() if hasattr(response, "model_dump") else response


def charged(reserve: int | None, *items: Any) -> int:
    """What a decorated generator that yields these is charged."""
    budget = TokenBudget(f"{10**15}/day")

    @token_budget(budget, key="user", reserve=reserve)
    def stream(user: str) -> Generator[Any, Any, Any]:
        yield from items

    assert list(stream("alice")) == list(items)
    assert open_holds(budget) == 0
    return used(budget)


def settled(reserve: int, result: Any) -> tuple[int, str]:
    """What a decorated function that returns this is charged, and how that is known."""
    with collect_decisions() as seen:
        token_budget(f"{10**15}/day", key="user", reserve=reserve)(lambda user: result)("alice")
    settlement = seen[0].settlement
    assert isinstance(settlement, Settlement), "not settled when it returned"
    return settlement.charged, settlement.source


@every_case
def test_the_object_of_an_sdk_is_read(case: Case) -> None:
    response = case.build(case.wire)
    assert read_usage(response) == Usage(*case.usage)
    assert settled(RESERVE, response) == (case.usage[-1], "reported")


@every_case
def test_the_same_wire_is_read_as_a_plain_dict(case: Case) -> None:
    assert read_usage(case.wire) == Usage(*case.usage)
    assert settled(RESERVE, case.wire) == (case.usage[-1], "reported")


@every_case
def test_an_object_that_its_sdk_made_a_dict_of_is_read(case: Case) -> None:
    assert read_usage(dumped(case.build(case.wire))) == Usage(*case.usage)


@every_case
def test_rule_8_the_bare_usage_of_a_response_is_recorded_and_counts_once(case: Case) -> None:
    response = case.build(case.wire)
    bare = getattr(response, "usage", None) or getattr(response, "usage_metadata", None)
    if bare is None:
        bare = response.get("usage") if isinstance(response, dict) else getattr(response, "meta", None)
    if bare is None:
        assert case.name.startswith("Ollama")  # its counts are at the top level
        return
    budget = TokenBudget(f"{10**15}/day")

    @token_budget(budget, key="user", reserve=RESERVE)
    def chat(user: str) -> Any:
        assert record_usage(bare)
        assert record_usage(bare)
        return response

    chat("alice")
    hosted = 4030 if "hosted" in case.name else 0  # beside the usage, in the response
    assert used(budget) == case.usage[-1] - hosted


@every_case
def test_rule_17_the_responses_of_two_calls_in_one_generator_add_up(case: Case) -> None:
    """As where texts are embedded batch by batch."""
    first, second = case.wire, renamed(case.wire)
    assert charged(RESERVE, case.build(first), case.build(second)) == 2 * case.usage[-1]
    assert charged(RESERVE, first, second) == 2 * case.usage[-1]


def renamed(wire: Any) -> Any:
    """The same wire of another call."""
    return json.loads(json.dumps(wire).replace(ID, "id-of-the-second"))


def test_mistral_fills_in_zeros_where_the_wire_has_no_counts_and_these_are_unknown() -> None:
    response = mistral.ChatCompletionResponse.model_validate(openai_chat())
    assert response.usage.total_tokens == 0
    assert read_usage(response) is None
    assert settled(RESERVE, response) == (RESERVE, "reserved")


def test_pydantic_ai_fills_in_zeros_for_responses_without_usage_and_these_are_unknown() -> None:
    response = by_pydantic_ai(pydantic_ai_run(requests=2, unmeasured_requests=2))
    assert response.usage.input_tokens == 0
    assert read_usage(response) is None
    assert settled(RESERVE, response) == (RESERVE, "reserved")


# Automatic function calling of google-genai: it makes several billed calls and reports the last.

PROMPT = {"role": "user", "parts": [{"text": "Add 1 and 2, and 3 to that."}]}
CALL = {"role": "model", "parts": [{"functionCall": {"name": "add", "args": {"a": 1, "b": 2}}}]}
RESULT = {"role": "user", "parts": [{"functionResponse": {"name": "add", "response": {"result": 3}}}]}
LAST = {"promptTokenCount": 1005, "candidatesTokenCount": 5, "totalTokenCount": 1010}


@pytest.mark.parametrize(
    ("history", "calls"),
    [
        ([], 1),
        ([PROMPT, CALL, RESULT, CALL, RESULT], 3),
        ([PROMPT, CALL, RESULT, {"role": "model", "parts": [{"text": "3"}]}, PROMPT, CALL, RESULT], 2),
    ],
    ids=["no calls", "two before the last", "one after an earlier turn of the chat"],
)
def test_automatic_function_calls_are_charged_at_least_what_was_billed(history: list[Wire], calls: int) -> None:
    """Each call read all that the one before it read and wrote, so none used more than the last: 3 × 1010."""
    wire = {**gemini(**LAST), "automaticFunctionCallingHistory": history}
    for response in (GEMINI(wire), GEMINI(wire).model_dump()):
        assert settled(RESERVE, response) == (calls * 1010, "reported")


def test_automatic_function_calls_in_a_stream_are_charged_what_their_own_chunks_report() -> None:
    """google-genai yields the chunks of every call, and hangs the history on those of the later ones."""
    first = {**gemini(promptTokenCount=980, candidatesTokenCount=20, totalTokenCount=1000), "candidates": []}
    later = {**renamed(gemini(**LAST)), "automaticFunctionCallingHistory": [PROMPT, CALL, CALL, RESULT]}
    assert charged(RESERVE, GEMINI(first), GEMINI(later)) == 1000 + 1010


# Streams: the items in order as the SDK yields them, and what the wire says was used in all.


class Stream(NamedTuple):
    name: str
    build: Build
    items: list[Any]
    total: int


def chat_chunk(delta: Wire | None, usage: Wire | None = None) -> Wire:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": None}]
    chunk = {"id": ID, "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}
    return {**chunk, "usage": usage}


def chat_usage(read: int, written: int) -> Wire:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def responses_stream(end: str) -> list[Wire]:
    usage = {"input_tokens": 500, "output_tokens": 80, "total_tokens": 580}
    details = {"input_tokens_details": {"cached_tokens": 400}, "output_tokens_details": {"reasoning_tokens": 64}}
    done = openai_responses(**usage, **details)
    begun = {**done, "usage": None, "output": []}
    place = {"item_id": "msg", "output_index": 0, "content_index": 0, "logprobs": []}
    return [
        {"type": "response.created", "sequence_number": 0, "response": begun},
        {"type": "response.in_progress", "sequence_number": 1, "response": begun},
        {"type": "response.output_text.delta", "sequence_number": 2, "delta": "Hel", **place},
        {"type": "response.output_text.delta", "sequence_number": 3, "delta": "lo.", **place},
        {"type": "response.output_text.done", "sequence_number": 4, "text": "Hello.", **place},
        {"type": f"response.{end}", "sequence_number": 5, "response": done},
    ]


def anthropic_stream(start: Wire, *deltas: Wire) -> list[Wire]:
    message = {**anthropic_message(**start), "content": [], "stop_reason": None}
    stop = {"stop_reason": "end_turn", "stop_sequence": None}
    return [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello."}},
        {"type": "content_block_stop", "index": 0},
        *({"type": "message_delta", "delta": stop, "usage": usage} for usage in deltas),
        {"type": "message_stop"},
    ]


def gemini_chunk(text: str, *, thoughts: int | None, **counts: int) -> Wire:
    wire = gemini(**counts)
    if thoughts is not None:
        wire["usageMetadata"]["thoughtsTokenCount"] = thoughts
    wire["candidates"][0]["content"]["parts"][0]["text"] = text
    return wire


def cohere_stream() -> list[Wire]:
    usage = {
        "billed_units": {"input_tokens": 5.0, "output_tokens": 3.0},
        "tokens": {"input_tokens": 70.0, "output_tokens": 12.0},
    }
    return [
        {"type": "message-start", "id": ID, "delta": {"message": {"role": "assistant"}}},
        {"type": "content-start", "index": 0, "delta": {"message": {"content": {"type": "text", "text": ""}}}},
        {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": "Hello."}}}},
        {"type": "content-end", "index": 0},
        {"type": "message-end", "id": ID, "delta": {"finish_reason": "COMPLETE", "usage": usage}},
    ]


def bedrock_stream() -> list[Wire]:
    usage = {"inputTokens": 10, "outputTokens": 20, "totalTokens": 590}
    caches = {"cacheReadInputTokens": 500, "cacheWriteInputTokens": 60}
    return [
        {"messageStart": {"role": "assistant"}},
        {"contentBlockDelta": {"delta": {"text": "Hello."}, "contentBlockIndex": 0}},
        {"contentBlockStop": {"contentBlockIndex": 0}},
        {"messageStop": {"stopReason": "end_turn"}},
        {"metadata": {"usage": {**usage, **caches}, "metrics": {"latencyMs": 900}}},
    ]


CHAT_CHUNK = by_openai(openai.types.chat.ChatCompletionChunk)
RESPONSE_EVENT = by_openai(openai.types.responses.ResponseStreamEvent)
MESSAGE_EVENT = by_anthropic(anthropic.types.RawMessageStreamEvent)
BETA_MESSAGE_EVENT = by_anthropic(anthropic.types.beta.BetaRawMessageStreamEvent)
COHERE_EVENT = by_cohere(cohere.v2.types.V2ChatStreamResponse)
MISTRAL_EVENT = by_pydantic(mistral.CompletionEvent)
AI_CHUNK = by_langchain(langchain_core.messages.AIMessageChunk)

STREAMS = [
    Stream(
        "OpenAI chat, usage in the last chunk",
        CHAT_CHUNK,
        [
            chat_chunk({"role": "assistant", "content": ""}),
            chat_chunk({"content": "Hello."}),
            chat_chunk(None, chat_usage(9, 12)),
        ],
        21,
    ),
    Stream(
        "OpenAI chat, running totals",  # vLLM's continuous_usage_stats
        CHAT_CHUNK,
        [
            chat_chunk({"content": "Hel"}, chat_usage(9, 1)),
            chat_chunk({"content": "lo."}, chat_usage(9, 2)),
            chat_chunk(None, chat_usage(9, 3)),
        ],
        12,
    ),
    *(
        Stream(f"OpenAI Responses, {end}", RESPONSE_EVENT, responses_stream(end), 580)
        for end in ("completed", "incomplete", "failed")
    ),
    Stream(
        "Anthropic",
        MESSAGE_EVENT,
        anthropic_stream(
            {"input_tokens": 25, "cache_creation_input_tokens": 7, "cache_read_input_tokens": 100, "output_tokens": 1},
            {"output_tokens": 15},
        ),
        25 + 7 + 100 + 15,
    ),
    Stream(
        "Anthropic, None keeps what came before",
        MESSAGE_EVENT,
        anthropic_stream(
            {"input_tokens": 25, "cache_creation_input_tokens": 7, "cache_read_input_tokens": 100, "output_tokens": 1},
            {
                "input_tokens": None,
                "cache_creation_input_tokens": None,
                "cache_read_input_tokens": None,
                "output_tokens": 15,
            },
        ),
        25 + 7 + 100 + 15,
    ),
    Stream(
        "Anthropic, cumulative counts that grow",  # a hosted tool's results are read in the middle of the message
        MESSAGE_EVENT,
        anthropic_stream(
            {"input_tokens": 25, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 1},
            {"input_tokens": 25, "output_tokens": 15},
            {
                "input_tokens": 9025,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 40,
                "output_tokens": 60,
            },
        ),
        9025 + 40 + 60,
    ),
    Stream(
        "Anthropic beta with compaction",
        BETA_MESSAGE_EVENT,
        anthropic_stream(
            {"input_tokens": 20, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 100, "output_tokens": 1},
            {
                "input_tokens": 20,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 100,
                "output_tokens": 40,
                "iterations": [iteration("compaction", 5000, 300), iteration("message", 20, 40, read=100)],
            },
        ),
        5000 + 300 + 20 + 100 + 40,
    ),
    Stream(
        "Gemini, running totals",
        GEMINI,
        [
            gemini_chunk("", thoughts=30, promptTokenCount=100, totalTokenCount=130),
            gemini_chunk("Hel", thoughts=64, promptTokenCount=100, candidatesTokenCount=2, totalTokenCount=166),
            gemini_chunk("lo.", thoughts=64, promptTokenCount=100, candidatesTokenCount=5, totalTokenCount=169),
        ],
        169,
    ),
    Stream(
        "Mistral",
        MISTRAL_EVENT,
        [
            {"data": chunk}
            for chunk in (chat_chunk({"content": "Hello."}), chat_chunk({"content": ""}, chat_usage(11, 7)))
        ],
        18,
    ),
    Stream("Cohere", COHERE_EVENT, cohere_stream(), 82),
    Stream("Bedrock", as_it_is, bedrock_stream(), 590),
    Stream(
        "Ollama chat",
        by_pydantic(ollama.ChatResponse),
        [
            {"model": "m", "message": {"role": "assistant", "content": "Hello."}, "done": False},
            ollama_chat(prompt_eval_count=26, eval_count=298),
        ],
        324,
    ),
    Stream(
        "Ollama generate",
        by_pydantic(ollama.GenerateResponse),
        [{"model": "m", "response": "Hel", "done": False}, ollama_generate(prompt_eval_count=4, eval_count=31)],
        35,
    ),
    Stream(
        "LangChain, chunks add up",
        AI_CHUNK,
        [
            {"id": ID, "content": "", "usage_metadata": {"input_tokens": 10, "output_tokens": 1, "total_tokens": 11}},
            {"id": ID, "content": "Hello."},
            {"id": ID, "content": "", "usage_metadata": {"input_tokens": 0, "output_tokens": 9, "total_tokens": 9}},
            {"id": ID, "content": "", "usage_metadata": {"input_tokens": 10, "output_tokens": 0, "total_tokens": 10}},
        ],
        30,
    ),
    Stream(
        "LiteLLM, usage in the last chunk",
        as_it_is,
        [chat_chunk({"content": "Hello."}), chat_chunk({"content": None}, chat_usage(9, 12))],
        21,
    ),
]

every_stream = pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
in_every_form = pytest.mark.parametrize(
    "form", ["objects", "wire", "dumped"], ids=["objects", "dicts off the wire", "dicts of the SDK's making"]
)


def items_of(stream: Stream, form: str) -> list[Any]:
    if form == "wire":
        return stream.items
    items = [stream.build(copy.deepcopy(item)) for item in stream.items]
    return [dumped(item) for item in items] if form == "dumped" else items


@in_every_form
@every_stream
@pytest.mark.parametrize("reserve", [None, RESERVE, 100_000])
def test_rule_17_a_stream_is_charged_what_its_items_say(stream: Stream, form: str, reserve: int | None) -> None:
    assert charged(reserve, *items_of(stream, form)) == stream.total


@in_every_form
@every_stream
def test_rule_17_two_responses_in_one_stream_add_up(stream: Stream, form: str) -> None:
    second = stream._replace(items=renamed(stream.items))
    assert charged(RESERVE, *items_of(stream, form), *items_of(second, form)) == 2 * stream.total


@in_every_form
@every_stream
def test_rule_8_a_stream_that_reports_no_usage_is_charged_its_reserve(stream: Stream, form: str) -> None:
    silent = [item for item in items_of(stream, form) if read_usage(item) is None]
    assert len(silent) < len(stream.items)
    assert charged(RESERVE, *silent) == RESERVE


# Traps: what makes no sense is unknown usage. It is never zero, never a credit and never an exception (rule 10).

NONSENSE = [-1, -(10**400), 2**53, 10**400, True, False, -0.5, math.nan, math.inf, -math.inf, "12", b"12", [], [12], {}]


def leaves(wire: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all numbers in a wire response."""
    if isinstance(wire, (int, float)):
        yield path
    for key, value in wire.items() if isinstance(wire, dict) else enumerate(wire) if isinstance(wire, list) else ():
        yield from leaves(value, (*path, key))


def with_leaf(wire: Wire, path: tuple[Any, ...], value: Any) -> Wire:
    """A copy of a wire response in which another value is at a path."""
    wire = copy.deepcopy(wire)
    put(wire, path, value)
    return wire


def put(holder: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value


def as_object(value: Any) -> Any:
    """A dict as an object with attributes, as an SDK that does not validate makes it."""
    if isinstance(value, dict):
        return SimpleNamespace(**{key: as_object(inner) for key, inner in value.items()})
    return [as_object(inner) for inner in value] if isinstance(value, list) else value


@every_case
def test_rule_10_one_nonsensical_count_makes_the_usage_unknown(case: Case) -> None:
    """Whatever the count: the usage is unknown, unless this number is none that is read."""
    clean, unknown = read_usage(case.wire), 0
    for path in leaves(case.wire):
        for nonsense in NONSENSE:
            wire = with_leaf(case.wire, path, nonsense)
            for response in (wire, as_object(wire)):
                usage = read_usage(response)
                assert usage is None or usage == clean, (path, nonsense)
                unknown += usage is None
    counts = len({count for count in case.usage[:2] if count})
    assert unknown >= counts * len(NONSENSE) * 2


@every_case
def test_rule_10_counts_that_are_all_nonsense_are_charged_the_reserve(case: Case) -> None:
    for nonsense in NONSENSE:
        wire = case.wire
        for path in leaves(case.wire):
            wire = with_leaf(wire, path, nonsense)
        assert settled(RESERVE, wire) == (RESERVE, "reserved"), nonsense
        assert charged(RESERVE, wire, as_object(wire)) == RESERVE, nonsense


TRAPS: list[tuple[str, Any]] = [
    ("Moonshot's negative input", {"usage": {"input_tokens": -210, "output_tokens": 300, "total_tokens": 90}}),
    ("cache larger than the input", openai_chat(**chat_usage(10, 5), prompt_tokens_details={"cached_tokens": 11})),
    ("Gemini's cache larger than its prompt", gemini(promptTokenCount=10, cachedContentTokenCount=11)),
    ("LangChain's cache larger", langchain(input_tokens=10, output_tokens=1, input_token_details={"cache_read": 11})),
    ("Cohere's cache larger", cohere_chat(tokens={"input_tokens": 10.0, "output_tokens": 1.0}, cached_tokens=11.0)),
    ("no counts", openai_chat()),
    ("counts that are None", openai_chat(prompt_tokens=None, completion_tokens=None, total_tokens=None)),
    ("usage that is None", {**openai_chat(), "usage": None}),
    ("usage that is a number", {"usage": 12}),
    ("usage that is a string", {"usage": "12"}),
    ("usage that is a list", {"usage": [chat_usage(9, 12)]}),
    ("Whisper's duration", {"text": "Hello.", "usage": {"type": "duration", "seconds": 4}}),
    ("Cohere's rerank", {"results": [], "meta": {"billed_units": {"search_units": 1.0}}}),
    ("a page's meta", {"items": [], "meta": {"page": 1, "total": 9}}),
    ("an empty dict", {}),
    ("a bare number", 12),
    ("a bare float", 12.0),
    ("a string", "12"),
    ("nothing", None),
    ("an unknown Usage", Usage(-1)),
    ("a boolean Usage", Usage(True, True)),
    ("a Usage of floats", Usage(1.5, 2.5)),  # type: ignore[arg-type]
    ("NaN in a Usage", Usage(math.nan)),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("response", [trap for _, trap in TRAPS], ids=[name for name, _ in TRAPS])
def test_rule_10_what_makes_no_sense_is_unknown(response: Any) -> None:
    assert read_usage(response) is None
    assert settled(RESERVE, response) == (RESERVE, "reserved")
    assert charged(RESERVE, response, response) == RESERVE


# Mocks, which have every attribute, and answer 1 where an index is asked for.


class Reply:
    """A response class to specify mocks by, as a caller's own tests would."""

    usage: Any = None


def mock_of_a_usage(*counts: str) -> Any:
    return MagicMock(spec=["usage"], usage=NonCallableMagicMock(spec=list(counts)))


MOCKS: list[tuple[str, Callable[[], Any]]] = [
    ("MagicMock", MagicMock),
    ("Mock", Mock),
    ("autospec", lambda: create_autospec(Reply, instance=True, usage=create_autospec(RunUsage, instance=True))),
    ("embeddings", lambda: mock_of_a_usage("prompt_tokens", "total_tokens")),
    ("chat", lambda: mock_of_a_usage("prompt_tokens", "completion_tokens", "total_tokens")),
    ("responses", lambda: mock_of_a_usage("input_tokens", "output_tokens", "total_tokens")),
    ("Gemini", lambda: MagicMock(spec=["usage_metadata"])),
    ("Ollama", lambda: MagicMock(spec=["prompt_eval_count", "eval_count"])),
    ("Mock in a dict", lambda: {"usage": {"prompt_tokens": MagicMock(), "completion_tokens": MagicMock()}}),
]


@pytest.mark.parametrize("make", [make for _, make in MOCKS], ids=[name for name, _ in MOCKS])
def test_rule_10_a_mock_is_unknown_usage(make: Callable[[], Any]) -> None:
    assert read_usage(make()) is None
    assert settled(RESERVE, make()) == (RESERVE, "reserved")


def test_a_mock_with_real_counts_is_read() -> None:
    """A test of a caller's that sets `response.usage.total_tokens` and the like gets what it set."""
    response = Mock(spec=["usage"], usage=Mock(spec=["prompt_tokens", "completion_tokens", "total_tokens"]))
    response.usage.configure_mock(**chat_usage(9, 12))
    assert read_usage(response) == Usage(9, 12)


def steps(work: Callable[[], object]) -> int:
    """How many calls a piece of work makes, of Python functions and of C functions: what it costs on any machine."""
    count = 0

    def step(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(step)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_a_mock_is_read_in_few_steps_however_much_it_makes_up() -> None:
    """A mock makes a new mock, some 2,000 steps, for each attribute asked of it, and these in turn without end."""
    per_attribute = steps(lambda: MagicMock().attribute)
    assert steps(lambda: read_usage(MagicMock())) < 100 * per_attribute


# Objects that raise.


class Hostile:
    """An object of which every attribute but those given raises."""

    def __init__(self, error: type[Exception] = RuntimeError, **given: Any) -> None:
        object.__setattr__(self, "_error", error)
        object.__setattr__(self, "_given", given)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        given = object.__getattribute__(self, "_given")
        if name in given:
            return given[name]
        raise object.__getattribute__(self, "_error")(name)


class HostileDict(dict[str, Any]):
    def get(self, *_: object) -> Any:
        raise RuntimeError("get")

    def __getitem__(self, _: object) -> Any:
        raise RuntimeError("getitem")

    def __contains__(self, _: object) -> bool:
        raise RuntimeError("contains")


class HostileIndex:
    """What an array of several numbers does where one number is asked for."""

    def __index__(self) -> int:
        raise TypeError("only integer scalar arrays can be converted to a scalar index")


class FalseIndex:
    def __index__(self) -> Any:
        return "12"


class Endless:
    """An object of which every attribute is another of its kind."""

    def __getattr__(self, _name: str) -> Endless:
        return Endless()


class Recursive:
    """An object whose attributes never come to an end."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self, name)


def cyclic() -> Any:
    wire: Wire = {}
    for name in ("usage", "response", "message", "metadata", "data", "delta", "chunk", "prompt_tokens"):
        wire[name] = wire
    return wire


HOSTILE: list[tuple[str, Callable[[], Any]]] = [
    *((f"attributes that raise {error.__name__}", lambda error=error: Hostile(error)) for error in (
        AttributeError, KeyError, RuntimeError, RecursionError)),
    *((f"usage whose attributes raise {error.__name__}", lambda error=error: SimpleNamespace(usage=Hostile(error)))
      for error in (AttributeError, KeyError, RuntimeError)),
    ("caches that raise", lambda: SimpleNamespace(usage=Hostile(input_tokens=HostileIndex(), output_tokens=5))),
    ("details that raise", lambda: {"usage": {"prompt_tokens": -1, "prompt_tokens_details": Hostile()}}),
    ("iterations that raise", lambda: {"usage": {"input_tokens": -1, "iterations": [Hostile()], "cache_creation": 1}}),
    ("a dict that raises", lambda: HostileDict(usage=chat_usage(9, 12))),
    ("usage that is a dict that raises", lambda: {"usage": HostileDict(inputTokens=1)}),
    ("a count that raises", lambda: {"usage": {"prompt_tokens": HostileIndex()}}),
    ("a count that lies", lambda: {"usage": {"prompt_tokens": FalseIndex()}}),
    ("an endless object", Endless),
    ("a recursive object", Recursive),
    ("a cyclic dict", cyclic),
    ("an id that raises", lambda: Hostile(usage={"prompt_tokens": -1})),
]  # fmt: skip


@pytest.mark.parametrize("make", [make for _, make in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_rule_10_a_hostile_object_is_unknown_usage(make: Callable[[], Any]) -> None:
    assert read_usage(make()) is None


@pytest.mark.parametrize("make", [make for _, make in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_rule_8_a_hostile_result_is_returned_and_its_call_charged_the_reserve(make: Callable[[], Any]) -> None:
    response = make()
    budget = TokenBudget("1000/day")
    assert token_budget(budget, key="user", reserve=RESERVE)(lambda user: response)("alice") is response
    assert used(budget) == RESERVE
    assert open_holds(budget) == 0


@pytest.mark.parametrize(
    "history",
    [[None], [7], ["model"], [{"role": "model", "parts": 7}], [{"role": "user", "parts": 7}], [Hostile()], 7, {}],
    ids=shown,
)
def test_a_nonsensical_history_of_function_calls_does_not_raise(history: Any) -> None:
    usage = read_usage(
        {**gemini(promptTokenCount=10, totalTokenCount=10), "automatic_function_calling_history": history}
    )
    assert usage is None or usage.total_tokens in (10, 20)


def test_what_can_be_read_is_read_though_everything_else_raises() -> None:
    counts = Hostile(prompt_tokens=9, completion_tokens=12, total_tokens=21)
    assert read_usage(Hostile(usage=counts)) == Usage(9, 12)


# Models that compute some of their fields.


class Counted(pydantic.BaseModel):
    """Usage of a caller's own, of which the total and a class attribute are no fields in `__dict__`."""

    model_config = pydantic.ConfigDict(extra="allow")
    completion_tokens: ClassVar[int] = 12
    prompt_tokens: int
    thoughts: int = 0

    @pydantic.computed_field
    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens + self.thoughts


class Answered(pydantic.BaseModel):
    """A response whose usage is a property."""

    counts: Counted

    @property
    def usage(self) -> Counted:
        return self.counts


class Cached(pydantic.BaseModel):
    """A response whose usage is made when it is asked for."""

    @functools.cached_property
    def usage(self) -> Counted:
        return Counted(prompt_tokens=9, thoughts=3)


def test_what_a_model_computes_is_read_as_what_it_keeps() -> None:
    assert read_usage(Answered(counts=Counted(prompt_tokens=9, thoughts=3))) == Usage(9, 12, total_tokens=24)
    assert read_usage(Cached()) == Usage(9, 12, total_tokens=24)


def test_what_a_model_does_not_know_but_was_given_is_read() -> None:
    counts = Counted.model_validate({"prompt_tokens": 9, "cache_read_input_tokens": 4})
    assert read_usage(Answered(counts=counts)) == Usage(9, 12, cache_read_tokens=4)


@pytest.mark.parametrize(
    "usage",
    [{"inputTokens": None}, {"input_token_details": {}}, {"input_tokens": None, "cache_read_input_tokens": 5}],
    ids=repr,
)
def test_rule_10_usage_without_counts_is_unknown_and_not_zero(usage: Wire) -> None:
    assert read_usage({"usage": usage}) is None


@pytest.mark.parametrize("nonsense", NONSENSE, ids=repr)
def test_rule_10_a_total_that_makes_no_sense_is_not_mended_by_its_parts(nonsense: Any) -> None:
    assert read_usage({"usage": {**chat_usage(9, 12), "total_tokens": nonsense}}) is None
    assert read_usage({"usage": {"completion_tokens": 0, "total_tokens": nonsense}}) is None


def test_a_usage_is_a_value() -> None:
    usage = Usage(9, output_tokens=12, cache_read_tokens=4)
    assert usage == Usage(9, 12, 4, 0, 0, 21) == pickle.loads(pickle.dumps(usage)) == copy.deepcopy(usage)
    assert hash(usage) == hash(Usage(9, 12, 4))
    assert usage != Usage(9, 12)
    assert repr(Usage(9, 12)) == (
        "Usage(input_tokens=9, output_tokens=12, cache_read_tokens=0, cache_write_tokens=0, reasoning_tokens=0, "
        "total_tokens=21)"
    )
    assert usage + Usage(1, 2, total_tokens=5) == Usage(10, 14, 4, total_tokens=26)
    assert usage | Usage(10, 2) == Usage(10, 12, 4)
    assert sum([usage, usage], Usage()) == Usage(18, 24, 8)
    with pytest.raises(AttributeError):
        usage.input_tokens = 7  # type: ignore[misc]
    with pytest.raises(TypeError):
        usage + 12  # type: ignore[operator]


# Any values anywhere.

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 10_000),
    st.sampled_from([2**53 - 1, 2**53, -(2**63), 10**400, math.nan, math.inf, -math.inf, -0.0]),
    st.floats(),
    st.text(max_size=3),
    st.builds(HostileIndex),
    st.builds(Hostile),
    st.builds(dict),
    st.lists(st.integers(), max_size=2),
    st.builds(SimpleNamespace, prompt_tokens=st.integers(), input_tokens=st.integers(), usage=st.integers()),
)


def spots(wire: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values in a wire response, containers among them, the innermost first."""
    for key, value in wire.items() if isinstance(wire, dict) else enumerate(wire) if isinstance(wire, list) else ():
        yield from spots(value, (*path, key))
        yield (*path, key)


ITEMS = [case.wire for case in CASES] + [item for stream in STREAMS for item in stream.items]


@settings(deadline=None, max_examples=250)
@given(st.data())
def test_rule_10_any_value_in_any_field_never_raises_and_is_never_a_credit(data: st.DataObject) -> None:
    wire = data.draw(st.sampled_from(ITEMS))
    chosen = set(data.draw(st.lists(st.sampled_from(list(spots(wire))), min_size=1, max_size=6)))
    odd = copy.deepcopy(wire)
    for path in spots(wire):
        if path in chosen:
            put(odd, path, data.draw(ODD))
    for response in (odd, as_object(odd)):
        usage = read_usage(response)
        if usage is not None:
            assert all(type(count) is int and count >= 0 for count in usage)
            assert usage.input_tokens + usage.output_tokens <= usage.total_tokens
            assert usage.cache_read_tokens + usage.cache_write_tokens <= usage.input_tokens


# No SDK is imported.

SDKS = ("openai", "anthropic", "google.genai", "mistralai", "cohere", "langchain_core", "litellm", "boto3", "botocore",
        "ollama", "pydantic_ai", "pydantic", "httpx", "numpy", "tiktoken", "bpe_openai")  # fmt: skip


def test_reading_usage_and_estimating_import_no_sdk() -> None:
    script = """
import json, sys
from quotalimit import estimate_tokens, read_usage, token_budget
wires, sdks = json.load(sys.stdin)
assert all(read_usage(wire) is not None for wire in wires)
chat = token_budget("1000000/day", key="user", reserve=estimate_tokens)(lambda user, prompt: wires[0])
chat("alice", "hello")
print([name for name in sdks if name in sys.modules])
"""
    given_to_it = json.dumps([[case.wire for case in CASES], SDKS])
    answer = subprocess.run(
        [sys.executable, "-c", script], input=given_to_it, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
