"""What kind of result a function returned, and so how the caller gets it: as it is, or as a stream that is watched."""

from __future__ import annotations

import io
from collections.abc import Awaitable
from enum import Enum, auto
from functools import lru_cache
from types import AsyncGeneratorType, GeneratorType
from typing import Any, Final

from quotalimit._bodies import has_body
from quotalimit.fields import is_plainly_read

_PLAIN: Final = (str, bytes, dict, list, tuple, set, int, float, type(None), io.IOBase)
_VALUES: Final = frozenset((str, bytes, list, tuple, set, int, float, bool, type(None)))
_MORE_THAN_AWAITABLE: Final = ("__aenter__", "__aiter__")
_WITH: Final = (("__enter__", "__exit__"), ("__aenter__", "__aexit__"))
MANAGERS: Final = ("StreamManager", "ContextManager")
"""How the names of classes end that make their request when they are entered."""


class Delivery(Enum):
    """How a result of some type is delivered."""

    AS_IT_IS = auto()
    DICT = auto()
    GENERATOR = auto()
    ASYNC_GENERATOR = auto()
    FUTURE = auto()
    AWAITABLE = auto()
    BODY = auto()
    STREAM = auto()


@lru_cache(maxsize=1_024)
def _delivery(kind: type, seen: type) -> Delivery:
    """How results are delivered of a type, and of what it lets be seen, as a proxy does: each is looked at once."""
    if kind in _VALUES:
        return Delivery.AS_IT_IS
    if kind is dict:
        return Delivery.DICT
    if issubclass(seen, GeneratorType):
        return Delivery.GENERATOR
    if issubclass(seen, AsyncGeneratorType):
        return Delivery.ASYNC_GENERATOR
    if hasattr(kind, "add_done_callback") and hasattr(kind, "result") and not hasattr(kind, "__next__"):
        return Delivery.FUTURE
    if issubclass(seen, Awaitable) and not any(hasattr(kind, name) for name in _MORE_THAN_AWAITABLE):
        return Delivery.AWAITABLE
    if has_body(kind):
        return Delivery.BODY
    return Delivery.STREAM if _is_kind_of_stream(kind, seen) else Delivery.AS_IT_IS


@lru_cache(maxsize=1_024)
def _never_streams(kind: type) -> bool:
    """Whether all objects of a type are delivered as they are, for none of them can look like something else."""
    has_other_looks = any("__class__" in vars(base) for base in kind.__mro__[:-1]) or not is_plainly_read(kind)
    return not has_other_looks and _delivery(kind, kind) is Delivery.AS_IT_IS


def class_seen(result: object) -> type:
    """The class that an object says it is of: a proxy's is that of what it stands for, if it can be had."""
    try:
        seen = result.__class__
    except Exception:  # of a lazy proxy, out of its context
        return type(result)
    return seen if isinstance(seen, type) else type(result)


def how_delivered(result: object) -> Delivery | None:
    """How a result is delivered; None if it is as it is, because of its class or for that does not let us look."""
    kind: Any = type(result)
    try:
        return None if _never_streams(kind) else _delivery(kind, class_seen(result))
    except Exception:  # a foreign class may do anything: of one without a hash nothing is known
        return None


def is_stream(result: Any) -> bool:
    """Whether an object is a stream of an SDK."""
    return how_delivered(result) is Delivery.STREAM


def _is_kind_of_stream(kind: type, seen: type) -> bool:
    if issubclass(seen, _PLAIN) or any(base.__module__ == "unittest.mock" for base in kind.__mro__):
        return False
    return _looks_like_a_stream(kind) or (seen is not kind and _looks_like_a_stream(seen))


def _looks_like_a_stream(kind: type) -> bool:
    """Whether a class iterates, or is called a stream and is no record. A list iterates, but not asynchronously."""
    if hasattr(kind, "__next__") or hasattr(kind, "__anext__"):
        return True
    if hasattr(kind, "__pydantic_fields__"):
        return False
    if hasattr(kind, "__aiter__"):
        return True
    if hasattr(kind, "__dataclass_fields__"):
        return False
    manages = any(hasattr(kind, enter) and hasattr(kind, leave) for enter, leave in _WITH)
    if "Stream" in kind.__name__:
        return manages or hasattr(kind, "__iter__")
    return manages and kind.__name__.endswith(MANAGERS)
