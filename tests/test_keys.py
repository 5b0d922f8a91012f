"""Identities: whose call it is, what is refused, and that no two people are ever one."""

from __future__ import annotations

from collections import namedtuple
from enum import Enum, Flag, IntEnum, IntFlag, StrEnum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotalimit import InvalidKey, RateLimiter, everyone, ip_key, limiters_of, rate_limited
from quotalimit.keys import encode, identify

from .helpers import shown


class Plan(Enum):
    """Members with the values of other identities."""

    ONE = 1
    ALICE = "alice"


class Number(IntEnum):
    """Members that equal numbers."""

    ONE = 1
    TWO = 2


class Tier(StrEnum):
    """Members that equal strings."""

    ALICE = "alice"
    ONE = "1"


class OtherTier(StrEnum):
    """Members that equal those of another class."""

    ALICE = "alice"


class Team(Enum):
    """Members whose `name` and `value` are their own business."""

    RED = ("north", 1)
    BLUE = ("north", 2)

    @property
    def name(self) -> str:  # type: ignore[override]
        return "north"

    @property
    def value(self) -> str:  # type: ignore[override]
        return "north"


class Right(IntFlag):
    """Members that can be combined."""

    READ = 1
    WRITE = 2


class Name(str):
    """A string of a class of its own, as frameworks have them."""

    __slots__ = ()


class Serial(int):
    """A number of a class of its own."""


Point = namedtuple("Point", "x y")

PEOPLE: list[Any] = [
    *("", "1", "alice", "salice", "i1", "b1", "t", "2:s1", "a/b", "1,2", "None", "\ud800", "\udc00", "\ud800\udc00"),
    *("\U00010000", "é", "e\u0301", "x" * 255, "x" * 256, "x" * 257, "x" * 10_000, "x" * 9_999 + "y"),
    *(0, 1, -1, 16, 10, 2**63, -(2**63), 2**64, 10**500, 10**500 + 1),
    *(b"", b"1", b"alice", b"salice"),
    *(UUID(int=1), UUID(int=2), UUID(int=1).bytes, str(UUID(int=1)), UUID(int=1).hex),
    *(Plan.ONE, Plan.ALICE, Number.ONE, Number.TWO, Tier.ALICE, Tier.ONE, OtherTier.ALICE, Right.READ, *Team),
    *(Right.READ | Right.WRITE, Right(0)),
    *(("alice",), ("a/b", "c"), ("a", "b/c"), ("a", "b", "c"), ("ab", "c"), ("a", "bc"), ("abc",), ("", "")),
    *(("",), ("1",), (1,), (b"1",), (1, "1"), ("1", 1), (Number.ONE,), (UUID(int=1),), (Tier.ALICE, "alice")),
    *(("1:sa",), ("a", "2:sb"), ("a2:sb",), ("x" * 300, "y"), ("x" * 300, "z"), (b"x" * 300,)),
]


def test_different_identities_are_different_people() -> None:
    """A table by hand: on a limiter of one call, each of these is admitted once."""
    people = list({(type(key), repr(key)): key for key in PEOPLE}.values())
    limiter = RateLimiter("1/day")
    assert [key for key in people if not limiter.allow(key)] == []
    assert [key for key in people if limiter.allow(key)] == []
    assert len({encode(key) for key in people}) == len(people)


@pytest.mark.parametrize(
    ("key", "same"),
    [
        (Name("alice"), "alice"),
        (Serial(7), 7),
        (Point("a", "b"), ("a", "b")),
        ((Name("a"), Serial(1)), ("a", 1)),
        (Tier("alice"), Tier.ALICE),
        (UUID("00000000-0000-0000-0000-000000000001"), UUID(int=1)),
        (10**30, int("1" + "0" * 30)),
    ],
)
def test_equal_identities_of_a_subclass_are_the_same_person(key: Any, same: Any) -> None:
    limiter = RateLimiter("1/day")
    assert limiter.allow(key)
    assert not limiter.allow(same)
    assert identify(key) == identify(same)
    assert encode(key) == encode(same)


def test_combinations_of_flags_that_have_no_name_are_different_people() -> None:
    class Loose(IntFlag):
        ONE = 1

    class Kept(Flag):
        ONE = 1
        TWO = 2

    keys = [Loose(8), Loose(16), Loose(9), Kept(0), Kept(3), Kept(1)]
    assert len({identify(key) for key in keys}) == len(keys)


REFUSED: list[Any] = [
    *(None, True, False, 1.0, float("nan"), 1j, [], ["alice"], {}, {"alice"}, bytearray(b"a"), object(), Plan, len),
    *((), ("alice", None), ("alice", True), (1.5,), (("alice",),), ("alice", ()), (["alice"],), (Point(1, 2),)),
]


@pytest.mark.parametrize("key", REFUSED, ids=shown)
def test_what_is_no_identity_is_refused(key: Any) -> None:
    limiter = RateLimiter("1/day")
    for use in (limiter.allow, limiter.acquire, limiter.peek, limiter.reset, encode, identify):
        with pytest.raises(InvalidKey):
            use(key)

    @rate_limited("1/day", key=lambda: key, name="chat")
    def chat() -> None:
        raise AssertionError("not reached")

    with pytest.raises(InvalidKey, match="chat"):
        chat()


def test_a_refused_key_is_not_in_the_message() -> None:
    class Secret:
        def __repr__(self) -> str:
            return "alice@example.org"

    for key in (Secret(), ["alice@example.org"], ("x", ["alice@example.org"]), (("alice@example.org",),)):
        with pytest.raises(InvalidKey) as caught:
            RateLimiter("1/day").allow(key)  # type: ignore[arg-type]
        assert "example.org" not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize("error", [TypeError, InvalidKey])
def test_an_invalid_key_is_a_type_error(error: type[Exception]) -> None:
    with pytest.raises(error, match="None"):
        identify(None)


PARTS = st.one_of(
    st.text(st.characters(), max_size=4),
    st.text("\ud800\udc00\U00010000:0123sibtue#", max_size=6),
    st.integers(-300, 300),
    st.integers(),
    st.binary(max_size=4),
    st.uuids(),
    st.integers(0, 3).map(lambda number: UUID(int=number)),
    st.sampled_from([*Plan, *Number, *Tier, *OtherTier, *Right]),
)
KEYS = st.one_of(PARTS, st.lists(PARTS, min_size=1, max_size=3).map(tuple))


def same_person(one: object, other: object) -> bool:
    """Whether two keys are of the same type and equal, part by part."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same_person, one, other))
    return type(one) is type(other) and one == other


@settings(deadline=None, max_examples=200)
@given(KEYS, KEYS)
def test_the_encoding_tells_any_two_people_apart(one: Any, other: Any) -> None:
    assert (encode(one) == encode(other)) == same_person(one, other)
    assert (identify(one) == identify(other)) == same_person(one, other)


@settings(deadline=None, max_examples=150)
@given(st.text(st.characters()), KEYS)
def test_no_key_looks_like_the_encoding_of_another(text: str, key: Any) -> None:
    written = encode(key)
    for look_alike in (text, written, written.decode("latin-1"), encode(text)):
        assert same_person(look_alike, key) or identify(look_alike) != identify(key)


def test_long_keys_are_short_in_the_store_and_still_apart() -> None:
    longest = max(len(encode(key)) for key in PEOPLE)
    assert longest <= 256
    digest = encode("x" * 10_000)
    assert encode(digest) != digest


def test_everyone_is_one_count() -> None:
    @rate_limited("2/day", key=everyone)
    def chat(user: str) -> None: ...

    chat("alice")
    chat("bob")
    assert limiters_of(chat)[0].peek(everyone()).remaining == 0


@pytest.mark.parametrize(
    ("address", "identity"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("::FFFF:cb00:7107", "203.0.113.7"),
        ("::ffff:203.0.113.7%eth0", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("2001:0db8:0001:0002:ffff:ffff:ffff:ffff", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("fe80::2%wlan0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_ip_key_is_the_address_or_the_network_of_a_subscriber(address: str, identity: str) -> None:
    assert ip_key(address) == identity


@pytest.mark.parametrize(
    "nonsense",
    [
        *("", "testclient", "203.0.113", "203.0.113.256", "203.0.113.7:80", "[2001:db8::1]", " 203.0.113.7"),
        *("203.0.113.07", "2001:db8::/64", "203.0.113.7, 198.51.100.1", "\ud800"),
        *(None, 7, True, b"\x7f\x00\x00\x01", 3.5, ["::1"]),
    ],
    ids=repr,
)
def test_ip_key_refuses_nonsense_without_showing_it(nonsense: Any) -> None:
    with pytest.raises(InvalidKey) as caught:
        ip_key(nonsense)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    if isinstance(nonsense, str) and nonsense:
        assert nonsense not in str(caught.value)


def test_ip_key_serves_as_a_key_function() -> None:
    @rate_limited("1/day", key=lambda address: ip_key(address))
    def chat(address: str) -> None: ...

    chat("2001:db8::1")
    assert limiters_of(chat)[0].peek(ip_key("2001:db8::2")).remaining == 0
