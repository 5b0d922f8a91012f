"""What an HTTP client is told of limits, in any framework: status, headers and body.

**Status.** 429 (RFC 6585) is for what a later, equal request may pass. A request that asks for more than the limit can
ever hold is not such: "too many requests in a given amount of time" would be untrue, and clients retry a 429 by
themselves, without end. It gets 413 (RFC 9110, 15.5.14): larger than the server is willing to process; and no
`Retry-After`, which that section asks for only "if the condition is temporary". Not 403, which another login would
mend, nor 422, which says that the content could not be processed, not that it was too much. A store that cannot answer
is the server's trouble and nobody knows for how long: 503, with no `Retry-After` made up.

**Headers.** `RateLimit-Policy` and `RateLimit` are Lists of Strings with parameters (RFC 9651), as
draft-ietf-httpapi-ratelimit-headers-10 has them. They need two shapes of the whole grammar, a String and an Integer,
so they are written here and read back by a library in the tests only. The draft's registry has no unit for tokens;
`qu="tokens"` is not in it, but without `qu` a client would take them for requests. `pk`, the partition key, is left
out: the draft makes it optional, and whatever is made of an identity shows or identifies it. `t` is, of a limit that
refused, when the request fits, and else when all of the quota is there again. A limit that did not refuse tells no `t`
beside `Retry-After`, which must not be earlier than any; nor does a budget whose call used more than it held, for
when that is whole again was decided before.

No header and no body holds an identity.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from quotalimit import clock
from quotalimit.decision import Decision, Unit, slowest
from quotalimit.errors import LimitExceeded, StoreError

if TYPE_CHECKING:
    from quotalimit.rate import Rate

PROBLEM_TYPE: Final = "application/problem+json"
"""The media type of the body (RFC 9457)."""

QUOTA_EXCEEDED: Final = "https://iana.org/assignments/http-problem-types#quota-exceeded"
"""The problem type that the draft registers."""

LARGEST_INTEGER: Final = 10**15 - 1
"""The largest Integer of a structured field; a larger one is cut to it."""

SECOND: Final = 1_000_000

log: Final = logging.getLogger("quotalimit")


class Answer(NamedTuple):
    """What an exception is answered with."""

    status: int
    headers: dict[str, str]
    body: bytes


def answer_to(error: LimitExceeded | StoreError, *, x_ratelimit: bool = False) -> Answer:
    """The whole answer to an exception. That a store failed is logged: the client is not told how."""
    if isinstance(error, StoreError):
        log.error("a limit could not be checked, so a request was refused", exc_info=error)
    return Answer(status_of(error), headers_of(error, x_ratelimit=x_ratelimit), body_of(error))


def status_of(error: LimitExceeded | StoreError) -> int:
    """The status that answers an exception: 429; 413 for what could never fit; 503 where the store cannot tell."""
    if isinstance(error, StoreError):
        return 503
    return 413 if error.reason == "too_large" else 429


def retry_after(error: LimitExceeded | StoreError) -> int | None:
    """Whole seconds, rounded up, after which the request is admitted if nobody else calls; None if unknown or never."""
    wait = None if isinstance(error, StoreError) else error.decision.wait_us
    return None if wait is None else max(1, _seconds(wait))


def headers_of(error: LimitExceeded | StoreError, *, x_ratelimit: bool = False) -> dict[str, str]:
    """The headers that answer an exception: of its body, `Retry-After`, and those of the limits that were passed."""
    headers = {"Content-Type": PROBLEM_TYPE}
    seconds = retry_after(error)
    if seconds is not None:
        headers["Retry-After"] = str(seconds)
    if isinstance(error, LimitExceeded):
        headers |= rate_limit_headers(error.violations, x_ratelimit=x_ratelimit)
    return headers


def body_of(error: LimitExceeded | StoreError) -> bytes:
    """The problem body (RFC 9457) that answers an exception."""
    if isinstance(error, StoreError):  # its message may tell of the server's insides
        problem: dict[str, object] = {"type": "about:blank", "title": "Service Unavailable", "status": 503}
        return json.dumps(problem).encode()
    problem = {
        "type": QUOTA_EXCEEDED,
        "title": "Request cannot be satisfied as assigned quota has been exceeded",
        "status": status_of(error),
        "detail": summary_of(error),
        "violated-policies": list(dict.fromkeys(_printable(violation.policy) for violation in error.violations)),
    }
    return json.dumps(problem).encode()


def summary_of(error: LimitExceeded | StoreError) -> str:
    """One line of ASCII for the client: which limit was passed, and when to come again."""
    if isinstance(error, StoreError):
        return "limits cannot be checked now"
    asked = f"{error.limit} exceeded: {error.requested} requested, {error.remaining} remaining"
    seconds = retry_after(error)
    return f"{asked}; " + ("more than the limit can ever hold" if seconds is None else f"retry after {seconds} s")


def rate_limit_headers(decisions: Iterable[Decision], *, x_ratelimit: bool = False) -> dict[str, str]:
    """`RateLimit-Policy` and `RateLimit` of decisions, the last of each policy; none where there are none.

    `x_ratelimit` adds the headers that clients knew before: `X-RateLimit-Limit` and `-Remaining` of the one limit
    that binds, and `-Reset`, the Unix time in seconds at which all of it is there again.
    """
    last = {decision.policy: decision for decision in decisions}
    if not last:
        return {}
    refused = not all(last.values())
    headers = {
        "RateLimit-Policy": ", ".join([_policy(d.policy, d.limit, d.unit) for d in last.values()]),
        "RateLimit": ", ".join([_service_limit(d, refused) for d in last.values()]),
    }
    if x_ratelimit:
        binding = slowest(last.values())
        headers["X-RateLimit-Limit"] = str(binding.limit.amount)
        headers["X-RateLimit-Remaining"] = str(remaining_of(binding))
        if not _has_overrun(binding):
            headers["X-RateLimit-Reset"] = str(_seconds(binding.reset_us))
    return headers


def remaining_of(decision: Decision) -> int:
    """What is left after a call: as it was decided, and by the truth once the call is settled."""
    settled = decision.settlement
    if settled is None or not decision.allowed:
        return decision.remaining
    return max(0, decision.remaining + settled.held - settled.used)


@lru_cache(1024)
def _policy(name: str, limit: Rate, unit: Unit) -> str:
    item = f"{_string(name)};q={_integer(limit.amount)}"
    if unit != "requests":
        item += f";qu={_string(unit)}"
    return item if limit.period is None else f"{item};w={_integer(limit.period // SECOND)}"


def _service_limit(decision: Decision, refused: bool) -> str:
    item = f"{_string(decision.policy)};r={_integer(remaining_of(decision))}"
    wait = decision.wait_us
    if decision.allowed:
        wait = None if refused or _has_overrun(decision) else max(0, decision.reset_us - clock.now())
    return item if wait is None else f"{item};t={_integer(_seconds(wait))}"


def _has_overrun(decision: Decision) -> bool:
    return decision.settlement is not None and decision.settlement.overrun > 0


def _seconds(microseconds: int) -> int:
    return -(-microseconds // SECOND)


def _integer(number: int) -> str:
    return str(min(number, LARGEST_INTEGER))


@lru_cache(1024)
def _string(text: str) -> str:
    escaped = _printable(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _printable(text: str) -> str:
    """A name as a String can hold it: anything but printable ASCII is percent-encoded."""
    return "".join(
        character if " " <= character <= "~" else "".join(f"%{byte:02X}" for byte in _utf8(character))
        for character in text
    )


def _utf8(character: str) -> bytes:
    return character.encode("utf-8", "surrogatepass")
