"""Hostile input: whatever is read, nothing hangs, no foreign exception comes out, and no charge is forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quotalimit import (
    InvalidKey,
    InvalidLimit,
    MemoryStore,
    Rate,
    RateLimiter,
    SlidingWindow,
    TokenBudget,
    Usage,
    estimate_tokens,
    ip_key,
    limiters_of,
    read_usage,
    record_usage,
    store_from_url,
    token_budget,
)
from quotalimit.amounts import MAX_UNITS
from quotalimit.estimation import weigh_answer, weigh_arguments
from quotalimit.integrations.client_address import Proxies, address_in
from quotalimit.keys import LONGEST, encode, identify

from .helpers import open_holds, shown, used

MEGABYTE = 1_000_000
RIGHT_TO_LEFT = "\u202e20/minute\u202c"
SURROGATE = "\ud800"

texts = st.text(st.characters(exclude_categories=()), max_size=40)
"""Any text, surrogates too."""

notation = st.text(st.sampled_from("0123456789_,kKM/per minutshoyd\u0660\u202e\ud800\x00\n"), max_size=30)
"""Text that is almost a rate."""


@pytest.fixture(autouse=True)
def _few_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never ends is given up a little earlier, for the sake of the suite's time."""
    monkeypatch.setattr("quotalimit.estimation._MOST_CONTAINERS", 5_000)


def nested(depth: int, inner: Any) -> Any:
    for _ in range(depth):
        inner = [inner]
    return inner


@settings(deadline=None, max_examples=200)
@given(st.one_of(texts, notation))
def test_a_rate_is_read_or_refused(text: str) -> None:
    try:
        rate = Rate.parse(text)
    except InvalidLimit:
        return
    assert Rate.parse(str(rate)) == rate
    assert text.isascii()


@pytest.mark.parametrize(
    "text",
    [
        "9" * MEGABYTE + "/minute",
        "1/" + "9" * MEGABYTE + " minutes",
        "1" + "_1" * (MEGABYTE // 2) + "/minute",
        " " * MEGABYTE + "1/minute",
        "1/minute" + " " * MEGABYTE,
        "1" + ",111" * (MEGABYTE // 4),
        RIGHT_TO_LEFT,
        "20/minut\u0435",  # a Cyrillic letter
        "\u0662\u0660/minute",  # Arabic digits
        "20/minute" + SURROGATE,
        "20/minute\x00",
        "1e9/minute",
        "-1/minute",
        "inf/minute",
        "nan/minute",
        "",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_what_only_looks_like_a_rate_is_refused(text: str) -> None:
    with pytest.raises(InvalidLimit) as refusal:
        Rate.parse(text)
    assert len(str(refusal.value)) < 2_000


@pytest.mark.parametrize("value", [None, b"20/minute", 20, math.nan, [], nested(100, "1/s"), object()], ids=shown)
def test_what_is_no_text_is_no_rate(value: Any) -> None:
    with pytest.raises(InvalidLimit):
        Rate.parse(value)


class Raises:
    """Raises whatever is asked of it."""

    def __getattribute__(self, name: str) -> Any:
        raise ZeroDivisionError(name)


class Endless:
    """Has every attribute, each as endless as itself."""

    def __getattr__(self, name: str) -> Any:
        return Endless()


class EndlessMapping(dict[str, Any]):
    """Has every item, each as endless as itself."""

    def __missing__(self, name: str) -> Any:
        return EndlessMapping()

    def get(self, name: str, default: Any = None) -> Any:
        return EndlessMapping()

    def __contains__(self, name: object) -> bool:
        return True


class RaisingMapping(Mapping[str, Any]):
    """A dict that cannot be read."""

    def __getitem__(self, name: str) -> Any:
        raise ZeroDivisionError

    def __iter__(self) -> Iterator[str]:
        raise ZeroDivisionError

    def __len__(self) -> int:
        raise ZeroDivisionError


class LyingClass:
    """Says that it is of a class that it is not, and raises when asked otherwise."""

    @property
    def __class__(self) -> Any:
        raise ZeroDivisionError


def cyclic_dict() -> Any:
    cycle: dict[str, Any] = {}
    for name in ("usage", "message", "response", "delta", "data", "content", "choices"):
        cycle[name] = cycle
    return cycle


def cyclic_list() -> Any:
    cycle: list[Any] = []
    cycle += [cycle, {"content": cycle}]
    return cycle


HOSTILE: dict[str, Any] = {
    "raises": Raises(),
    "endless": Endless(),
    "endless mapping": EndlessMapping(),
    "raising mapping": RaisingMapping(),
    "lying class": LyingClass(),
    "usage that raises": {"usage": Raises()},
    "usage that is endless": {"usage": Endless()},
    "counts that raise": {"usage": {"prompt_tokens": Raises(), "completion_tokens": 1}},
    "a cycle of dicts": cyclic_dict(),
    "a cycle of lists": cyclic_list(),
    "deep lists": nested(200_000, "text"),
    "deep usage": {"usage": nested(200_000, 1)},
    "infinite": {"usage": {"prompt_tokens": math.inf, "completion_tokens": 1}},
    "not a number": {"usage": {"prompt_tokens": math.nan, "completion_tokens": 1}},
    "negative": {"usage": {"prompt_tokens": -(10**30), "completion_tokens": 1}},
    "boolean": {"usage": {"prompt_tokens": True, "completion_tokens": 1}},
    "huge": {"usage": {"prompt_tokens": 10**5000, "completion_tokens": 1}},
    "numbers as text": {"usage": {"prompt_tokens": "12", "completion_tokens": "3"}},
    "a total below its parts": {"usage": {"prompt_tokens": -1, "completion_tokens": -1, "total_tokens": 0}},
    "a megabyte of text": "\u202e" * MEGABYTE,
    "surrogates": SURROGATE * 1_000,
    "surrogates as names": {SURROGATE: {SURROGATE: 1}, "usage": {SURROGATE: 1}},
    "names that are no text": {None: 1, 7: 2, ("a", 1): 3, b"usage": 4},
    "a dict of a hundred thousand": {"usage": dict.fromkeys(map(str, range(100_000)), 1)},
}
"""Results of calls as nobody should return them. None of them reports usage that makes sense."""


@pytest.mark.parametrize("name", HOSTILE)
def test_rule_10_usage_that_makes_no_sense_is_unknown(name: str) -> None:
    assert read_usage(HOSTILE[name]) is None


@pytest.mark.parametrize("name", HOSTILE)
def test_an_estimate_is_always_made(name: str) -> None:
    argument = HOSTILE[name]
    assert 1 <= estimate_tokens(argument, prompt=argument, max_tokens=argument) <= MAX_UNITS


@pytest.mark.parametrize("name", HOSTILE)
def test_rule_8_a_call_that_returns_it_is_charged_its_reserve(name: str) -> None:
    result = HOSTILE[name]

    @token_budget("1_000_000/day", key="user", reserve=9)
    def ask(user: str) -> Any:
        assert record_usage(result) is False
        return result

    assert ask("alice") is result
    (budget,) = limiters_of(ask)
    assert used(budget) == 9
    assert open_holds(budget) == 0


@pytest.mark.parametrize("name", HOSTILE)
def test_rule_8_a_call_without_a_reserve_that_returns_it_is_charged_an_estimate(name: str) -> None:
    result = HOSTILE[name]

    @token_budget("100_000_000/day", key="user")
    def ask(user: str) -> Any:
        return result

    assert ask("alice") is result
    (budget,) = limiters_of(ask)
    assert used(budget) >= 1
    assert open_holds(budget) == 0


@pytest.mark.parametrize("name", HOSTILE)
def test_rule_8_a_stream_that_yields_it_is_charged_what_else_it_tells(name: str) -> None:
    item = HOSTILE[name]

    @token_budget("1_000_000/day", key="user", reserve=9)
    def stream(user: str) -> Iterator[Any]:
        yield item
        yield Usage(input_tokens=5)

    assert next(items := stream("alice")) is item
    assert list(items) == [Usage(input_tokens=5)]
    (budget,) = limiters_of(stream)
    assert used(budget) == 5
    assert open_holds(budget) == 0


class Made(dict[str, Any]):
    """Has every item, and makes up its values for as long as it is asked."""

    made = 0

    def _make(self) -> Made:
        Made.made += 1
        return Made()

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Made:
        return self._make()

    def get(self, name: str, default: Any = None) -> Made:
        return self._make()

    def values(self) -> Any:
        while True:
            yield self._make()


class MadeList(list[Any]):
    """Says that it is short, and never ends."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            Made.made += 1
            yield MadeList()


@pytest.mark.parametrize("endless", [Made, MadeList])
def test_what_never_ends_is_left_after_a_bounded_number_of_items(
    endless: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it would go on: what is looked at is counted, and not the time."""
    monkeypatch.undo()
    for weigh in (weigh_answer, lambda value: weigh_arguments([value]), read_usage):
        monkeypatch.setattr(Made, "made", 0)
        weigh(endless())
        assert Made.made <= 20_000


def test_a_long_plain_conversation_is_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    messages = [{"role": "user", "content": [{"type": "text", "text": "word"}]} for _ in range(8_000)]
    assert estimate_tokens(messages) >= 8_000


@pytest.mark.parametrize("number", [-1, -0.5, math.nan, math.inf, -math.inf, True, 10**400], ids=str)
def test_rule_10_a_recorded_number_that_makes_no_sense_is_refused(number: Any) -> None:
    @token_budget("1_000_000/day", key="user", reserve=9)
    def ask(user: str) -> None:
        with pytest.raises(ValueError, match="usage must be a number"):
            record_usage(number)

    ask("alice")
    assert used(limiters_of(ask)[0]) == 9


leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.binary(max_size=10))
names = st.sampled_from([
    "usage", "usage_metadata", "meta", "message", "response", "delta", "data", "metadata", "content", "type", "id",
    "prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens", "tokens", "billed_units",
    "cache_read_input_tokens", "inputTokens", "outputTokens", "prompt_token_count", "prompt_tokens_details",
    "iterations",
])  # fmt: skip
answers = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=4)),
    max_leaves=12,
)


whatever = MemoryStore()


@settings(deadline=None, max_examples=200)
@example([{"prompt_tokens": 2**52}, {"prompt_tokens": 2**52}])
@given(answers)
def test_whatever_a_call_returns_its_charge_is_known_usage_or_its_reserve(answer: Any) -> None:
    budget = TokenBudget(f"{MAX_UNITS}/day", store=whatever)

    @token_budget(budget, key="user", reserve=9)
    def ask(user: str) -> Any:
        return answer

    ask("alice")
    usage = read_usage(answer)
    assert used(budget) == (9 if usage is None else usage.total_tokens)
    if usage is not None:
        assert usage.is_known
        assert usage.total_tokens <= MAX_UNITS
    assert open_holds(budget) == 0


parts = st.one_of(texts, st.integers(), st.binary(max_size=20), st.uuids())
keys = st.one_of(parts, st.lists(parts, min_size=1, max_size=3).map(tuple))


@settings(deadline=None, max_examples=200)
@given(keys, keys)
def test_two_keys_are_one_identity_only_if_they_are_equal(one: Any, other: Any) -> None:
    same = type(one) is type(other) and one == other
    assert (identify(one) == identify(other)) == same
    assert (encode(one) == encode(other)) == same
    assert len(encode(one)) <= LONGEST


def test_huge_keys_are_told_apart_and_cost_little() -> None:
    huge = [
        "x" * MEGABYTE,
        "x" * MEGABYTE + "y",
        SURROGATE * MEGABYTE,
        b"x" * MEGABYTE,
        1 << MEGABYTE,
        (1 << MEGABYTE) + 1,
    ]
    assert len({encode(key) for key in huge}) == len(huge)
    assert all(len(encode(key)) <= LONGEST for key in huge)
    many = tuple(map(str, range(100_000)))
    assert encode(many) != encode(many[:-1])


@pytest.mark.parametrize(
    "key", [None, True, 1.5, math.nan, math.inf, [], {}, (), object(), ("a", ("b",)), ("a", None), Raises, ("a", True)]
)
def test_what_is_no_identity_is_refused(key: Any) -> None:
    with pytest.raises(InvalidKey):
        identify(key)


@settings(deadline=None, max_examples=150)
@given(st.one_of(texts, st.tuples(st.sampled_from(["memory", "sqlite", "http", ""]), texts).map("://".join)))
def test_the_url_of_a_store_is_read_or_refused(url: str) -> None:
    if "sqlite" in url:  # it would make files
        return
    try:
        store = store_from_url(url)
    except ValueError:
        return
    assert isinstance(store, MemoryStore)


@pytest.mark.parametrize(
    "url", ["", "sqlite://", "sqlite:///", "sqlite://host/x.db", "sqlite:///x.db?mode=memory", "sqlite:///a%00b",
            "file:///etc/passwd", "memory", "http://[", "javascript:alert(1)", "\ud800://", "x" * MEGABYTE]
)  # fmt: skip
def test_a_url_that_names_no_store_is_refused_and_makes_no_file(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^"):
        store_from_url(url)
    assert not list(tmp_path.iterdir())


PROXIES = ("10.0.0.0/8", "::ffff:0:0/96")
entries = st.one_of(
    texts, st.ip_addresses().map(str), st.text(st.sampled_from('0123456789abcdef.:[]%"=;, forunkw\\_'), max_size=40)
)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(entries, max_size=4).map(",".join), max_size=3), st.sampled_from(["X-Forwarded-For", "Forwarded"])
)
def test_a_client_is_an_address_whatever_the_header(lines: list[str], header: Any) -> None:
    client = Proxies(PROXIES, header).client("10.0.0.1", lines)
    assert ip_key(client.partition("/")[0]) == client
    assert Proxies(("192.0.2.1",), header).client("10.0.0.1", lines) == "10.0.0.1"


@pytest.mark.parametrize(
    "line",
    ["," * MEGABYTE, "for=" * (MEGABYTE // 4), 'for="' + "\\" * MEGABYTE, 'for="' * 100_000, "[" * MEGABYTE,
     ":" * MEGABYTE,
     "1." * MEGABYTE, "for=1.2.3.4;" * 50_000, " \t" * MEGABYTE],
    ids=lambda line: ascii(line[:6]),
)  # fmt: skip
@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded"])
def test_a_header_of_a_megabyte_names_the_peer(line: str, header: Any) -> None:
    assert Proxies(PROXIES, header).client("10.0.0.1", [line]) == "10.0.0.1"


@settings(deadline=None, max_examples=150)
@given(texts)
def test_an_entry_is_an_address_or_none(text: str) -> None:
    address = address_in(text)
    assert address is None or ip_address(str(address)) == address


@pytest.mark.parametrize("usage", [Usage(input_tokens=10**30), MAX_UNITS + 1, 10**30], ids=shown)
def test_rule_8_usage_too_large_to_count_is_unknown(usage: Any) -> None:
    budget = TokenBudget(SlidingWindow("1000/day"))
    ask = token_budget(budget, key="user", reserve=7, usage=lambda _: usage)(lambda user: "answer")
    assert ask("alice") == "answer"
    assert used(budget) == 7


def test_rule_8_a_stream_that_tells_more_than_can_be_counted_harms_nobody_else() -> None:
    """Its responses are each possible; together they are more than an array holds."""
    budget = TokenBudget(SlidingWindow("100/day"))
    other = RateLimiter("5/minute")

    @token_budget(budget, key="user")
    def stream(user: str) -> Iterator[Any]:
        for number in range(1_100):
            yield {"id": f"c{number}", "object": "chunk", "usage": {"prompt_tokens": MAX_UNITS, "completion_tokens": 0}}

    assert len(list(stream("eve"))) == 1_100
    assert used(budget, "eve") == MAX_UNITS
    assert other.allow("eve")
    budget.reset("eve")
    assert used(budget, "eve") == 0


def test_more_calls_in_flight_than_can_be_counted_harm_nobody_else() -> None:
    budget = TokenBudget(SlidingWindow("100/day"))
    holds = [budget.reserve("eve", 0) for _ in range(1_100)]
    for hold in holds:
        hold.settle(MAX_UNITS)
    assert used(budget, "eve") >= MAX_UNITS
    assert RateLimiter("5/minute").allow("eve")
