"""The Lua script of a call on Redis: put together of the twins of the algorithms that the call needs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import Final

from quotalimit.algorithms.base import Algorithm
from quotalimit.errors import InvalidLimit

_BEFORE: Final = "redis_plain.lua"
_AFTER: Final = "redis.lua"


class Script:
    """A script, and the digest by which a server that has seen it knows it."""

    __slots__ = ("digest", "source")

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = sha1(source.encode(), usedforsecurity=False).hexdigest()


def twin_of(limit: Algorithm) -> str:
    """The name of the Lua file beside the limit's algorithm. Raises `InvalidLimit` if it has none."""
    for kind in type(limit).__mro__:
        package, _, module = kind.__module__.rpartition(".")
        if package == "quotalimit.algorithms" and module != "base":
            return f"{module}.lua"
    raise InvalidLimit(f"{limit!r} cannot be counted on Redis: its algorithm has no twin in Lua")


@cache
def script_of(twins: frozenset[str]) -> Script:
    """The script for the algorithms whose twins are named: the same, and of the same digest, in all processes."""
    folder = files("quotalimit.stores")
    parts = folder.joinpath(_BEFORE).read_text(), assembled(sorted(twins)), folder.joinpath(_AFTER).read_text()
    return Script("".join(parts))


def assembled(twins: Iterable[str]) -> str:
    """The algorithms alone, in the table `algorithms`."""
    folder = files("quotalimit.algorithms")
    return "local algorithms = {}\n" + "".join(folder.joinpath(twin).read_text() for twin in twins)
