"""What an identity may be, its one encoding, and ready-made keys."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from quotalimit.errors import InvalidKey

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address
    from uuid import UUID

Part: TypeAlias = "str | int | bytes | UUID | Enum"
Key: TypeAlias = "Part | tuple[Part, ...]"
"""Whose call it is: what a key function returns."""

PLAIN: Final = frozenset((str, int))
"""The types of keys that are their own identity."""

Identity: TypeAlias = Hashable
"""A checked key in the form in which it is counted: two equal identities are the same person."""

LONGEST: Final = 256
"""Bytes; the encoding of a longer key is replaced by its digest."""


def identify(key: object) -> Identity:
    """Check a key and return its identity, or raise `InvalidKey`.

    Strings and integers, also of subclasses, stand for themselves; everything else for its encoding, which is bytes
    and so equals neither. `1` and `"1"`, `("a/b", "c")` and `("a", "b/c")`, an enum member and its value are different
    people.
    """
    if type(key) in PLAIN:
        return key
    if isinstance(key, (Enum, bool)):
        return encode(key)
    if isinstance(key, str):
        return str.__str__(key)
    return int.__int__(key) if isinstance(key, int) else encode(key)


def encode(key: object) -> bytes:
    """Write a key as bytes that no other key is written as, on every store and in every process.

    Raises `InvalidKey` for what is not a `str`, `int`, `bytes`, `UUID`, enum member or a tuple of these.
    """
    written = _tuple(key) if isinstance(key, tuple) else _part(key)
    if len(written) > LONGEST:
        from hashlib import blake2b

        return b"#" + blake2b(written, digest_size=32).digest()
    return written


def _tuple(parts: tuple[object, ...]) -> bytes:
    if not parts:
        raise InvalidKey(
            "a key must not be an empty tuple: all callers would share one count. Use key=everyone for that"
        )
    encoded = [_part(part) for part in parts]
    return b"t" + b"".join(b"%d:%b" % (len(part), part) for part in encoded)


def _part(part: object) -> bytes:
    if isinstance(part, Enum):
        kind = type(part)
        member = part._name_ or repr(part._value_)  # `name` may be the class's own to define; flags may have none
        return b"e" + f"{kind.__module__}:{kind.__qualname__}.{member}".encode("utf-8", "surrogatepass")
    if isinstance(part, str):
        return b"s" + str.encode(part, "utf-8", "surrogatepass")
    if isinstance(part, int) and not isinstance(part, bool):
        return b"i%x" % int.__int__(part)
    if isinstance(part, bytes):
        return b"b" + bytes(part)
    uuid: Any = sys.modules.get("uuid")  # whoever has a UUID has imported it
    if uuid is not None and isinstance(part, uuid.UUID):
        return b"u" + cast("UUID", part).bytes
    raise InvalidKey(
        f"a key must be a str, int, bytes, UUID, enum member or a flat tuple of these, not {_named(part)}: "
        "two people must never share a count by accident"
    )


def _named(value: object) -> str:
    """What a refused key is, without showing whose it is."""
    return repr(value) if value is None or isinstance(value, bool) else f"a {type(value).__qualname__}"


def everyone(*_args: Any, **_kwargs: Any) -> str:
    """One count for all callers: `key=everyone`."""
    return "everyone"


def ip_key(address: str | IPv4Address | IPv6Address) -> str:
    """The identity of an IP address: IPv4 as it is, IPv6 by its /64 network, IPv4-mapped IPv6 as IPv4.

    One subscriber usually holds a whole IPv6 /64 (RFC 6177), and could otherwise change address at each call.
    Raises `InvalidKey` for what is not an address.
    """
    from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

    try:
        parsed = ip_address(str(address)) if isinstance(address, (str, IPv4Address, IPv6Address)) else None
    except ValueError:
        parsed = None
    if isinstance(parsed, IPv6Address):
        parsed = parsed.ipv4_mapped or parsed
    if isinstance(parsed, IPv4Address):
        return str(parsed)
    if isinstance(parsed, IPv6Address):
        return str(IPv6Network((int(parsed), 64), strict=False))
    raise InvalidKey(
        f"not an IP address: a {type(address).__qualname__} that cannot be read as one; give text like '192.0.2.1'"
    )
