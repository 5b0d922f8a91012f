"""What a call that raised is charged."""

from __future__ import annotations

from enum import Enum
from typing import Final, Literal, TypeAlias

from quotalimit.errors import LimitExceeded
from quotalimit.providers import field, read_usage
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


def read_error(error: BaseException) -> Usage | Verdict:
    """The usage that an exception reports, else a verdict.

    OpenAI's `LengthFinishReasonError` reports it in `completion`, Instructor's exceptions in `total_usage`. Time-outs
    and whatever ends a call from outside (cancellation, `KeyboardInterrupt`) keep the hold: the provider may have gone
    on to the end. Everything else, and a nested `LimitExceeded`, releases it.
    """
    usage = read_usage(field(error, "completion")) or read_usage(field(error, "total_usage"))
    if usage is not None:
        return usage
    if isinstance(error, LimitExceeded):
        return RELEASE
    if isinstance(error, BaseExceptionGroup):  # of a TaskGroup
        return KEEP if any(read_error(one) is not RELEASE for one in error.exceptions) else RELEASE
    if isinstance(error, TimeoutError) or not isinstance(error, Exception):
        return KEEP
    return KEEP if any("Timeout" in kind.__name__ for kind in type(error).__mro__) else RELEASE
