"""What a call that raised is charged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Final, Literal, TypeAlias

from quotalimit.errors import LimitExceeded
from quotalimit.fields import field, fields_of
from quotalimit.providers import read_usage, sources_of
from quotalimit.usage import Usage


class Verdict(Enum):
    """What becomes of the hold of a call that raised and of which no usage is known."""

    RELEASE = "release"
    KEEP = "keep"


RELEASE: Final = Verdict.RELEASE
"""The hold is given back: the provider did not bill."""

KEEP: Final = Verdict.KEEP
"""The hold stays charged, or an estimate where nothing was held: the provider may well have billed."""

Failure: TypeAlias = Usage | float | Literal[Verdict.RELEASE, Verdict.KEEP] | None


_NEVER_SENT: Final = frozenset((
    "ConnectError", "ConnectTimeout", "PoolTimeout", "WriteError", "WriteTimeout", "LocalProtocolError",  # httpx
    "NewConnectionError", "ConnectTimeoutError",  # urllib3
    "EndpointConnectionError",  # boto3
    "ClientConnectorError", "ConnectionTimeoutError",  # aiohttp
))  # fmt: skip
"""Errors of HTTP clients by which the request, or the end of it, never reached the provider."""

_ANSWERED: Final = frozenset((
    "ContentFilterFinishReasonError",  # of OpenAI's parse(): what was written is withheld
    "APIResponseValidationError", "ResponseValidationError",  # OpenAI, Anthropic; Mistral: it cannot be read
    "RemoteProtocolError", "ReadError", "DecodingError",  # httpx: the connection broke while the answer was awaited
    "ProtocolError", "ChunkedEncodingError",  # urllib3, requests
    "ConnectionClosedError",  # boto3
    "ServerDisconnectedError", "ClientOSError", "ClientPayloadError",  # aiohttp
    "ConnectionResetError", "IncompleteRead",  # Python's own
))  # fmt: skip
"""Errors after the request was sent, by which an answer that was perhaps written, and billed, is lost."""

_GAVE_UP_WAITING: Final = (408, 504, 524)
"""HTTP statuses of a gateway that no longer waits for a model which may write on."""


def read_error(error: BaseException) -> Usage | Verdict:
    """The usage that an exception reports, else a verdict.

    OpenAI's `LengthFinishReasonError` reports it in `completion`, Instructor's exceptions in `total_usage`. Whatever
    may have lost an answer that was written keeps the hold: time-outs (408 and 504 too), a connection that broke after
    the request was sent, an answer that was filtered or could not be read, and what ends a call from outside
    (cancellation, `KeyboardInterrupt`). Everything else releases it: other answers of the server, a connection that was
    not made, a nested `LimitExceeded`, and the function's own exceptions; if one of these comes after a model's answer,
    `record_usage` that first. An exception is known by what it was raised from, too.
    """
    usages = usages_of(error)
    if usages:
        return together(usages)
    if isinstance(error, LimitExceeded):
        return RELEASE
    if isinstance(error, BaseExceptionGroup):  # of a TaskGroup
        return KEEP if any(read_error(one) is not RELEASE for one in error.exceptions) else RELEASE
    return KEEP if _may_have_billed(error) else RELEASE


def usages_of(error: BaseException) -> list[tuple[Usage, tuple[object, ...]]]:
    """The usage that an exception reports, else those that it was raised from, and the objects that report it.

    Of a group that is of all of them; the same object counts once.
    """
    found: list[tuple[Usage, tuple[object, ...]]] = []
    seen: set[int] = set()
    todo = [error]
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        report, usage = _reported(each)
        if usage is None:
            todo += _behind(each)
        elif seen.isdisjoint(map(id, sources := sources_of(report))):
            seen.update(map(id, sources))
            found.append((usage, (each, *sources)))
    return found


def _behind(error: BaseException) -> list[BaseException]:
    """The exceptions of a group, and what it was raised from."""
    try:
        inside = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        return [each for each in (*inside, _cause(error)) if each is not None]
    except Exception:  # a foreign exception may do anything
        return []


def together(usages: Iterable[tuple[Usage, tuple[object, ...]]]) -> Usage:
    """The sum of such usages."""
    return sum((usage for usage, _ in usages), Usage())


def _reported(error: BaseException) -> tuple[object, Usage | None]:
    """What of an exception reports its usage, and the usage."""
    for name in ("completion", "total_usage"):
        report = field(error, name)
        usage = read_usage(report)
        if usage is not None:
            return report, usage
    return None, None


def _may_have_billed(error: BaseException) -> bool:
    may_have = False
    for each in _causes(error):
        names = {kind.__name__ for kind in type(each).__mro__}
        if names & _NEVER_SENT:
            return False
        may_have = (
            may_have
            or not isinstance(each, Exception)
            or isinstance(each, TimeoutError)
            or any("Timeout" in name for name in names)
            or bool(names & _ANSWERED)
            or _status(each) in _GAVE_UP_WAITING
        )
    return may_have


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, and what it says that it was raised from. What merely came before it may be another call's."""
    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        yield each
        seen.append(each)
        each = _cause(each)


def _cause(error: BaseException) -> BaseException | None:
    inside = (argument for argument in error.args if isinstance(argument, BaseException))  # as requests has it
    return error.__cause__ or next(inside, None)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception carries, in its own field or in that of its response."""
    response = fields_of(field(error, "response"))
    boto3 = field(response.get("ResponseMetadata"), "HTTPStatusCode")
    for status in (field(error, "status_code"), field(error, "code"), response.get("status_code"), boto3):
        if isinstance(status, int):
            return status
    return None
