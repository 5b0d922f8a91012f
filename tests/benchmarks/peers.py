"""The peers, each in its fastest documented way: a bare hit, around no function but where it has no other way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from tests.benchmarks.states import PERIOD

ENDLESS = 10**9
"""The amount for peers that count for everybody at once: what they do does not depend on it."""


@dataclass(frozen=True)
class Bare:
    """A peer's limit, ready to be hit."""

    statement: str
    """Hits for `key`, and sets `admitted` where it does not raise."""
    names: dict[str, Any]
    argument: Callable[[str], Any] = str
    """What the peer takes for a user's name."""
    after: Callable[[], object] = lambda: None
    """Waits for what the peer does in the background."""


@dataclass(frozen=True)
class Peer:
    """A package, what of it is measured, and how to make a limit of some amount an hour."""

    package: str
    algorithm: str
    make: Callable[[int], Bare]
    exact: bool = False
    """Whether it has exact windows, one for each key."""
    keyed: bool = True
    most_keys: int = field(default=1_000_000)
    """For how many keys it can be asked in reasonable time and memory."""

    @property
    def name(self) -> str:
        return f"{self.package}, {self.algorithm}"

    @property
    def version(self) -> str | None:
        """The installed version, or None."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def limits_moving_window(amount: int) -> Bare:
    from limits import RateLimitItemPerHour
    from limits.storage import MemoryStorage
    from limits.strategies import MovingWindowRateLimiter

    storage = MemoryStorage()
    names = {"hit": MovingWindowRateLimiter(storage).hit, "item": RateLimitItemPerHour(amount)}
    return Bare("admitted = hit(item, key)", names, after=lambda: storage.timer.join())


def pyrate_limiter(amount: int) -> Bare:
    """Its documented way for keys: a factory that finds the bucket of an item by its name.

    Buckets are not registered with the thread that trims them, which would run on into other cases' rounds.
    """
    from pyrate_limiter import BucketFactory, Duration, InMemoryBucket, Limiter, MonotonicClock, Rate, RateItem

    rates = [Rate(amount, Duration.HOUR)]

    class Buckets(BucketFactory):
        def __init__(self) -> None:
            self.clock = MonotonicClock()
            self.buckets: dict[str, InMemoryBucket] = {}

        def wrap_item(self, name: str, weight: int = 1) -> RateItem:
            return RateItem(name, self.clock.now(), weight=weight)

        def get(self, item: RateItem) -> InMemoryBucket:
            bucket = self.buckets.get(item.name)
            if bucket is None:
                bucket = self.buckets[item.name] = InMemoryBucket(rates)
            return bucket

    return Bare("admitted = hit(key, blocking=False)", {"hit": Limiter(Buckets()).try_acquire})


def throttled_gcra(amount: int) -> Bare:
    from throttled import MemoryStore, RateLimiterType, Throttled, rate_limiter

    quota = rate_limiter.per_hour(amount, burst=amount)
    store = MemoryStore(options={"MAX_SIZE": 2_000_000})
    throttle = Throttled(using=RateLimiterType.GCRA.value, quota=quota, store=store)
    return Bare("admitted = not hit(key).limited", {"hit": throttle.limit})


def slowapi_moving_window(amount: int) -> Bare:
    from slowapi import Limiter
    from starlette.requests import Request
    from starlette.responses import Response

    limiter = Limiter(key_func=lambda request: request.client.host, strategy="moving-window")
    response = Response()

    @limiter.limit(f"{amount}/hour")  # type: ignore[untyped-decorator, unused-ignore]
    def endpoint(request: Request) -> Response:
        return response

    def request(user: str) -> Request:
        return Request({"type": "http", "method": "GET", "path": "/", "headers": [], "client": (user, 1)})

    return Bare("endpoint(request=key)", {"endpoint": endpoint}, request, lambda: limiter._storage.timer.join())


def ratelimit_decorator(_amount: int) -> Bare:
    from ratelimit import limits

    @limits(calls=ENDLESS, period=PERIOD)  # type: ignore[untyped-decorator, unused-ignore]
    def ask(user: str) -> str:
        return user

    return Bare("ask(key)", {"ask": ask})


def token_bucket(amount: int) -> Bare:
    from token_bucket import Limiter, MemoryStorage

    return Bare("admitted = hit(key)", {"hit": Limiter(amount / PERIOD, amount, MemoryStorage()).consume})


def aiolimiter(_amount: int) -> Bare:
    from aiolimiter import AsyncLimiter

    return Bare("await acquire()", {"acquire": AsyncLimiter(ENDLESS, PERIOD).acquire})


LIMITS = Peer("limits", "moving window", limits_moving_window, exact=True)
PEERS = [
    LIMITS,
    Peer("pyrate-limiter", "sliding log, a bucket for each key", pyrate_limiter, exact=True, most_keys=100_000),
    Peer("slowapi", "moving window, around an endpoint", slowapi_moving_window, exact=True),
    Peer("throttled-py", "GCRA: its quickest, and no exact window", throttled_gcra),
    Peer("token-bucket", "token bucket, and no exact window", token_bucket),
    Peer("ratelimit", "fixed window for all callers together", ratelimit_decorator, keyed=False),
    Peer("aiolimiter", "leaky bucket for all callers together, awaited", aiolimiter, keyed=False),
]
INSTALLED = [peer for peer in PEERS if peer.version]
