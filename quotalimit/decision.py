"""What a store answers, and a way to gather the answers given to the calls of a block."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from datetime import datetime

    from quotalimit.rate import Rate
    from quotalimit.settlement import Settlement

Reason: TypeAlias = Literal["exhausted", "busy", "too_large"]
"""Why a call was refused.

`"exhausted"`: the limit is spent; retry after `retry_after`.
`"busy"`: it would fit if every open hold used nothing; `retry_after` is when it fits if they use everything.
`"too_large"`: it asks for more than the limit can ever hold; `retry_after` is None.
"""

Unit: TypeAlias = Literal["requests", "tokens"]
"""What a limit counts: a rate limiter requests, a token budget tokens."""


class Decision:
    """A store's answer about one limit: whether the call is admitted, and what is left. True if it is.

    `requested`, `used` and `remaining` are units; `used` counts open holds, and this call if it was admitted. `unit`
    is what they are, `policy` what headers call the limit: its name, and its rate too where others share the name.
    `settlement` says what a token budget charged a decorated call in the end, once it has ended. `wait_us` is
    `retry_after` in microseconds, `reset_us` is `reset_at` in microseconds since 1970.
    """

    __slots__ = (
        "allowed",
        "limit",
        "name",
        "policy",
        "reason",
        "remaining",
        "requested",
        "reset_us",
        "settlement",
        "unit",
        "used",
        "wait_us",
    )

    def __init__(
        self,
        name: str,
        limit: Rate,
        requested: int,
        used: int,
        remaining: int,
        wait: int | None,
        reset: int,
        reason: Reason | None,
    ) -> None:
        self.name: str = name
        self.policy: str = name
        self.unit: Unit = "requests"
        self.limit: Rate = limit
        self.requested: int = requested
        self.used: int = used
        self.remaining: int = remaining
        self.reason: Reason | None = reason
        self.allowed: bool = reason is None
        self.settlement: Settlement | None = None
        self.wait_us: int | None = wait
        self.reset_us: int = reset

    @property
    def retry_after(self) -> float | None:
        """Seconds until the same call would be admitted; 0.0 if it is, None if it never can be."""
        return None if self.wait_us is None else self.wait_us / 1e6

    @property
    def clears_in(self) -> float:
        """Microseconds until the same call would be admitted; infinite if it never can be."""
        return float("inf") if self.wait_us is None else self.wait_us

    @property
    def reset_at(self) -> datetime:
        """When the limit is whole again if nobody calls: an aware UTC datetime."""
        from datetime import datetime, timedelta

        try:
            return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=self.reset_us)
        except OverflowError:  # a debt of more than eight thousand years
            return datetime.max.replace(tzinfo=UTC)

    def __reduce__(self) -> tuple[object, ...]:
        made_of = (
            self.name,
            self.limit,
            self.requested,
            self.used,
            self.remaining,
            self.wait_us,
            self.reset_us,
            self.reason,
        )
        known_later = {"settlement": self.settlement, "policy": self.policy, "unit": self.unit}
        return Decision, made_of, (None, known_later)

    def __bool__(self) -> bool:
        return self.allowed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decision) and all(getattr(self, s) == getattr(other, s) for s in self.__slots__)

    def __hash__(self) -> int:
        return hash((self.name, self.limit, self.used, self.wait_us, self.reset_us))

    def __repr__(self) -> str:
        verdict = "admitted" if self.allowed else self.reason
        return (
            f"<Decision {self.name!r} {self.limit}: {verdict}, {self.requested} requested, "
            f"{self.remaining} remaining, retry_after={self.retry_after}>"
        )


def slowest(decisions: Iterable[Decision]) -> Decision:
    """The decision that speaks for several: the slowest to clear, else the one with the fewest remaining."""
    return max(decisions, key=lambda decision: (decision.clears_in, -decision.remaining))


_seen: Final[ContextVar[tuple[list[Decision], ...]]] = ContextVar("quotalimit_seen", default=())


@contextmanager
def collect_decisions() -> Generator[list[Decision]]:
    """Gather the decisions of all calls made inside the block, in order: for headers on successful answers.

    Tasks started inside, and threads that copy the context (`asyncio.to_thread`), add to the same list.
    """
    seen: list[Decision] = []
    token = _seen.set((*_seen.get(), seen))
    try:
        yield seen
    finally:
        try:
            _seen.reset(token)
        except ValueError:  # left in another context than it was entered in, as a framework may do
            pass


collectors: Final = _seen.get
"""The lists of the `collect_decisions` blocks that this call is made in."""
