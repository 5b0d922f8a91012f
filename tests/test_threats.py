"""Threats: what somebody who is limited, or who may choose a key, must not be able to do. The README names each."""

from __future__ import annotations

import ast
import logging
import pickle
import traceback
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import quotalimit
from quotalimit import (
    InvalidKey,
    LimitExceeded,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    Store,
    StoreFull,
    TokenBudget,
    rate_limited,
    token_budget,
)
from quotalimit.integrations.client_address import Proxies

from .conftest import STORES, Place
from .helpers import used

SECRET = "sk-alice-7f3a@example.com"


class Plan(Enum):
    """An identity that is equal to its value."""

    FREE = "free"


def test_an_identity_cannot_be_forged_by_a_header() -> None:
    """What stands left of what a named proxy wrote is the client's own invention."""
    proxies = Proxies(["10.0.0.1"], "X-Forwarded-For")
    assert {proxies.client("10.0.0.1", [f"192.0.2.{forged}, 198.51.100.7"]) for forged in range(50)} == {"198.51.100.7"}
    assert {proxies.client("198.51.100.7", [f"192.0.2.{forged}"]) for forged in range(50)} == {"198.51.100.7"}


LOOK_ALIKES: list[Any] = [
    1, "1", b"1", (1,), ("1",), (b"1",), "i1", "s1", b"s1", b"i1", "free", Plan.FREE, ("free",), b"free",
    ("a", "bc"), ("ab", "c"), ("abc",), "abc", ("a/b", "c"), ("a", "b/c"), "t2:sa2:sb", ("a:2", "b"), ("a", ":2b"),
    UUID(int=1), UUID(int=1).bytes, UUID(int=1).hex, 2**61 - 1 + 5, 5, -1, -2, "é", "e\u0301", "A", "a", "a ", "a\0",
]  # fmt: skip
"""Keys of different people. Of the numbers some have one hash: 5 and 2**61 + 4, -1 and -2."""


def test_two_people_never_share_a_count(store: Store) -> None:
    limiter = RateLimiter("1/day", name="look-alikes", store=store)
    assert hash(5) == hash(2**61 + 4)
    assert hash(-1) == hash(-2)
    assert [key for key in LOOK_ALIKES if not limiter.allow(key)] == []
    assert [key for key in LOOK_ALIKES if limiter.allow(key)] == []


def test_keys_that_fall_on_one_lock_are_counted_apart() -> None:
    limiter = RateLimiter("2/day", name="stripes", store=MemoryStore())
    keys = [number * 1_024 for number in range(2_000)]
    colliding = [5 + number * (2**61 - 1) for number in range(500)]
    for key in keys + colliding:
        assert limiter.allow(key)
    assert all(used(limiter, key) == 1 for key in keys + colliding)


INJECTIONS = [
    "'; DROP TABLE states; --", '" OR 1=1 --', "{other}", "}{", "a}b{c", "*", "?", "[a-z]*", "\r\nFLUSHALL\r\n", "\0",
    "$1", "%s", "{0}", "{key.__class__}", "return redis.call('FLUSHALL')", "../../etc/passwd", "\ud800", "\u202e",
    ":", "::", "a:b", "\n", "x" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("what", ["key", "name"])
def test_what_is_in_a_key_or_a_name_is_never_run(store: Store, what: str) -> None:
    texts = [text for text in INJECTIONS if what == "key" or text.isprintable()]
    bystander = RateLimiter("5/day", name="bystander", store=store)
    assert bystander.allow("alice")
    limiters = [RateLimiter("1/day", name=text if what == "name" else "injected", store=store) for text in texts]
    for limiter, text in zip(limiters, texts, strict=True):
        assert limiter.allow(text if what == "key" else "alice")
        assert not limiter.allow(text if what == "key" else "alice")
    assert used(bystander) == 1
    for limiter, text in zip(limiters, texts, strict=True):
        limiter.reset(text if what == "key" else "alice")
        assert limiter.peek(text if what == "key" else "alice").used == 0
    assert used(bystander) == 1


@pytest.fixture(params=["memory", "sqlite"])
def bounded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """The places of the stores that bound their keys themselves. A server's memory is bounded by its settings."""
    with STORES[request.param](tmp_path) as place:
        yield place


def test_rule_22_a_flood_of_keys_is_refused_and_nobody_is_forgotten(bounded: Place) -> None:
    limiter = RateLimiter("2/day", name="flooded", store=bounded.make(max_keys=50))
    assert limiter.allow("alice")
    refused = 0
    for number in range(200):
        try:
            limiter.allow(f"forged-{number}")
        except StoreFull:
            refused += 1
    assert refused == 151
    assert limiter.allow("alice")
    assert not limiter.allow("alice")


def test_a_tenant_who_fills_a_limit_takes_no_room_from_another(bounded: Place) -> None:
    store = bounded.make(max_keys=20)
    hostile = RateLimiter("2/day", name="by session", store=store)
    for number in range(20):
        assert hostile.allow(f"forged-{number}")
    with pytest.raises(StoreFull):
        hostile.allow("one more")
    assert RateLimiter("2/day", name="by tenant", store=store).allow("bob")


def test_a_coarser_limit_in_front_keeps_the_room_of_a_finer_one() -> None:
    """All layers are asked together, so that what one refuses takes no room of another."""
    store = MemoryStore(max_keys=20)

    @rate_limited("5/day", key="tenant", name="by tenant", store=store)
    @rate_limited("100/day", key="session", name="by session", store=store)
    def ask(tenant: str, session: str) -> None: ...

    for number in range(100):
        try:
            ask("hostile", f"forged-{number}")
        except LimitExceeded:
            assert number >= 5
    for number in range(5):
        ask("bob", f"session-{number}")


def breaches() -> list[BaseException]:
    """Every exception of ours that is raised with a key at hand."""

    @rate_limited("1/day", key="user", cost=lambda user: 2)
    def too_large(user: Any) -> None: ...

    @token_budget("1/day", key="user", usage=lambda answer: 5)
    def spend(user: Any) -> str:
        return "an answer"

    @rate_limited("1/day", key=lambda user: [user])
    def no_key(user: Any) -> None: ...

    full = RateLimiter("1/day", name="full", store=MemoryStore(max_keys=1))
    full.acquire("bob")
    budget = TokenBudget("5/day", name="held")
    hold = budget.reserve(SECRET, 5)
    spend(SECRET)
    errors: list[BaseException] = []
    for act in (
        lambda: too_large(SECRET),
        lambda: spend(SECRET),
        lambda: no_key(SECRET),
        lambda: full.acquire(SECRET),
        lambda: budget.charge(SECRET, 1),
        lambda: full.acquire((SECRET, (SECRET,))),  # type: ignore[arg-type]
        lambda: full.acquire({SECRET: 1}),  # type: ignore[arg-type]
    ):
        with pytest.raises((LimitExceeded, StoreFull, InvalidKey)) as caught:
            act()
        errors.append(caught.value)
    hold.settle(1)
    return errors


def test_no_identity_is_shown_by_an_exception_or_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "quotalimit")
    for error in breaches():
        shown = [str(error), repr(error), repr(error.args), f"{error!s:>10}", *traceback.format_exception_only(error)]
        assert not any(SECRET in text for text in shown), shown
        logging.getLogger("quotalimit").error("caught %s", error)
        if isinstance(error, LimitExceeded):
            assert SECRET not in repr(error.decision) + repr(error.violations)
    assert SECRET not in caplog.text


def test_no_identity_is_shown_by_what_users_look_at(default_store: MemoryStore) -> None:
    budget = TokenBudget("50/day", name="tokens")
    with budget.reserve(SECRET, 5) as hold:
        shown = [repr(each) for each in (budget, hold, hold.decision, default_store, budget.peek(SECRET))]
        shown.append(repr(hold.settle(4)))
    assert not any(SECRET in text for text in shown)


def test_no_pickle_is_read() -> None:
    """Nor anything else that runs what it reads: what a store holds may have been written by others."""
    package = Path(quotalimit.__file__).parent
    readers = {
        "pickle": {"PicklingError"},
        "marshal": set(),
        "shelve": set(),
        "dill": set(),
        "yaml": set(),
        "jsonpickle": set(),
    }
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & readers.keys(), path
            elif isinstance(node, ast.ImportFrom) and node.module in readers:
                assert {alias.name for alias in node.names} <= readers[node.module], path


def test_a_state_that_was_tampered_with_is_refused_and_not_run() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return pytest.fail, ("a pickle was read",)

    written = pickle.dumps(Evil())
    for limit in ("SlidingWindow", "CalendarWindow", "TokenBucket"):
        algorithm = getattr(quotalimit, limit)("5/minute")
        with pytest.raises(ValueError, match="not"):
            algorithm.load(written[: len(written) // 8 * 8 + 3])


def test_who_is_refused_by_a_layer_in_front_is_told_so_though_there_is_no_room_behind() -> None:
    store = MemoryStore(max_keys=1)

    @rate_limited("1/minute", key="tenant", store=store)
    @rate_limited("5/minute", key="user", store=store)
    def ask(tenant: str, user: str) -> None: ...

    ask("acme", "alice")
    with pytest.raises(RateLimitExceeded):
        ask("acme", "a newcomer")
