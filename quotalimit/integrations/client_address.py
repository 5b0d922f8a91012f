"""Whose request it is, by an address that the client cannot forge.

`X-Forwarded-For` and `Forwarded` (RFC 7239) are written by whoever sends them: each proxy adds, at the right, the
address that it was called from. So they count only where the peer is a proxy that was named, and are read from the
right; the first address that is not one of the named proxies' is the client. What stands further left is the
client's own invention. An entry that cannot be read ends the walk at the proxy that wrote it.

Only one of the two headers is read: a proxy that writes one lets the other through as the client sent it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final, Literal, TypeAlias

from quotalimit.errors import InvalidKey
from quotalimit.keys import ip_key

Address: TypeAlias = IPv4Address | IPv6Address

Header: TypeAlias = Literal["X-Forwarded-For", "Forwarded"]
"""The header that the proxies write."""

_PAIR: Final = re.compile(
    r"""[ \t]* (?P<name> [A-Za-z]+ ) = (?P<value> "(?:[^"\\]|\\.)*" | [^\s",;\\]+ ) [ \t]* (?P<end> [;,] | $ )""",
    re.VERBOSE,
)
"""A parameter of `Forwarded`, and what ends it: RFC 7239, section 4, but that addresses need not be quoted."""

UNIX: Final = "unix"
"""Names, among the proxies, a peer that is connected by a Unix socket and so has no address."""


class Proxies:
    """The proxies that are believed, and the header that they write."""

    def __init__(self, proxies: Iterable[str], header: Header) -> None:
        if header not in ("X-Forwarded-For", "Forwarded"):
            raise ValueError(f"header must be 'X-Forwarded-For' or 'Forwarded', not {header!r}")
        names = tuple(proxies)
        self.header: Header = header
        self._unix = UNIX in names
        self._networks = [ip_network(name) for name in names if name != UNIX]

    def client(self, peer: str | None, lines: Sequence[str]) -> str:
        """The key of the client of a request: by its peer, and by the lines of the header, the first line first.

        Raises `InvalidKey` for a peer without an address that is not named among the proxies.
        """
        found = address_in(peer or "")
        if found is None and not self._unix:
            raise InvalidKey(
                f"the server tells no address of its peer ({peer!r}): if that is your proxy, on a Unix socket, name it "
                'with client_address("unix"); give a test client an address'
            )
        if found is None or self._believes(found):
            for entry in reversed(_entries(lines, self.header)):
                address = address_in(entry)
                if address is None:
                    break
                found = address
                if not self._believes(address):
                    break
        return UNIX if found is None else ip_key(found)

    def _believes(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def address_in(text: str) -> Address | None:
    """The address in an entry: bare, or with brackets and a port; None if there is none."""
    text = text.strip()
    if text.startswith("["):
        text, bracket, port = text[1:].partition("]")
        if not bracket or (port and not (port[0] == ":" and _is_port(port[1:]))):
            return None
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
        if not _is_port(port):
            return None
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _entries(lines: Sequence[str], header: Header) -> list[str]:
    """The entries of a header, the first proxy's first. An empty one stands for what cannot be read."""
    if header == "X-Forwarded-For":
        return [entry for line in lines for entry in line.split(",")]
    return [entry for line in lines for entry in _forwarded(line)]


def _forwarded(line: str) -> list[str]:
    """The `for` of each element of a line of `Forwarded`.

    A line that is not wholly well-formed is one entry that cannot be read: what a client sent before the proxy added
    its element may open a quote, and so make the proxy's element part of its own text.
    """
    entries, nodes, place = list[str](), list[str](), 0
    while place < len(line):
        pair = _PAIR.match(line, place)
        if pair is None:
            return [""]
        if pair["name"].lower() == "for":
            nodes.append(pair["value"].strip('"'))
        if pair["end"] != ";":
            entries.append(nodes[0] if len(nodes) == 1 else "")
            nodes = []
        place = pair.end()
    return [""] if line.rstrip().endswith((";", ",")) else entries
