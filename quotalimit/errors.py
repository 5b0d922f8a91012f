"""Every exception that quotalimit raises.

QuotaLimitError
├── LimitExceeded
│   ├── RateLimitExceeded
│   └── TokenBudgetExceeded
├── InvalidLimit (ValueError)
├── InvalidKey (TypeError)
└── StoreError
    ├── StoreUnavailable
    └── StoreFull
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime

    from quotalimit.decision import Decision, Reason
    from quotalimit.keys import Key
    from quotalimit.rate import Rate


class QuotaLimitError(Exception):
    """The base of every exception of this library."""


class LimitExceeded(QuotaLimitError):
    """A call was refused; nothing was charged and the function was not called.

    It speaks for the violated limit that takes longest to clear, so that `retry_after` is honest;
    `violations` holds the decisions of all limits that were violated, the outermost layer first.
    The message never holds the key: identities do not belong in logs.
    """

    def __init__(self, decision: Decision, key: Key, violations: tuple[Decision, ...] = ()) -> None:
        self.args = ()  # no key: whoever logs an exception may log its arguments
        self.decision = decision
        self.key = key
        self.violations: tuple[Decision, ...] = violations or (decision,)

    @property
    def name(self) -> str:
        """What the violated limit is called."""
        return self.decision.name

    @property
    def limit(self) -> Rate:
        """The rate that was violated."""
        return self.decision.limit

    @property
    def requested(self) -> int:
        """Units that the call asked for."""
        return self.decision.requested

    @property
    def used(self) -> int:
        """Units in use when the call asked, open holds among them; it may exceed the limit."""
        return self.decision.used

    @property
    def remaining(self) -> int:
        """Units that were left when the call asked; never negative."""
        return self.decision.remaining

    @property
    def retry_after(self) -> float | None:
        """Seconds after which the call is admitted if nobody else calls; None if it never can be."""
        return self.decision.retry_after

    @property
    def reset_at(self) -> datetime:
        """When the limit is whole again if nobody calls: an aware UTC datetime."""
        return self.decision.reset_at

    @property
    def reason(self) -> Reason:
        """`"exhausted"`, `"busy"` or `"too_large"`: see `quotalimit.decision.Reason`."""
        return self.decision.reason or "exhausted"

    def __str__(self) -> str:
        asked = f"{self.name}: {self.limit} exceeded: {self.requested} requested, {self.remaining} remaining"
        if self.retry_after is None:
            return f"{asked}; more than the limit can ever hold"
        held = " (held by calls in flight)" if self.reason == "busy" else ""
        return f"{asked}{held}; retry after {_plain(self.retry_after)} s"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.decision, self.key, self.violations), self.__dict__


def _plain(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


class RateLimitExceeded(LimitExceeded):
    """A rate limit refused the call."""


class TokenBudgetExceeded(LimitExceeded):
    """A token budget refused the call."""


class InvalidLimit(QuotaLimitError, ValueError):
    """A limit that cannot be read, or that contradicts another of the same name."""


class InvalidKey(QuotaLimitError, TypeError):
    """An identity, or a key function, by which calls cannot be counted safely."""


class StoreError(QuotaLimitError):
    """A store could not do what it was asked."""


class StoreUnavailable(StoreError):
    """A store cannot answer; the call was refused, for a limit that cannot be checked is not met."""


class StoreFull(StoreError):
    """A limiter already counts for `max_keys` identities and refuses a new one rather than forget an old one."""
