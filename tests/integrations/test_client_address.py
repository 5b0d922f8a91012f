"""The address of a client: what it writes itself is never believed, and what cannot be read gives it nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quotalimit import InvalidKey
from quotalimit.integrations.client_address import Header, Proxies, address_in

CLIENT = "203.0.113.9"
PROXY, OUTER_PROXY = "10.0.0.1", "10.9.9.9"


def client(
    *lines: str, peer: str | None = PROXY, proxies: Any = ("10.0.0.0/8",), header: Header = "X-Forwarded-For"
) -> str:
    return Proxies(proxies, header).client(peer, lines)


def forwarded(*lines: str, peer: str | None = PROXY, proxies: Any = ("10.0.0.0/8",)) -> str:
    return client(*lines, peer=peer, proxies=proxies, header="Forwarded")


# Who is believed


@pytest.mark.parametrize("line", ["1.2.3.4", "10.0.0.1", "", "1.2.3.4, 10.0.0.1"])
def test_by_default_it_is_the_peer_whatever_is_written(line: str) -> None:
    assert client(line, peer=CLIENT, proxies=()) == CLIENT
    assert forwarded(f"for={line}", peer=CLIENT, proxies=()) == CLIENT


def test_a_peer_that_is_no_named_proxy_is_the_client_itself() -> None:
    assert client("1.2.3.4", peer=CLIENT) == CLIENT
    assert forwarded("for=1.2.3.4", peer=CLIENT) == CLIENT


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["203.0.113.9"], CLIENT),
        (["1.2.3.4, 203.0.113.9"], CLIENT),  # the client wrote the first
        (["10.0.0.7, 203.0.113.9"], CLIENT),  # even in the name of a proxy
        (["1.2.3.4", "203.0.113.9"], CLIENT),  # lines are one list
        (["1.2.3.4, 203.0.113.9, 10.9.9.9"], CLIENT),  # two proxies
        (["1.2.3.4, 203.0.113.9", "10.9.9.9"], CLIENT),
        (["203.0.113.9:4711"], CLIENT),
        (["  203.0.113.9  "], CLIENT),
        (["2001:db8::17"], "2001:db8::/64"),
        (["[2001:db8::17]:4711"], "2001:db8::/64"),
        (["::ffff:203.0.113.9"], CLIENT),
        (["10.1.1.1, 10.2.2.2"], "10.1.1.1"),  # all are proxies: the one furthest away began it
        ([], PROXY),
    ],
)
def test_x_forwarded_for_is_read_from_the_right_up_to_the_first_stranger(lines: list[str], expected: str) -> None:
    assert client(*lines) == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["for=203.0.113.9"], CLIENT),
        (["For=203.0.113.9;proto=https;by=10.0.0.1"], CLIENT),
        (['for="203.0.113.9:4711"'], CLIENT),
        (["for=1.2.3.4, for=203.0.113.9"], CLIENT),
        (["for=1.2.3.4", "for=203.0.113.9"], CLIENT),
        (["for=203.0.113.9, for=10.9.9.9"], CLIENT),
        (['for="[2001:db8:cafe::17]:4711"'], "2001:db8:cafe::/64"),
        (['for=203.0.113.9;host="a, for=1.2.3.4"'], CLIENT),  # a comma in quotes parts nothing
        (['for=203.0.113.9;host="a\\", for=1.2.3.4"'], CLIENT),
        (['for=_gazonk, for=203.0.113.9;ext="x;for=9.9.9.9"'], CLIENT),
        ([], PROXY),
    ],
)
def test_forwarded_is_read_from_the_right_up_to_the_first_stranger(lines: list[str], expected: str) -> None:
    assert forwarded(*lines) == expected


def test_only_the_header_that_the_proxies_write_is_read() -> None:
    """A proxy that writes one of them lets the other through as the client sent it."""
    assert Proxies(["10.0.0.1"], "X-Forwarded-For").header == "X-Forwarded-For"
    with pytest.raises(ValueError, match="header must be"):
        Proxies(["10.0.0.1"], "X-Real-IP")  # type: ignore[arg-type]


@pytest.mark.parametrize("proxies", [["10.0.0"], ["10.0.0.1/8"], ["proxy.internal"], [""], ["*"]])
def test_a_proxy_that_is_no_address_is_refused_at_once(proxies: list[str]) -> None:
    with pytest.raises(ValueError, match=r"IPv4|host bits"):
        Proxies(proxies, "X-Forwarded-For")


# What cannot be read


UNREADABLE = ["", "unknown", "_hidden", "garbage", "1.2.3", "1.2.3.4.5", "01.2.3.4", "1.2.3.4:x", "1.2.3.4 5.6.7.8"]


@pytest.mark.parametrize("entry", [*UNREADABLE, "[::1", "[::1]x", "[::1]:", "²"])
def test_an_entry_that_cannot_be_read_ends_the_walk_at_the_proxy_that_wrote_it(entry: str) -> None:
    assert address_in(entry) is None
    assert client(f"1.2.3.4, {entry}") == PROXY
    assert client(f"1.2.3.4, {entry}, {OUTER_PROXY}") == OUTER_PROXY
    assert client(f"{entry}, {CLIENT}") == CLIENT


@pytest.mark.parametrize(
    "line",
    [
        "for=",
        "for",
        "by=10.0.0.1",
        "for=1.2.3.4;for=5.6.7.8",
        "for=unknown",
        "for=_hidden",
        "for=1.2.3.4,",
        'for="1.2.3.4',
        'for=1.2.3.4"',
        "for=1.2.3.4;",
        "for= 1.2.3.4",
        "; for=1.2.3.4",
    ],
)
def test_a_line_of_forwarded_that_cannot_be_read_gives_nothing(line: str) -> None:
    assert forwarded(line) == PROXY
    assert forwarded("for=1.2.3.4", line) == PROXY


OF_PROXIES = ["for=203.0.113.9", 'for="[2001:db8::17]:4711"', 'for="203.0.113.9:1";host="a, b";proto=https']

TEXT = st.text(st.sampled_from('for=;, "\\[]:_x1.2.3.4'), max_size=40) | st.sampled_from(
    ['for=1.2.3.4;x="', 'for="1.2.3.4', 'for=1.2.3.4, x="\\', 'for=1.2.3.4;x="\\"', 'x="', "for=1.2.3.4"]
)


@given(TEXT, st.sampled_from(OF_PROXIES))
def test_no_quote_that_a_client_opens_makes_it_somebody_else(forged: str, element: str) -> None:
    """A proxy adds its element to the line that the client began; at best the client passes for that proxy."""
    truth = forwarded(element)
    assert truth in (CLIENT, "2001:db8::/64")
    assert forwarded(f"{forged}, {element}") in (truth, PROXY)
    assert forwarded(forged, element) == truth


@given(st.text(st.sampled_from('1234567890.:[]%, "x\n'), max_size=40), st.sampled_from([CLIENT, "[2001:db8::17]:4711"]))
def test_nothing_that_a_client_writes_before_its_proxy_matters(forged: str, entry: str) -> None:
    assert client(f"{forged}, {entry}") == client(entry) == client(forged, entry)


# Peers


@pytest.mark.parametrize("peer", [None, "", "testclient", "<local>"])
def test_a_peer_without_an_address_has_to_be_named(peer: str | None) -> None:
    with pytest.raises(InvalidKey, match=r'client_address\("unix"\)'):
        client(CLIENT, peer=peer)
    assert client(CLIENT, peer=peer, proxies=["unix"]) == CLIENT
    assert client(f"1.2.3.4, {CLIENT}, {PROXY}", peer=peer, proxies=["unix", PROXY]) == CLIENT
    assert client(peer=peer, proxies=["unix"]) == "unix"
    assert client("garbage", peer=peer, proxies=["unix"]) == "unix"


def test_naming_the_unix_socket_believes_no_peer_that_has_an_address() -> None:
    assert client("1.2.3.4", peer=CLIENT, proxies=["unix"]) == CLIENT


def test_an_ipv6_subscriber_is_one_client() -> None:
    """By /64, however often it changes its address, with or without a scope."""
    assert client(peer="2001:db8::1", proxies=()) == client(peer="2001:db8::ffff:1", proxies=()) == "2001:db8::/64"
    assert client("fe80::1%eth0") == client("fe80::2%eth1") == "fe80::/64"
    assert client("1.2.3.4", peer="2001:db8:1::1", proxies=["2001:db8:1::/48"]) == "1.2.3.4"
