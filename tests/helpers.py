"""What several test files share: replies as a model gives them, and what is used and held on a limiter."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from quotalimit import MemoryStore, RateLimiter, TokenBudget
from quotalimit.keys import Key

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


def reply(tokens_in: int, tokens_out: int = 0) -> Any:
    """A response with a `usage` of the shape of OpenAI's chat completions."""
    total = tokens_in + tokens_out
    usage = SimpleNamespace(prompt_tokens=tokens_in, completion_tokens=tokens_out, total_tokens=total)
    return SimpleNamespace(usage=usage)


def used(limiter: RateLimiter | TokenBudget, key: Key = "alice") -> int:
    """Units in use for a key, open holds among them."""
    return limiter.peek(key).used


def open_holds(limiter: RateLimiter | TokenBudget, *keys: Key) -> int:
    """Holds left open on a limiter of a memory store, after a peek at each key has settled what came late."""
    for key in keys or ("alice",):
        limiter.peek(key)
    return sum(len(counts.open.all()) for counts, _ in limiter.bound().places)


def shown(value: object) -> str:
    """A value as the name of a test's case: without its address, so that processes that share the tests agree."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def no_lock_is_taken(store: MemoryStore) -> bool:
    """Whether a store's locks are all free."""
    return not any(repr(stripe.lock).startswith("<locked") for stripe in store._stripes)
