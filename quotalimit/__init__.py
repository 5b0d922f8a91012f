"""quotalimit keeps one user from burning everyone's AI budget."""

from typing import TYPE_CHECKING, Any

from quotalimit.algorithms import CalendarWindow, SlidingWindow, TokenBucket
from quotalimit.decision import Decision, collect_decisions
from quotalimit.decorators import limiters_of, rate_limited, token_budget
from quotalimit.errors import (
    InvalidKey,
    InvalidLimit,
    LimitExceeded,
    QuotaLimitError,
    RateLimitExceeded,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TokenBudgetExceeded,
)
from quotalimit.estimation import estimate_tokens
from quotalimit.events import Event, log_event, on_event
from quotalimit.failures import KEEP, RELEASE, read_error
from quotalimit.holds import Hold
from quotalimit.keys import everyone, ip_key
from quotalimit.limiters import UNLIMITED, RateLimiter, TokenBudget
from quotalimit.providers import read_usage
from quotalimit.rate import Rate
from quotalimit.recording import record_usage
from quotalimit.settlement import Settlement
from quotalimit.stores import MemoryStore, Store, configure, store_from_url
from quotalimit.usage import Usage

if TYPE_CHECKING:
    from quotalimit.stores.redis import RedisStore as RedisStore
    from quotalimit.stores.sqlite import SQLiteStore as SQLiteStore

__all__ = [
    "KEEP",
    "RELEASE",
    "UNLIMITED",
    "CalendarWindow",
    "Decision",
    "Event",
    "Hold",
    "InvalidKey",
    "InvalidLimit",
    "LimitExceeded",
    "MemoryStore",
    "QuotaLimitError",
    "Rate",
    "RateLimitExceeded",
    "RateLimiter",
    "Settlement",
    "SlidingWindow",
    "Store",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "TokenBucket",
    "TokenBudget",
    "TokenBudgetExceeded",
    "Usage",
    "collect_decisions",
    "configure",
    "estimate_tokens",
    "everyone",
    "ip_key",
    "limiters_of",
    "log_event",
    "on_event",
    "rate_limited",
    "read_error",
    "read_usage",
    "record_usage",
    "store_from_url",
    "token_budget",
]


def __getattr__(name: str) -> Any:
    """The stores that need more than this package are imported when they are asked for."""
    if name == "SQLiteStore":
        from quotalimit.stores.sqlite import SQLiteStore

        return SQLiteStore
    if name == "RedisStore":
        from quotalimit.stores.redis import RedisStore

        return RedisStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
