"""Tokens: what a call holds, what it is read to have used, and what it is charged (rules 7 to 11, 13 and 14)."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import time_machine
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from quotalimit import (
    KEEP,
    RELEASE,
    RateLimitExceeded,
    Settlement,
    SlidingWindow,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    Usage,
    clock,
    collect_decisions,
    estimate_tokens,
    limiters_of,
    rate_limited,
    record_usage,
    token_budget,
)
from quotalimit.amounts import MAX_UNITS

from .helpers import NOON, open_holds, reply, used

pytestmark = pytest.mark.usefixtures("time")


def settlement_of(call: Callable[[], object]) -> Settlement:
    """What the first token budget of a call charged it, whether it returns or raises."""
    with collect_decisions() as seen:
        try:
            call()
        except AssertionError:
            raise
        except BaseException:  # what the call raises is for its own test to look at
            pass
    settlement = seen[0].settlement
    assert settlement is not None
    return settlement


def charged(result: object, **options: Any) -> tuple[int, str]:
    """What a call that holds 50 and returns something is charged, and how that was known."""
    budget = TokenBudget("1000/day")
    options.setdefault("reserve", 50)

    @token_budget(budget, key="user", **options)
    def chat(user: str) -> object:
        return result

    settlement = settlement_of(lambda: chat("alice"))
    assert used(budget) == settlement.charged == settlement.used
    assert open_holds(budget) == 0
    return settlement.charged, settlement.source


def charged_after(error: BaseException, recorded: object = None, **options: Any) -> tuple[int, str]:
    """What a call that holds 50, records something and raises is charged, and how that was known."""
    budget = TokenBudget("1000/day")
    options.setdefault("reserve", 50)

    @token_budget(budget, key="user", **options)
    def chat(user: str) -> object:
        if recorded is not None:
            record_usage(recorded)
        raise error

    settlement = settlement_of(lambda: chat("alice"))
    assert used(budget) == settlement.charged
    assert open_holds(budget) == 0
    return settlement.charged, settlement.source


# Rule 7: a hold is taken before the call.


@pytest.mark.parametrize(
    "reserve",
    [40, 39.2, lambda size: size, lambda user, size: size, lambda *args, **kwargs: kwargs["size"]],
    ids=["number", "rounded up", "one parameter", "two parameters", "the exact call"],
)
def test_rule_7_a_reserve_is_held_while_the_call_runs_and_adjusted_after(reserve: Any) -> None:
    budget = TokenBudget("100/day")
    while_running = []

    @token_budget(budget, key="user", reserve=reserve)
    def chat(user: str, size: int) -> object:
        while_running.append((used(budget), open_holds(budget)))
        return reply(20, 5)

    chat("alice", size=40)
    assert while_running == [(40, 1)]
    assert used(budget) == 25
    assert open_holds(budget) == 0


def test_rule_7_a_reserve_that_does_not_fit_is_refused_before_the_function_runs() -> None:
    budget = TokenBudget("100/day")
    ran = []

    @token_budget(budget, key="user", reserve=lambda size: size)
    def chat(user: str, size: int) -> object:
        ran.append(size)
        return reply(size)

    chat("alice", 61)
    with pytest.raises(TokenBudgetExceeded) as refused:
        chat("alice", 40)
    assert (refused.value.requested, refused.value.used, refused.value.remaining) == (40, 61, 39)
    assert ran == [61]
    assert used(budget) == 61
    chat("alice", 39)
    assert used(budget) == 100


def test_rule_7_without_a_reserve_a_call_needs_one_and_takes_none() -> None:
    budget = TokenBudget("10/day")
    while_running = []

    @token_budget(budget, key="user")
    def chat(user: str, size: int) -> object:
        while_running.append(used(budget))
        return reply(size)

    chat("alice", 9)
    chat("alice", 1)
    assert while_running == [0, 9]
    with pytest.raises(TokenBudgetExceeded) as refused:
        chat("alice", 1)
    assert (refused.value.requested, refused.value.remaining) == (1, 0)


def test_rule_7_without_a_reserve_calls_in_flight_can_pass_the_limit() -> None:
    budget = TokenBudget("10/day")

    @token_budget(budget, key="user")
    async def chat(user: str, all_in: asyncio.Barrier) -> object:
        await all_in.wait()
        return reply(8)

    async def three_at_once() -> None:
        barrier = asyncio.Barrier(3)
        await asyncio.gather(*(chat("alice", barrier) for _ in range(3)))

    asyncio.run(three_at_once())
    assert used(budget) == 24
    assert budget.peek("alice").remaining == 0


def test_rule_7_a_reserve_is_checked_when_it_can_be_and_refused_at_the_call_otherwise() -> None:
    for bad in (-1, True, math.nan, math.inf, 10**5_000):
        with pytest.raises(ValueError, match="reserve must be a number from 0"):
            token_budget("100/day", key="user", reserve=bad)(lambda user: None)
        budget = TokenBudget("100/day")
        chat = token_budget(budget, key="user", reserve=lambda user, bad=bad: bad)(lambda user: None)
        with pytest.raises(ValueError, match=r"^100/day: reserve"):
            chat("alice")
        assert used(budget) == 0
    chat = token_budget(budget, key="user", reserve=lambda user: None)(lambda user: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"^100/day: reserve"):
        chat("alice")


def test_a_call_is_refused_as_busy_if_open_holds_are_all_that_stands_in_its_way() -> None:
    budget = TokenBudget("100/day")
    refusals = []

    @token_budget(budget, key="user", reserve=60)
    def chat(user: str) -> object:
        with pytest.raises(TokenBudgetExceeded) as refused:
            budget.charge("alice", 50)
        refusals.append(refused.value)
        return reply(60)

    chat("alice")
    with pytest.raises(TokenBudgetExceeded) as refused:
        budget.charge("alice", 50)
    refusals.append(refused.value)
    with pytest.raises(TokenBudgetExceeded) as refused:
        budget.charge("alice", 101)
    refusals.append(refused.value)
    assert [refusal.reason for refusal in refusals] == ["busy", "exhausted", "too_large"]
    half_a_day = 12 * 3600.0
    assert [refusal.retry_after for refusal in refusals] == [half_a_day, half_a_day, None]


def test_a_call_for_which_there_is_no_room_beside_what_was_used_is_exhausted_whatever_is_held() -> None:
    budget = TokenBudget("100/day")
    budget.charge("alice", 60)
    with budget.reserve("alice", 20):
        with pytest.raises(TokenBudgetExceeded) as refused:
            budget.charge("alice", 41)
        assert refused.value.reason == "exhausted"
        with pytest.raises(TokenBudgetExceeded) as refused:
            budget.charge("alice", 40)
        assert refused.value.reason == "busy"


# Rule 8: what a call used.


@pytest.mark.parametrize(
    ("result", "tokens"),
    [
        (reply(20, 5), 25),
        ({"usage": {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}}, 25),
        ({"usage": {"input_tokens": 20, "output_tokens": 5}}, 25),
        (SimpleNamespace(usage=Usage(20, 5)), 25),
        (Usage(20, 5), 25),
        (Usage(20, 5, total_tokens=30), 30),
        (Usage(), 0),
    ],
)
def test_rule_8_the_usage_of_the_result_is_charged(result: object, tokens: int) -> None:
    assert charged(result) == (tokens, "reported")


@pytest.mark.parametrize("result", [None, 7, 7.5, "text", b"bytes", object(), {}, {"usage": None}, reply])
def test_rule_8_a_result_that_reports_nothing_is_charged_its_reserve(result: object) -> None:
    assert charged(result) == (50, "reserved")


@pytest.mark.parametrize(
    ("usage", "outcome"),
    [
        (lambda result: result["tokens"], (12, "reported")),
        (lambda result: result["tokens"] / 5, (3, "reported")),
        (lambda result: Usage(input_tokens=result["tokens"]), (12, "reported")),
        (lambda result: 0, (0, "reported")),
        (lambda result: None, (50, "reserved")),
        (lambda result: result["no such field"], (50, "reserved")),
        (lambda result: "12", (50, "reserved")),
    ],
)
def test_rule_8_a_usage_reader_of_the_callers_own(usage: Any, outcome: tuple[int, str]) -> None:
    assert charged({"tokens": 12}, usage=usage) == outcome


@pytest.mark.parametrize("what", ["usage", "weigh"])  # weights are asked for again where the first answer was none
def test_a_reader_of_the_callers_own_that_raises_is_logged_and_the_paid_for_result_is_returned(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = reply(3)
    chat: Any = token_budget("100/day", key="user", reserve=5, **{what: lambda _: 1 / 0})(lambda user: answer)
    assert chat("alice") is answer
    logged = caplog.records[0]
    assert what == "weigh" or len(caplog.records) == 1
    assert {record.message for record in caplog.records} == {logged.message}
    assert "the usage is unknown" in logged.message
    assert logged.levelno == logging.ERROR
    assert logged.exc_info is not None
    assert logged.exc_info[0] is ZeroDivisionError
    assert "alice" not in caplog.text


def test_a_result_that_resists_reading_is_returned_and_its_hold_settled() -> None:
    class Resisting(dict[str, object]):
        def get(self, *_: object) -> object:
            raise RuntimeError("no reading")

        def values(self) -> Any:
            raise RuntimeError("no reading")

    budget = TokenBudget("1000/day")
    result = Resisting()

    @token_budget(budget, key="user", reserve=50)
    def chat(user: str) -> object:
        return result

    assert chat("alice") is result
    assert used(budget) == 50
    assert open_holds(budget) == 0


@pytest.mark.parametrize(
    ("weigh", "outcome"),
    [
        (None, (25, "reported")),
        (lambda usage: usage.input_tokens + 4 * usage.output_tokens, (40, "reported")),
        (lambda usage: usage.output_tokens / 2, (3, "reported")),
        (lambda usage: 0, (0, "reported")),
        (lambda usage: -5, (50, "reserved")),
        (lambda usage: math.nan, (50, "reserved")),
        (lambda usage: True, (50, "reserved")),
        (lambda usage: None, (50, "reserved")),
        (lambda usage: usage, (50, "reserved")),
        (lambda usage: 1 / 0, (50, "reserved")),
    ],
)
def test_weigh_turns_a_usage_into_what_is_charged_and_is_never_a_credit(weigh: Any, outcome: tuple[int, str]) -> None:
    assert charged(reply(20, 5), weigh=weigh) == outcome


def test_weigh_does_not_touch_plain_numbers() -> None:
    assert charged(reply(20, 5), usage=lambda result: 7, weigh=lambda usage: 1000) == (7, "reported")


def test_rule_8_recorded_usage_adds_to_that_of_the_result() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    def chat(user: str, result: object) -> object:
        assert record_usage(reply(3))
        assert record_usage(4)
        assert record_usage(Usage(output_tokens=5))
        return result

    reported = settlement_of(lambda: chat("alice", reply(100)))
    assert (reported.charged, reported.source) == (112, "reported")
    recorded = settlement_of(lambda: chat("alice", "no usage"))
    assert (recorded.charged, recorded.source) == (12, "recorded")
    assert used(budget) == 124


def test_rule_8_equal_numbers_and_equal_usages_recorded_apart_both_count() -> None:
    chat = token_budget("1000/day", key="user")(lambda user: [record_usage(7), record_usage(7), record_usage(Usage(7))])
    assert settlement_of(lambda: chat("alice")).charged == 21


@pytest.mark.parametrize(
    ("recorded", "result"),
    [
        (lambda it: [it], lambda it: it),
        (lambda it: [it, it], lambda it: it),
        (lambda it: [it, it], lambda it: None),
        (lambda it: [it], lambda it: SimpleNamespace(usage=it.usage)),
        (lambda it: [SimpleNamespace(usage=it.usage)], lambda it: it),
        (lambda it: [it, {"usage": it.usage}], lambda it: None),
        (lambda it: [it.usage], lambda it: it),
    ],
    ids=["it", "it twice", "twice, not returned", "its usage returned", "its usage recorded", "dict", "bare Usage"],
)
def test_rule_8_the_same_object_or_its_usage_counts_once(recorded: Any, result: Any) -> None:
    response = SimpleNamespace(usage=Usage(20, 5))

    def chat(user: str) -> object:
        for part in recorded(response):
            assert record_usage(part)
        return result(response)

    assert settlement_of(lambda: token_budget("1000/day", key="user")(chat)("alice")).charged == 25


def test_rule_8_an_exceptions_completion_that_was_recorded_too_counts_once() -> None:
    error = openai.LengthFinishReasonError(completion=COMPLETION)
    assert charged_after(error, recorded=COMPLETION) == (30, "reported")


def test_rule_8_the_order_is_reported_recorded_reserved_estimated() -> None:
    def source(result: object, recorded: object, reserve: int | None) -> str:
        def chat(user: str) -> object:
            if recorded is not None:
                record_usage(recorded)
            return result

        return settlement_of(lambda: token_budget("1000/day", key="user", reserve=reserve)(chat)("alice")).source

    assert source(reply(1), 2, 3) == "reported"
    assert source("text", 2, 3) == "recorded"
    assert source("text", None, 3) == "reserved"
    assert source("text", None, None) == "estimated"


@pytest.mark.parametrize(
    ("arguments", "result", "tokens"),
    [
        (("abcd" * 10,), "efgh" * 5, 15),
        ((["abcd", {"role": "user", "content": "efgh"}, ("ijkl",)],), {"answer": ["mnop"]}, 5),
        (("",), None, 1),
        ((12345,), 67890, 1),
        (("\N{EURO SIGN}" * 4,), None, 3),
        (("abcde",), None, 2),
    ],
    ids=["text", "nested", "no text", "numbers", "bytes of UTF-8", "rounded up"],
)
def test_rule_8_the_last_resort_is_a_quarter_of_the_text_and_never_nothing(
    arguments: tuple[object, ...], result: object, tokens: int
) -> None:
    chat = token_budget("1000/day", key=lambda *args: "alice")(lambda *args: result)
    settlement = settlement_of(lambda: chat(*arguments))
    assert (settlement.charged, settlement.held, settlement.source) == (tokens, 0, "estimated")


@pytest.mark.parametrize("key", ["user", lambda *args, **kwargs: "bob"], ids=["by name", "of the exact call"])
def test_rule_8_an_estimate_counts_what_a_parameter_has_by_default(key: Any) -> None:
    @token_budget("1000/day", key=key)
    def chat(user: str, system: str = "Be brief!") -> None:
        return None

    assert settlement_of(lambda: chat("bob")).charged == 1 + 3  # of three and of nine bytes


@pytest.mark.parametrize("reserve", [None, estimate_tokens])
def test_rule_8_an_estimate_does_not_count_what_the_object_of_a_method_holds(reserve: Any) -> None:
    class Agent:
        data = "never told"

        def __init__(self) -> None:
            self.messages = ["a long history"] * 1_000

        @token_budget("1000/day", key="user", reserve=reserve)
        def ask(self, user: str, question: str) -> None:
            pass

        @classmethod
        @token_budget("1000/day", key="user", reserve=reserve)
        def ask_all(cls, user: str, question: str) -> None:
            pass

        @token_budget("1000/day", key=lambda *args, **kwargs: "alice", reserve=reserve)
        def ask_exactly(self, *questions: str) -> None:
            pass

    Agent().ask("alice", "abc")
    Agent.ask_all("alice", "abc")
    Agent().ask_exactly("alice", "abc")
    for method in (Agent.ask, Agent.ask_all, Agent.ask_exactly):
        assert used(limiters_of(method)[0]) == 2  # eight bytes


def test_an_estimate_is_warned_of_once_for_each_function(caplog: pytest.LogCaptureFixture) -> None:
    def chat(user: str, text: str) -> str:
        return text

    one, other = token_budget("1000/day", key="user")(chat), token_budget("1000/day", key="user")(chat)
    for _ in range(3):
        one("alice", "abcdefgh")
        one("bob", "abcdefgh")
    assert len(caplog.records) == 1
    other("alice", "abcdefgh")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    for word in ("usage", "reserve", "record_usage"):
        assert word in caplog.text
    for secret in ("alice", "abcdefgh"):
        assert secret not in caplog.text


def test_no_estimate_is_warned_of_where_usage_is_known_or_reserved(caplog: pytest.LogCaptureFixture) -> None:
    charged(reply(1), reserve=None)
    charged(None, reserve=5)
    assert not caplog.records


# Rule 9: usage above the hold is charged in full.


@pytest.mark.parametrize("reserve", [None, 10])
def test_rule_9_usage_above_the_hold_is_charged_in_full_and_the_result_is_returned(reserve: int | None) -> None:
    budget = TokenBudget("100/day")
    response = reply(250)
    chat = token_budget(budget, key="user", reserve=reserve)(lambda user: response)
    assert chat("alice") is response
    decision = budget.peek("alice")
    assert (decision.used, decision.remaining, decision.allowed) == (250, 0, False)
    with pytest.raises(TokenBudgetExceeded) as refused:
        chat("alice")
    assert (refused.value.used, refused.value.remaining, refused.value.reason) == (250, 0, "exhausted")
    assert used(budget) == 250


def test_rule_9_a_settlement_says_by_how_much_the_hold_was_passed() -> None:
    settlement = settlement_of(
        lambda: token_budget("1000/day", key="user", reserve=10)(lambda user: reply(25))("alice")
    )
    assert (settlement.held, settlement.used, settlement.charged, settlement.overrun) == (10, 25, 25, 15)


def test_rule_9_debt_in_a_bucket_is_refilled_at_the_rate(time: time_machine.Traveller) -> None:
    budget = TokenBudget(TokenBucket("60/minute", burst=100))
    token_budget(budget, key="user")(lambda user: reply(150))("alice")
    time.shift(50)
    assert not budget.peek("alice").allowed
    time.shift(1)
    assert budget.peek("alice").remaining == 1


# Rule 10: what makes no sense is unknown usage, never a credit.

BAD_NUMBERS = st.one_of(
    st.integers(max_value=-1),
    st.booleans(),
    st.floats(max_value=-1e-9),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)


@given(bad=BAD_NUMBERS, good=st.integers(0, 1000), where=st.integers(0, 2))
@settings(deadline=None, max_examples=100)
def test_rule_10_usage_that_makes_no_sense_is_unknown_and_never_a_credit(bad: Any, good: int, where: int) -> None:
    counts: list[Any] = [good, good, 2 * good]
    counts[where] = bad
    fields = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), counts, strict=True))
    in_responses = dict(zip(("input_tokens", "output_tokens", "total_tokens"), counts, strict=True))
    for result in (
        {"usage": fields},
        SimpleNamespace(usage=SimpleNamespace(**fields)),
        {"usage": in_responses},
        {"usage": {**fields, "prompt_tokens": good, "prompt_tokens_details": {"cached_tokens": bad}}},
    ):
        assert charged(result) == (50, "reserved")
    assert charged(None, usage=lambda _: bad) == (50, "reserved")
    assert charged(reply(good), weigh=lambda _: bad) == (50, "reserved")
    assert charged_after(ValueError(), on_error=lambda _: bad) == (50, "reserved")


@given(bad=BAD_NUMBERS.filter(lambda number: not (isinstance(number, float) and math.isnan(number))))
@settings(deadline=None, max_examples=50)
def test_rule_10_a_usage_that_makes_no_sense_is_unknown_wherever_it_comes_from(bad: Any) -> None:
    for usage in (Usage(input_tokens=bad), Usage(reasoning_tokens=bad), Usage(5, 5, cache_read_tokens=bad)):
        assert charged(usage) == (50, "reserved")
        assert charged(SimpleNamespace(usage=usage)) == (50, "reserved")
        assert charged(None, usage=lambda _, usage=usage: usage) == (50, "reserved")
        assert charged_after(ValueError(), on_error=lambda _, usage=usage: usage) == (50, "reserved")


@given(bad=BAD_NUMBERS)
@settings(deadline=None, max_examples=50)
def test_rule_10_recording_a_number_that_makes_no_sense_is_an_error_and_charges_nothing(bad: Any) -> None:
    def chat(user: str) -> bool:
        with pytest.raises(ValueError, match="usage"):
            record_usage(bad)
        return record_usage({"usage": {"prompt_tokens": bad}})

    budget = TokenBudget("1000/day")
    assert token_budget(budget, key="user", reserve=50)(chat)("alice") is False
    assert used(budget) == 50


def test_rule_9_more_than_can_be_counted_is_charged_as_the_most_that_can_be() -> None:
    chat = token_budget("1000/day", key="user")(lambda user: [record_usage(MAX_UNITS), record_usage(5)])
    assert settlement_of(lambda: chat("alice")).used == MAX_UNITS


def test_rule_10_missing_usage_is_unknown_though_other_fields_are_there() -> None:
    assert charged({"usage": {"seconds": 5}}) == (50, "reserved")
    assert charged({"usage": {"prompt_tokens": None, "completion_tokens": None}}) == (50, "reserved")
    assert charged({"usage": {"prompt_tokens": "7"}}) == (50, "reserved")


# Rule 11: a hold is settled once, and settling never blocks.


def test_rule_11_a_finalizer_that_settles_while_the_lock_is_held_is_queued_and_drained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    def chat(user: str) -> Iterator[object]:
        yield reply(7)

    streams = [chat("alice")]
    next(streams[0])
    moment = clock.now()

    def drop_the_stream_under_the_lock() -> int:
        streams.clear()
        return moment

    monkeypatch.setattr(clock, "now", drop_the_stream_under_the_lock)
    asking = threading.Thread(target=budget.peek, args=("alice",), daemon=True)
    asking.start()
    asking.join(timeout=30)
    assert not asking.is_alive()
    assert used(budget) == 7
    assert open_holds(budget) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_rule_11_a_hold_of_which_the_weigh_always_interrupts_stays_charged_and_not_open() -> None:
    budget = TokenBudget("1000/day")

    def interrupt(usage: Usage) -> int:
        raise KeyboardInterrupt

    @token_budget(budget, key="user", reserve=50, weigh=interrupt)
    def chat(user: str) -> object:
        return reply(9)

    with pytest.raises(KeyboardInterrupt):
        chat("alice")
    gc.collect()
    assert (used(budget), open_holds(budget)) == (50, 0)


# Rule 13: a call that raises.

COMPLETION = ChatCompletion.model_validate(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "cut off"}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30},
    }
)
REQUEST = httpx.Request("POST", "http://127.0.0.1/v1/chat/completions")
REFUSED = httpx.Response(429, request=REQUEST)


def nested_refusal() -> BaseException:
    """What a nested call that is refused raises."""
    nested = rate_limited("1/day", key="user", name="nested")(lambda user: None)
    nested("alice")
    with pytest.raises(RateLimitExceeded) as refused:
        nested("alice")
    return refused.value


@pytest.mark.parametrize(
    ("make_error", "outcome"),
    [
        (lambda: ValueError("bad prompt"), (0, "released")),
        (
            lambda: openai.RateLimitError("429", response=httpx.Response(429, request=REQUEST), body=None),
            (0, "released"),
        ),
        (lambda: openai.APIConnectionError(request=REQUEST), (0, "released")),
        (nested_refusal, (0, "released")),
        (TimeoutError, (50, "reserved")),
        (lambda: openai.APITimeoutError(REQUEST), (50, "reserved")),
        (lambda: httpx.ReadTimeout("slow"), (50, "reserved")),
        (asyncio.CancelledError, (50, "reserved")),
        (KeyboardInterrupt, (50, "reserved")),
        (SystemExit, (50, "reserved")),
        (lambda: openai.LengthFinishReasonError(completion=COMPLETION), (30, "reported")),
    ],
)
def test_rule_13_what_a_call_that_raises_is_charged(
    make_error: Callable[[], BaseException], outcome: tuple[int, str]
) -> None:
    assert charged_after(make_error()) == outcome


@pytest.mark.parametrize("error", [ValueError(), TimeoutError()])
def test_rule_13_what_was_recorded_before_the_exception_is_charged(error: BaseException) -> None:
    assert charged_after(error, recorded=reply(12)) == (12, "recorded")


@pytest.mark.parametrize(
    ("error", "on_error", "outcome"),
    [
        (TimeoutError(), lambda error: RELEASE, (0, "released")),
        (ValueError(), lambda error: KEEP, (50, "reserved")),
        (ValueError(), lambda error: 12, (12, "reported")),
        (ValueError(), lambda error: 11.5, (12, "reported")),
        (ValueError(), lambda error: Usage(3, 4), (7, "reported")),
        (ValueError(), lambda error: 0, (0, "reported")),
        (ValueError(9), lambda error: error.args[0], (9, "reported")),
        (ValueError(), lambda error: 1 / 0, (50, "reserved")),
        (ValueError(), lambda error: Usage(), (0, "reported")),
        (openai.LengthFinishReasonError(completion=COMPLETION), lambda error: RELEASE, (0, "released")),
        (openai.LengthFinishReasonError(completion=COMPLETION), lambda error: 12, (12, "reported")),
    ],
)
def test_rule_13_on_error_decides_otherwise(error: BaseException, on_error: Any, outcome: tuple[int, str]) -> None:
    assert charged_after(error, on_error=on_error) == outcome


class Told(Exception):
    """An exception that tells what was used, as OpenAI's does."""

    def __init__(self, tokens: int = 0, completion: object = None) -> None:
        self.completion = completion or reply(tokens)


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


SHARED = reply(7)


@pytest.mark.parametrize(
    ("error", "tokens"),
    [
        (caused(ValueError(), Told(30)), 30),
        (caused(ValueError(), caused(KeyError(), Told(30))), 30),
        (RuntimeError("gave up", Told(30)), 30),
        (caused(Told(30), Told(20)), 30),  # the totals of all attempts, as Instructor tells them
        (ExceptionGroup("two", [Told(30), ValueError(), Told(5)]), 35),
        (ExceptionGroup("deep", [ExceptionGroup("two", [Told(30)]), caused(ValueError(), Told(5))]), 35),
        (ExceptionGroup("one", [Told(completion=SHARED), Told(completion=SHARED)]), 7),
        (caused(ExceptionGroup("one", [ValueError(), Told(5)]), Told(30)), 35),
    ],
    ids=["cause", "its cause", "argument", "nearest", "group", "groups", "shared", "group and cause"],
)
def test_rule_13_an_exception_is_charged_what_those_report_that_it_was_raised_from(
    error: BaseException, tokens: int
) -> None:
    assert charged_after(error) == (tokens, "reported")


def test_rule_13_exceptions_that_are_each_others_causes_are_read_once() -> None:
    one, other = ValueError(), Told(30)
    one.__cause__, other.__cause__ = ExceptionGroup("all", [one, other]), one
    assert charged_after(one) == (30, "reported")


def test_rule_13_an_exception_that_resists_reading_comes_out_unchanged_and_keeps_its_hold() -> None:
    class Hostile(Exception):
        @property
        def args(self) -> Any:  # type: ignore[override]
            raise LookupError

    assert charged_after(Hostile()) == (50, "reserved")


def test_rule_12_of_a_group_only_what_no_nested_call_has_told_is_charged_beside_it() -> None:
    one, other = TokenBudget("1000/day"), TokenBudget("1000/day")

    @token_budget(other, key="user")
    def inner(user: str) -> None:
        raise Told(30)

    @token_budget(one, key="user", reserve=50)
    def outer(user: str) -> None:
        errors: list[Exception] = [Told(5)]
        try:
            inner(user)
        except Told as error:
            errors.append(error)
        raise ExceptionGroup("both", errors)

    with pytest.raises(ExceptionGroup):
        outer("alice")
    assert (used(one), used(other)) == (35, 30)


def test_an_on_error_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    charged_after(ValueError(), on_error=lambda error: 1 / 0)
    (logged,) = caplog.records
    assert "on_error raised; the hold is kept" in logged.message
    assert logged.exc_info is not None
    assert logged.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize("options", [{}, {"on_error": lambda error: None}], ids=["default", "left to it"])
def test_rule_13_a_stream_that_has_begun_to_answer_keeps_its_hold_unless_on_error_says_otherwise(
    options: dict[str, Any],
) -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50, **options)
    def stream(user: str) -> Iterator[str]:
        yield "once upon a time"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(stream("alice"))
    assert used(budget) == 50


def test_rule_13_the_units_of_an_exception_are_weighed() -> None:
    error = openai.LengthFinishReasonError(completion=COMPLETION)
    assert charged_after(error, weigh=lambda usage: usage.input_tokens + 2 * usage.output_tokens) == (50, "reported")


def test_rule_13_a_kept_call_without_a_reserve_is_estimated() -> None:
    assert charged_after(TimeoutError(), reserve=None) == (2, "estimated")  # "alice" is five bytes


def test_rule_13_on_error_of_one_budget_does_not_decide_for_another() -> None:
    lenient, strict = TokenBudget("1000/day", name="lenient"), TokenBudget("1000/day", name="strict")

    @token_budget(lenient, key="user", reserve=50, on_error=lambda error: RELEASE)
    @token_budget(strict, key="user", reserve=50)
    def chat(user: str) -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        chat("alice")
    assert (used(lenient), used(strict)) == (0, 50)


def test_rule_13_on_error_does_not_hear_of_the_budgets_own_refusal() -> None:
    heard: list[BaseException] = []
    chat = token_budget("10/day", key="user", reserve=11, on_error=lambda error: heard.append(error) or KEEP)(
        lambda user: None
    )
    with pytest.raises(TokenBudgetExceeded):
        chat("alice")
    assert heard == []


async def test_rule_13_a_cancelled_task_keeps_its_hold() -> None:
    budget = TokenBudget("1000/day")
    running = asyncio.Event()

    @token_budget(budget, key="user", reserve=50)
    async def chat(user: str) -> None:
        running.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(chat("alice"))
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert used(budget) == 50
    assert open_holds(budget) == 0


async def test_rule_13_a_task_that_times_out_keeps_its_hold() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    async def chat(user: str) -> None:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await chat("alice")
    assert used(budget) == 50
    assert open_holds(budget) == 0


async def test_a_task_cancelled_before_it_starts_is_not_charged() -> None:
    budget = TokenBudget("1000/day")

    @token_budget(budget, key="user", reserve=50)
    async def chat(user: str) -> None:
        raise AssertionError

    task = asyncio.create_task(chat("alice"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert used(budget) == 0


def test_the_functions_own_exception_comes_out_unchanged() -> None:
    cause, error = KeyError("cause"), ValueError("mine")

    @rate_limited("100/day", key="user", refund_on=ValueError)
    @token_budget("100/day", key="user", reserve=1)
    def chat(user: str) -> None:
        deeper()

    def deeper() -> None:
        raise error from cause

    with pytest.raises(ValueError, match="mine") as caught:
        chat("alice")
    assert caught.value is error
    assert error.__cause__ is cause
    assert error.__context__ is None
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names[-2:] == ["chat", "deeper"]
    assert not hasattr(error, "__notes__")


# Rule 14: a hold settles in the window in which it was taken.


def hold_over(budget: TokenBudget, time: time_machine.Traveller, held: int, passing: timedelta, result: int) -> None:
    """Make a call that holds some tokens, while which time passes, and that uses others."""

    @token_budget(budget, key="user", reserve=held)
    def chat(user: str) -> object:
        time.shift(passing)
        return reply(result)

    chat("alice")
    assert open_holds(budget) == 0


@pytest.mark.parametrize("result", [10, 60, 500], ids=["less", "as held", "more"])
def test_rule_14_a_calendar_hold_taken_before_midnight_settles_there(time: time_machine.Traveller, result: int) -> None:
    budget = TokenBudget("100/day")
    time.move_to(datetime(2026, 11, 23, 23, 59, 59, tzinfo=UTC))
    hold_over(budget, time, 60, timedelta(seconds=2), result)
    assert used(budget) == 0
    budget.charge("alice", 100)


def test_rule_14_a_settlement_from_yesterday_does_not_touch_what_was_used_today(time: time_machine.Traveller) -> None:
    budget = TokenBudget("100/day")

    @token_budget(budget, key="user", reserve=60)
    def chat(user: str, result: int) -> object:
        time.shift(timedelta(hours=13))
        budget.charge("alice", 30)
        return reply(result)

    chat("alice", 0)
    assert used(budget) == 30
    time.move_to(NOON + timedelta(days=1))
    hold_over(budget, time, 60, timedelta(hours=11), 45)
    assert used(budget) == 75


def test_rule_14_a_sliding_hold_settles_at_the_time_at_which_it_was_taken(time: time_machine.Traveller) -> None:
    budget = TokenBudget(SlidingWindow("100/hour"))
    hold_over(budget, time, 60, timedelta(minutes=59), 90)
    assert used(budget) == 90
    hold_over(budget, time, 10, timedelta(seconds=0), 4)
    time.shift(timedelta(seconds=60) - timedelta(microseconds=1))
    assert used(budget) == 94
    time.shift(timedelta(microseconds=1))
    assert used(budget) == 4


@pytest.mark.parametrize("result", [10, 500])
def test_rule_14_a_sliding_settlement_does_nothing_once_the_window_is_gone(
    time: time_machine.Traveller, result: int
) -> None:
    budget = TokenBudget(SlidingWindow("100/hour"))
    hold_over(budget, time, 60, timedelta(hours=1), result)
    assert used(budget) == 0


@pytest.mark.parametrize(
    ("held", "seconds", "result", "left_in_use"),
    [
        (60, 0, 30, 30),
        (60, 20, 30, 30),  # 30 unused, 20 of them are back already: 60 - 20 - 10
        (60, 30, 30, 30),
        (60, 50, 30, 10),  # all 30 are back already: 60 - 50
        (60, 90, 30, 0),
        (60, 20, 60, 40),  # as held: 60 - 20
        (60, 10, 90, 80),  # 60 - 10 + 30
        (60, 90, 90, 30),  # full again, and then 30 more
    ],
)
def test_rule_14_a_bucket_gives_back_what_was_not_used_less_what_has_refilled(
    time: time_machine.Traveller, held: int, seconds: int, result: int, left_in_use: int
) -> None:
    budget = TokenBudget(TokenBucket("60/minute", burst=100))
    hold_over(budget, time, held, timedelta(seconds=seconds), result)
    assert used(budget) == left_in_use


# Several limits, several budgets.


def test_several_limits_in_one_budget_are_held_settled_and_refused_together(time: time_machine.Traveller) -> None:
    budget = TokenBudget(SlidingWindow("100/hour"), "150/day")
    hold_over(budget, time, 80, timedelta(), 60)
    with pytest.raises(TokenBudgetExceeded) as refused:
        budget.charge("alice", 41)
    assert str(refused.value.limit) == "100/hour"
    time.shift(3600)
    hold_over(budget, time, 80, timedelta(), 60)
    with pytest.raises(TokenBudgetExceeded) as refused:
        budget.charge("alice", 31)
    assert str(refused.value.limit) == "150/day"
    assert used(budget) == 120
    budget.charge("alice", 30)


def test_several_budgets_on_one_function_each_weigh_for_themselves() -> None:
    tokens, cents = TokenBudget("1000/day", name="tokens"), TokenBudget("1000/day", name="cents")

    @token_budget(tokens, key="user", reserve=50)
    @token_budget(cents, key="team", reserve=200, weigh=lambda usage: usage.input_tokens + 8 * usage.output_tokens)
    def chat(user: str, team: str) -> object:
        assert (used(tokens, "alice"), used(cents, "red")) == (50, 200)
        return reply(20, 5)

    with collect_decisions() as seen:
        chat("alice", "red")
    assert (used(tokens, "alice"), used(cents, "red")) == (25, 60)
    assert open_holds(tokens, "alice") == open_holds(cents, "red") == 0
    assert [(s.name, s.charged, s.held) for d in seen if (s := d.settlement)] == [
        ("tokens", 25, 50),
        ("cents", 60, 200),
    ]


def test_a_budget_that_refuses_leaves_no_hold_on_the_others() -> None:
    wide, narrow = TokenBudget("1000/day"), TokenBudget("10/day")
    chat = token_budget(wide, key="user", reserve=50)(
        token_budget(narrow, key="user", reserve=50)(lambda user: reply(1))
    )
    with pytest.raises(TokenBudgetExceeded):
        chat("alice")
    assert used(wide) == used(narrow) == 0
    assert open_holds(wide) == open_holds(narrow) == 0


def test_the_same_budget_twice_on_a_function_charges_each_identity() -> None:
    budget = TokenBudget("100/day")
    chat = token_budget(budget, key="user", reserve=40)(
        token_budget(budget, key="team", reserve=40)(lambda user, team: reply(25))
    )
    chat("alice", "red")
    assert (used(budget, "alice"), used(budget, "red")) == (25, 25)


def test_a_reset_while_a_hold_is_open_makes_its_settlement_do_nothing() -> None:
    budget = TokenBudget("100/day")

    @token_budget(budget, key="user", reserve=60)
    def chat(user: str) -> object:
        budget.reset("alice")
        assert used(budget) == 0
        budget.charge("alice", 5)
        return reply(90)

    chat("alice")
    assert used(budget) == 5
    assert open_holds(budget) == 0


# What collect_decisions shows.


def test_a_decision_gets_its_settlement_when_the_call_has_ended() -> None:
    while_running = []

    @token_budget("1000/day", key="user", reserve=50, name="tokens")
    def chat(user: str) -> object:
        while_running.extend(decision.settlement for decision in seen)
        return reply(25)

    with collect_decisions() as seen:
        chat("alice")
        chat("alice")
    assert while_running == [None, Settlement("tokens", 25, 25, 50, "reported"), None]
    assert [decision.settlement for decision in seen] == [Settlement("tokens", 25, 25, 50, "reported")] * 2
    assert [decision.remaining for decision in seen] == [950, 925]


def test_a_refused_call_and_a_rate_limit_have_no_settlement() -> None:
    chat = rate_limited("100/day", key="user")(token_budget("10/day", key="user")(lambda user: reply(25)))
    with collect_decisions() as seen:
        chat("alice")
        with pytest.raises(TokenBudgetExceeded):
            chat("alice")
    assert [decision.settlement is not None for decision in seen[:2]] == [False, True]
    assert all(decision.settlement is None for decision in seen[2:])


def test_the_settlement_names_the_budget_by_its_default_name() -> None:
    def chat(user: str) -> object:
        return reply(1)

    decorated = token_budget("10/day", key="user")(chat)
    (budget,) = limiters_of(decorated)
    assert settlement_of(lambda: decorated("alice")).name == budget.name
