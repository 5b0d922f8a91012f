"""The official OpenAI client against a mock server over HTTP: its usage is charged, and a refused call is not sent.

The `llmock` fixture is that of llmock's pytest plugin: a server on a free port of 127.0.0.1, and `OPENAI_BASE_URL`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import openai
import pytest
import time_machine
from llmock.pytest_plugin import LLMock
from openai import AsyncOpenAI, OpenAI

from quotalimit import TokenBudget, TokenBudgetExceeded, Usage, token_budget

from .helpers import open_holds, used

MODEL = "gpt-4o"
PROMPTS = ["hello", "hello there, how are you?", "a longer prompt, for which the server counts more tokens " * 20]


@pytest.fixture(autouse=True)
def time() -> Iterator[time_machine.Traveller]:
    """A clock that stands still until it is moved."""
    with time_machine.travel(datetime(2026, 11, 23, 12, tzinfo=UTC), tick=False) as traveller:
        yield traveller


@pytest.fixture
def client(llmock: LLMock) -> Iterator[OpenAI]:
    with OpenAI(max_retries=0) as client:
        yield client


def ask_chat(client: Any, prompt: str) -> Any:
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": prompt}])


def ask_responses(client: Any, prompt: str) -> Any:
    return client.responses.create(model=MODEL, input=prompt)


ENDPOINTS = pytest.mark.parametrize("ask", [ask_chat, ask_responses])
Ask = Callable[[Any, str], Any]


@ENDPOINTS
@pytest.mark.parametrize("reserve", [None, 1, 5000])
def test_the_usage_that_the_server_reports_is_what_is_charged(
    client: OpenAI, llmock: LLMock, ask: Ask, reserve: int | None
) -> None:
    budget = TokenBudget("10_000/day")

    @token_budget(budget, key="user", reserve=reserve)
    def chat(user: str, prompt: str) -> Any:
        return ask(client, prompt)

    reported = [chat("alice", prompt).usage.total_tokens for prompt in PROMPTS]
    assert all(tokens > 1 for tokens in reported)
    assert len(set(reported)) == len(PROMPTS)
    assert used(budget) == sum(reported)
    assert open_holds(budget) == 0
    assert len(llmock.requests) == len(PROMPTS)


@ENDPOINTS
async def test_the_usage_that_the_server_reports_to_an_async_client_is_what_is_charged(
    llmock: LLMock, ask: Ask
) -> None:
    budget = TokenBudget("10_000/day")

    async with AsyncOpenAI(max_retries=0) as client:

        @token_budget(budget, key="user", reserve=100)
        async def chat(user: str, prompt: str) -> Any:
            return await ask(client, prompt)

        responses = await asyncio.gather(*(chat("alice", prompt) for prompt in PROMPTS))
    assert used(budget) == sum(response.usage.total_tokens for response in responses)
    assert open_holds(budget) == 0
    assert len(llmock.requests) == len(PROMPTS)


@ENDPOINTS
def test_input_and_output_are_weighed_as_the_server_reports_them(client: OpenAI, ask: Ask) -> None:
    budget = TokenBudget("1_000_000/day")
    readings: list[Usage] = []

    def weigh(usage: Usage) -> int:
        readings.append(usage)
        return usage.input_tokens + 1000 * usage.output_tokens

    response = token_budget(budget, key="user", weigh=weigh)(lambda user: ask(client, PROMPTS[2]))("alice")
    fields = response.usage.model_dump()
    tokens_in = fields.get("prompt_tokens", fields.get("input_tokens"))
    tokens_out = fields.get("completion_tokens", fields.get("output_tokens"))
    assert used(budget) == tokens_in + 1000 * tokens_out
    assert (readings[0].input_tokens, readings[0].output_tokens) == (tokens_in, tokens_out)


@ENDPOINTS
def test_a_call_over_budget_does_not_reach_the_server(client: OpenAI, llmock: LLMock, ask: Ask) -> None:
    budget = TokenBudget("20/day")
    chat = token_budget(budget, key="user")(lambda user: ask(client, PROMPTS[1]))
    while budget.peek("alice").remaining:
        chat("alice")
    sent = len(llmock.requests)
    assert sent > 1
    for _ in range(5):
        with pytest.raises(TokenBudgetExceeded):
            chat("alice")
    assert len(llmock.requests) == sent
    chat("bob")
    assert len(llmock.requests) == sent + 1


def test_a_call_larger_than_what_is_left_does_not_reach_the_server(client: OpenAI, llmock: LLMock) -> None:
    budget = TokenBudget("100/day")
    budget.charge("alice", 60)
    chat = token_budget(budget, key="user", reserve=lambda prompt: len(prompt))(
        lambda user, prompt: ask_chat(client, prompt)
    )
    with pytest.raises(TokenBudgetExceeded):
        chat("alice", "x" * 41)
    assert llmock.requests == []
    chat("alice", "x" * 40)
    assert len(llmock.requests) == 1


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_rule_13_a_call_that_the_server_refuses_is_not_charged(client: OpenAI, llmock: LLMock, status: int) -> None:
    budget = TokenBudget("10_000/day")
    chat = token_budget(budget, key="user", reserve=100)(lambda user: ask_chat(client, "hello"))
    llmock.fail(status)
    with pytest.raises(openai.APIStatusError) as refused:
        chat("alice")
    assert refused.value.status_code == status
    assert (used(budget), open_holds(budget)) == (0, 0)
    tokens = chat("alice").usage.total_tokens
    assert used(budget) == tokens


def test_rule_12_an_agent_of_several_model_calls_is_charged_their_sum(client: OpenAI) -> None:
    budget = TokenBudget("10_000/day")
    model = token_budget(budget, key="user", reserve=500)(lambda user, prompt: ask_chat(client, prompt))
    reported: list[int] = []

    @token_budget(budget, key="user", reserve=2000)
    def agent(user: str) -> Any:
        for prompt in PROMPTS:
            response = model(user, prompt)
            reported.append(response.usage.total_tokens)
        return response

    agent("alice")
    assert used(budget) == sum(reported)
    assert open_holds(budget) == 0


# Twenty calls at once, of which seven fit.


@ENDPOINTS
def test_rule_7_of_twenty_threads_as_many_reach_the_server_as_fit(client: OpenAI, llmock: LLMock, ask: Ask) -> None:
    tokens = ask(client, "hello").usage.total_tokens
    budget = TokenBudget(f"{8 * tokens - 1}/day")
    all_in = threading.Barrier(20, timeout=30)

    @token_budget(budget, key="user", reserve=tokens)
    def chat(user: str) -> Any:
        return ask(client, "hello")

    def one(_: int) -> bool:
        all_in.wait()
        try:
            chat("alice")
        except TokenBudgetExceeded:
            return False
        return True

    with ThreadPoolExecutor(20) as pool:
        admitted = sum(pool.map(one, range(20)))
    assert admitted == 7
    assert len(llmock.requests) == 1 + 7
    assert used(budget) == 7 * tokens
    assert open_holds(budget) == 0


@ENDPOINTS
async def test_rule_7_of_twenty_tasks_as_many_reach_the_server_as_fit(llmock: LLMock, ask: Ask) -> None:
    async with AsyncOpenAI(max_retries=0) as client:
        tokens = (await ask(client, "hello")).usage.total_tokens
        budget = TokenBudget(f"{8 * tokens - 1}/day")

        @token_budget(budget, key="user", reserve=tokens)
        async def chat(user: str) -> Any:
            return await ask(client, "hello")

        results = await asyncio.gather(*(chat("alice") for _ in range(20)), return_exceptions=True)
    refusals = [result for result in results if isinstance(result, BaseException)]
    assert len(refusals) == 13
    assert all(isinstance(refusal, TokenBudgetExceeded) for refusal in refusals)
    assert len(llmock.requests) == 1 + 7
    assert used(budget) == 7 * tokens
    assert open_holds(budget) == 0


# Two hundred calls at once of a stand-in, of which thirty-seven fit.

RESERVE, FITTING, CALLS = 10, 37, 200
LIMIT = FITTING * RESERVE + RESERVE - 1


@pytest.mark.parametrize("tokens", [10, 4, 0], ids=["all of it", "some of it", "nothing"])
def test_rule_7_of_two_hundred_threads_with_honest_reserves_the_limit_is_never_passed(
    wide_races: None, tokens: int
) -> None:
    budget = TokenBudget(f"{LIMIT}/day")
    at_some_moment: list[int] = []
    all_in, decided = threading.Barrier(CALLS, timeout=30), threading.Barrier(CALLS, timeout=30)

    @token_budget(budget, key="user", reserve=RESERVE)
    def chat(user: str) -> Usage:
        at_some_moment.append(used(budget))
        decided.wait()
        at_some_moment.append(used(budget))
        return Usage(tokens)

    def one(_: int) -> bool:
        all_in.wait()
        try:
            chat("alice")
        except TokenBudgetExceeded:
            decided.wait()
            at_some_moment.append(used(budget))
            return False
        return True

    with ThreadPoolExecutor(CALLS) as pool:
        admitted = sum(pool.map(one, range(CALLS)))
    assert admitted == FITTING
    assert max(at_some_moment) == FITTING * RESERVE <= LIMIT
    assert used(budget) == FITTING * tokens
    assert open_holds(budget) == 0


@pytest.mark.parametrize("tokens", [10, 4, 0], ids=["all of it", "some of it", "nothing"])
async def test_rule_7_of_two_hundred_tasks_with_honest_reserves_the_limit_is_never_passed(tokens: int) -> None:
    budget = TokenBudget(f"{LIMIT}/day")
    at_some_moment: list[int] = []
    decided = asyncio.Barrier(CALLS)

    @token_budget(budget, key="user", reserve=RESERVE)
    async def chat(user: str) -> Usage:
        at_some_moment.append(used(budget))
        await decided.wait()
        at_some_moment.append(used(budget))
        return Usage(tokens)

    async def one() -> bool:
        try:
            await chat("alice")
        except TokenBudgetExceeded:
            await decided.wait()
            at_some_moment.append(used(budget))
            return False
        return True

    assert sum(await asyncio.gather(*(one() for _ in range(CALLS)))) == FITTING
    assert max(at_some_moment) == FITTING * RESERVE <= LIMIT
    assert used(budget) == FITTING * tokens
    assert open_holds(budget) == 0


def test_rule_9_usage_above_the_reserves_of_two_hundred_threads_is_charged_in_full(wide_races: None) -> None:
    budget = TokenBudget(f"{LIMIT}/day")
    all_in, decided = threading.Barrier(CALLS, timeout=30), threading.Barrier(CALLS, timeout=30)

    @token_budget(budget, key="user", reserve=RESERVE)
    def chat(user: str) -> Usage:
        decided.wait()
        return Usage(25)

    def one(_: int) -> int:
        all_in.wait()
        try:
            return chat("alice").total_tokens
        except TokenBudgetExceeded:
            decided.wait()
            return 0

    with ThreadPoolExecutor(CALLS) as pool:
        charged = sum(pool.map(one, range(CALLS)))
    assert used(budget) == charged == FITTING * 25
    assert open_holds(budget) == 0


async def test_rule_9_usage_above_the_reserves_of_two_hundred_tasks_is_charged_in_full() -> None:
    budget = TokenBudget(f"{LIMIT}/day")
    decided = asyncio.Barrier(CALLS)

    @token_budget(budget, key="user", reserve=RESERVE)
    async def chat(user: str) -> Usage:
        await decided.wait()
        return Usage(25)

    async def one() -> int:
        try:
            return (await chat("alice")).total_tokens
        except TokenBudgetExceeded:
            await decided.wait()
            return 0

    assert sum(await asyncio.gather(*(one() for _ in range(CALLS)))) == used(budget) == FITTING * 25
    assert open_holds(budget) == 0
