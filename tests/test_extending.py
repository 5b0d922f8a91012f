"""What the README says of adding an algorithm, a store, a provider and a framework: each is done here as it says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from freezegun import freeze_time

from quotalimit import (
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    SQLiteStore,
    Store,
    TokenBudget,
    Usage,
    limiters_of,
    providers,
    rate_limited,
    read_usage,
    token_budget,
)
from quotalimit.algorithms.base import NEVER, Algorithm, Mark, State, dump_numbers, load_numbers
from quotalimit.decision import Decision
from quotalimit.errors import InvalidLimit, LimitExceeded
from quotalimit.integrations.http import answer_to
from quotalimit.stores.base import Answer, Charge, Claim
from quotalimit.stores.redis import RedisStore
from tests.helpers import reply
from tests.stores import servers


class FixedWindow(Algorithm):
    """N units in each period since the epoch. The state is (start of the window, used)."""

    kind = "fixed"

    @property
    def period(self) -> int:
        return self._needs_fixed_period()

    def _start(self, now: int) -> int:
        return now - now % self.period

    def fits(self, state: State, need: int, now: int) -> int:
        if need > self.capacity:
            return NEVER
        return 0 if self.used(state, now) + need <= self.capacity else self._start(now) + self.period - now

    def take(self, state: State, cost: int, now: int) -> tuple[State, Mark]:
        start = self._start(now)
        return (start, self.used(state, now) + cost), start

    def adjust(self, state: State, mark: Mark, delta: int, now: int) -> State:
        start = self._start(now)
        return (start, max(0, self.used(state, now) + delta)) if mark == start else state

    def redate(self, state: State, now: int) -> State:
        return (self._start(now), state[1]) if state is not None and state[0] > now else state

    def used(self, state: State, now: int) -> int:
        return state[1] if state is not None and state[0] == self._start(now) else 0

    def whole_at(self, state: State, now: int) -> int:
        return self._start(now) + self.period if self.used(state, now) else now

    def matters(self, state: State, now: int) -> bool:
        return self.used(state, now) > 0

    def dump(self, state: State) -> bytes:
        return dump_numbers(b"f1:", *state)

    def load(self, data: bytes) -> State:
        return tuple(load_numbers(b"f1:", data, 2))


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_an_algorithm_is_a_class_of_pure_functions(kind: str, tmp_path: Path) -> None:
    store: Store = MemoryStore() if kind == "memory" else SQLiteStore(tmp_path / "counts.db")
    ask = rate_limited(FixedWindow("2/minute"), key="user", name="ask", store=store)(lambda user: user)
    with freeze_time("2026-01-01 12:00:50") as clock:
        ask("alice"), ask("alice")
        with pytest.raises(RateLimitExceeded) as refusal:
            ask("alice")
        assert refusal.value.retry_after == 10
        clock.tick(10)
        assert ask("alice") == "alice"


def test_an_algorithm_without_a_twin_in_lua_is_refused_on_redis_and_a_subclass_of_ours_has_its_twin() -> None:
    class Window(SlidingWindow):
        """One of ours by another name."""

    with closing(RedisStore(servers.server().url, prefix=str(uuid4()))) as store:
        with pytest.raises(InvalidLimit, match="no twin in Lua"):
            RateLimiter(FixedWindow("2/minute"), name="ask", store=store).acquire("alice")
        ours = RateLimiter(Window("2/minute"), name="window", store=store)
        assert [ours.allow("alice") for _ in range(3)] == [True, True, False]


class LoggedStore(Store):
    """A memory store that writes down what it admitted, as a store of one's own might send it elsewhere."""

    blocking = False
    shared = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = MemoryStore()
        self.admitted: list[tuple[str, object]] = []

    def counts(self, owner: Any, position: int, limit: Algorithm) -> Any:
        return self.names.find(owner, position, limit, lambda: self.inner.counts(owner, position, limit))

    def acquire(self, claims: Sequence[Claim], *, not_before: int = 0, report: bool = False) -> Answer:
        answer = self.inner.acquire(claims, not_before=not_before, report=report)
        if not answer.refusals:
            self.admitted += [(claim.counts.name, claim.identity) for claim in claims]
        return answer

    def peek(self, claims: Sequence[Claim]) -> list[Decision]:
        return self.inner.peek(claims)

    def settle(self, settlements: Sequence[tuple[Charge, int]], *, ring: bool = True) -> None:
        self.inner.settle(settlements, ring=ring)

    def reset(self, places: Sequence[tuple[Any, Any]]) -> None:
        self.inner.reset(places)


def test_a_store_answers_claims_and_settles_charges() -> None:
    store = LoggedStore()
    tokens = TokenBudget("100/day", name="tokens", store=store)

    @rate_limited("2/minute", key="user", name="calls", store=store)
    @token_budget(tokens, key="user", reserve=20)
    def ask(user: str) -> Any:
        return reply(5)

    @token_budget(tokens, key="user")
    async def ask_later(user: str) -> Any:
        return reply(7)

    ask("alice"), ask("alice")
    with pytest.raises(RateLimitExceeded):
        ask("alice")
    asyncio.run(ask_later("alice"))
    assert tokens.peek("alice").used == 17
    assert store.admitted == [("calls", "alice"), ("tokens", "alice")] * 2 + [("tokens", "alice")]
    tokens.reset("alice")
    assert tokens.peek("alice").used == 0


class KeptStore(LoggedStore):
    """A store that waits, when a call ends, until what was settled is kept."""

    blocking = True
    flushed = 0

    def flush(self) -> None:
        self.flushed += 1


async def test_a_store_that_waits_needs_no_ways_of_its_own_for_tasks() -> None:
    store = KeptStore()

    @token_budget("100/day", key="user", name="tokens", store=store)
    async def ask(user: str) -> Any:
        return reply(7)

    await ask("alice")
    assert store.flushed == 1
    (tokens,) = limiters_of(ask)
    assert (await tokens.peek_async("alice")).used == 7
    await tokens.reset_async("alice")
    assert (await tokens.peek_async("alice")).used == 0


def test_a_provider_is_a_function_in_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def acme(report: providers.Fields) -> Usage | None:
        """Acme counts words, of which one is two tokens."""
        words = report.get("words_read"), report.get("words_written")
        return None if None in words else Usage(*(2 * count for count in words))

    monkeypatch.setattr(providers, "SHAPES", (*providers.SHAPES, (acme, ("words_read", "words_written"))))
    assert read_usage({"usage": {"words_read": 3, "words_written": 4}}) == Usage(6, 8)

    @token_budget("100/day", key="user")
    def ask(user: str) -> Any:
        return {"usage": {"words_read": 3, "words_written": 4}}

    ask("alice")
    assert limiters_of(ask)[0].peek("alice").used == 14


def test_a_framework_needs_an_answer_and_nothing_else() -> None:
    @rate_limited("1/minute", key="user", name="calls")
    def endpoint(user: str) -> bytes:
        return b"hello"

    def application(environ: dict[str, str], start_response: Any) -> list[bytes]:
        try:
            body = endpoint(environ["REMOTE_USER"])
        except LimitExceeded as error:
            status, headers, body = answer_to(error)
            start_response(f"{status} Too Many Requests", list(headers.items()))
            return [body]
        start_response("200 OK", [])
        return [body]

    seen: list[tuple[str, dict[str, str]]] = []
    for _ in range(2):
        body = application({"REMOTE_USER": "alice"}, lambda status, headers: seen.append((status, dict(headers))))
    assert [status for status, _ in seen] == ["200 OK", "429 Too Many Requests"]
    assert seen[1][1]["RateLimit"].startswith('"calls";r=0;t=')
    assert b"violated-policies" in b"".join(body)
