"""Rule 17: the usage that the items of a stream tell is folded as their provider means it. The wire is written by hand.

tests/sdk does the same with all that SDKs make of a stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from quotalimit import TokenBudget, Usage, record_usage, token_budget
from quotalimit.amounts import MAX_UNITS
from quotalimit.usage import without
from tests.helpers import reply, used


def charged(items: Iterable[Any], **options: Any) -> int:
    """What a generator of these items is charged."""
    budget = TokenBudget("1M/day")

    @token_budget(budget, key="user", **options)
    def stream(user: str) -> Iterator[Any]:
        yield from items

    list(stream("alice"))
    return used(budget)


def chunk(total: int, **more: Any) -> dict[str, Any]:
    """An item of a stream in the shape of Gemini's, without an id: a running total."""
    return {"usageMetadata": {"promptTokenCount": total}, **more}


def by_itself(item: Any) -> Any:
    return item


def test_each_count_of_a_usage_is_nothing_unless_given() -> None:
    assert Usage() == (0, 0, 0, 0, 0, 0)
    assert Usage(3) == (3, 0, 0, 0, 0, 3)


@pytest.mark.parametrize(("told", "total"), [(0, 7), (6, 7), (7, 7), (9, 9)])
def test_the_total_of_a_usage_is_at_least_input_and_output(told: int, total: int) -> None:
    assert Usage(3, 4, total_tokens=told).total_tokens == total


def test_usages_go_together_with_usages_alone() -> None:
    one, other = Usage(5, 2, 1, 0, 2), Usage(4, 3, 0, 1, 1, 9)
    assert one + other == Usage(9, 5, 1, 1, 3, 16)
    assert one | other == Usage(5, 3, 1, 1, 2, 9)
    for wrong in (tuple(other), 3):
        with pytest.raises(TypeError):
            one + wrong  # type: ignore[operator]
        with pytest.raises(TypeError):
            one | wrong  # type: ignore[operator]


@pytest.mark.parametrize(
    ("whole", "part", "rest"),
    [
        ([Usage(5, 3)], [Usage(2, 3)], [Usage(3, 0)]),
        ([Usage(5, 3)], [Usage(7, 1)], [Usage(0, 2)]),
        ([Usage(5, 3)], [Usage(5, 3)], []),
        ([Usage(5, 3)], [4], [Usage(5, 3)]),
        ([9], [4], [5]),
        ([9], [9], []),
        ([9], [10], []),
        ([9], [Usage(5, 3)], [9]),
        ([Usage(5, 3), 9], [Usage(1, 1), 4], [Usage(4, 2), 5]),
    ],
)
def test_what_a_whole_tells_beyond_its_part_is_never_negative(whole: Any, part: Any, rest: Any) -> None:
    assert without(whole, part) == rest


def test_rule_17_usages_of_a_callers_own_are_running_totals_of_one_response() -> None:
    assert charged([Usage(10, 1), None, Usage(10, 5), Usage(0, 7)], usage=by_itself) == 17


def test_rule_17_cached_input_of_a_running_total_is_a_part_of_the_input() -> None:
    assert charged([Usage(10, 1, cache_read_tokens=4), Usage(12, 5)], usage=by_itself) == 17


@pytest.mark.parametrize("usage", [{"input_tokens": 30, "output_tokens": 20}, {"output_tokens": 40}], ids=len)
def test_rule_17_caches_that_only_the_start_of_a_message_tells_are_beside_the_input_that_its_end_tells(
    usage: dict[str, int],
) -> None:
    start = {"input_tokens": 10, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 50, "output_tokens": 1}
    message = {"type": "message_start", "message": {"id": "msg", "usage": start}}
    assert charged([message, "Hello.", {"type": "message_delta", "usage": usage}]) == 200


def test_rule_17_different_responses_add_up_also_after_chunks_that_do_not_say_whose_they_are() -> None:
    assert charged([chunk(10), chunk(15, responseId="a"), chunk(12), chunk(7, responseId="b")]) == 22
    assert charged([chunk(10, responseId="a"), chunk(15), chunk(7, responseId="b")]) == 22


def test_rule_17_of_responses_that_do_not_say_which_they_are_another_begins_where_the_output_falls() -> None:
    def gemini(written: int, **more: str) -> dict[str, Any]:
        return {"usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": written}, **more}

    assert charged([each for _ in range(3) for each in (gemini(1), chunk(10), gemini(90))]) == 300
    assert charged([gemini(90, responseId="a"), gemini(1)]) == 100


def test_rule_17_what_adds_up_goes_together_with_running_totals() -> None:
    assert charged([reply(10, 3), reply(10, 3), chunk(5), chunk(6)]) == 32


def test_rule_8_what_is_written_after_a_number_was_told_is_not_estimated_beside_it() -> None:
    assert charged([500, "a text of more than one token", 600, "and another"], usage=by_itself) == 1_100


@pytest.mark.parametrize("options", [{}, {"usage": lambda item: item.usage.total_tokens}], ids=["read", "number"])
def test_rule_8_an_item_that_was_recorded_and_tells_its_usage_counts_once(options: dict[str, Any]) -> None:
    def items() -> Iterator[Any]:
        item = reply(12)
        assert record_usage(item)
        yield item

    assert charged(items(), **options) == 12


def answer(user: str, result: Any, recorded: Any = None) -> Any:
    if recorded is not None:
        record_usage(recorded)
    return result


@pytest.mark.parametrize("options", [{}, {"weigh": lambda usage: usage.total_tokens}], ids=["plain", "weighed"])
def test_rule_8_a_list_of_responses_is_charged_their_sum(options: dict[str, Any]) -> None:
    one, other = reply(100, 20), reply(3)
    for result, tokens in (
        ([one, other], 123),
        ((one, "an answer", 7, None), 120),
        ([[one], [(other, [Usage(5)])]], 128),
        ([one, one, SimpleNamespace(usage=one.usage), other, [one]], 123),
        ([{"usage": {"prompt_tokens": 5}}, {"usage": {"prompt_tokens": -1}}], 5),
    ):
        budget = TokenBudget("1M/day")
        token_budget(budget, key="user", reserve=50, **options)(answer)("alice", result)
        assert used(budget) == tokens


def test_rule_10_a_list_of_more_than_can_be_counted_is_charged_its_reserve() -> None:
    budget = TokenBudget("1M/day")
    token_budget(budget, key="user", reserve=50)(answer)("alice", [reply(MAX_UNITS), reply(MAX_UNITS)])
    assert used(budget) == 50


@pytest.mark.parametrize("result", [[], ["text"], [1, 2.5], [[]], ({"role": "user"},)], ids=repr)
def test_rule_8_a_list_that_reports_nothing_is_charged_its_reserve(result: Any) -> None:
    budget = TokenBudget("1M/day")
    token_budget(budget, key="user", reserve=50)(answer)("alice", result)
    assert used(budget) == 50


def test_rule_8_each_response_of_a_list_counts_once_be_it_recorded_or_settled() -> None:
    one, other, third = reply(100), reply(20), reply(3)
    for recorded in ([one], [one, other], [one, [one]]):
        budget = TokenBudget("1M/day")
        token_budget(budget, key="user")(answer)("alice", [one, other], recorded)
        assert used(budget) == 120
        with budget.reserve("bob", 50) as hold:
            record_usage(recorded)
            hold.settle([one, other, third])
        assert used(budget, "bob") == 123


def test_rule_12_each_response_of_a_list_that_a_nested_call_returned_counts_once() -> None:
    one, other = TokenBudget("1M/day"), TokenBudget("1M/day")
    inner = token_budget(other, key="user")(answer)

    @token_budget(one, key="user")
    def outer(user: str) -> list[Any]:
        return [*inner(user, [reply(100), reply(20)]), reply(3)]

    outer("alice")
    assert (used(one), used(other)) == (123, 120)


def test_rule_17_the_responses_in_an_item_of_a_stream_are_folded_like_items() -> None:
    assert charged([(chunk(10, responseId="a"), {"node": 1}), (chunk(15, responseId="a"), {"node": 2})]) == 15


def test_rule_8_a_list_without_end_is_read_in_bounds() -> None:
    endless: list[Any] = [reply(3)]
    endless += [endless] * 10
    deep: list[Any] = [reply(4)]
    for _ in range(50_000):
        deep = [deep]
    budget = TokenBudget("1M/day")
    token_budget(budget, key="user", reserve=50)(answer)("alice", endless)
    assert used(budget) == 3
    token_budget(budget, key="user", reserve=50)(answer)("bob", deep)
    assert used(budget, "bob") == 50
    token_budget(budget, key="user", reserve=50)(answer)("carol", [0] * 5_000_000 + [reply(4)])
    assert used(budget, "carol") == 50
