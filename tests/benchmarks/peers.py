"""The peers, each in its fastest documented way: a bare hit, around no function but where it has no other way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from threading import Thread
from typing import Any

from tests.benchmarks.states import PERIOD, half_full
from tests.benchmarks.timing import Case, Loop, compile_loop

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

    def loop(self) -> Loop:
        return compile_loop(self.statement, self.names)


@dataclass(frozen=True)
class Peer:
    """A package, its module, what of it is measured, and how to make a limit of some amount an hour."""

    package: str
    module: str
    algorithm: str
    make: Callable[[int], Bare]
    exact: bool = False
    """Whether it has exact windows, one for each key."""
    keyed: bool = True
    awaited: bool = False
    most_keys: int = 1_000_000
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

    def filling(self, amount: int) -> Case:
        """A case in which the windows of many keys fill; of a peer without keys, just hits."""
        bare = self.make(amount)
        loop = bare.loop()
        if not self.keyed:
            return Case(self.name, loop, after=bare.after)
        keys = half_full(lambda key: loop([key]), amount, bare.argument)
        return Case(self.name, loop, keys, after=bare.after)


def await_end(thread: Thread) -> None:
    """Wait for a thread without letting the processor doze off."""
    while thread.is_alive():
        time.sleep(0)


def limits_moving_window(amount: int) -> Bare:
    from limits import RateLimitItemPerHour
    from limits.storage import MemoryStorage
    from limits.strategies import MovingWindowRateLimiter

    storage = MemoryStorage()
    names = {"hit": MovingWindowRateLimiter(storage).hit, "item": RateLimitItemPerHour(amount)}
    return Bare("admitted = hit(item, key)", names, after=lambda: await_end(storage.timer))


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

    return Bare(
        "endpoint(request=key)", {"endpoint": endpoint}, request, lambda: await_end(vars(limiter._storage)["timer"])
    )


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


def token_throttle(_amount: int) -> Bare:
    from token_throttle import PerModelConfig, Quota, SyncMemoryBackendBuilder, SyncRateLimiter, UsageQuotas

    quotas = UsageQuotas([Quota(metric="tokens", limit=ENDLESS, per_seconds=PERIOD)])
    limiter = SyncRateLimiter(PerModelConfig(quotas=quotas), backend=SyncMemoryBackendBuilder())
    statement = "with reserve({'tokens': 20}, model=key) as hold:\n    hold.set_actual_usage({'tokens': 15})"
    return Bare(statement, {"reserve": limiter.reserve})


LIMITS = Peer("limits", "limits", "moving window", limits_moving_window, exact=True)
PEERS = [
    LIMITS,
    Peer(
        "pyrate-limiter",
        "pyrate_limiter",
        "sliding log, a bucket for each key",
        pyrate_limiter,
        exact=True,
        most_keys=100_000,
    ),
    Peer("slowapi", "slowapi", "moving window, around an endpoint", slowapi_moving_window, exact=True),
    Peer("throttled-py", "throttled", "GCRA: its quickest, and no exact window", throttled_gcra),
    Peer("token-bucket", "token_bucket", "token bucket, and no exact window", token_bucket),
    Peer("ratelimit", "ratelimit", "fixed window for all callers together", ratelimit_decorator, keyed=False),
    Peer(
        "aiolimiter",
        "aiolimiter",
        "leaky bucket for all callers together, awaited",
        aiolimiter,
        keyed=False,
        awaited=True,
    ),
]
TOKEN_THROTTLE = Peer(
    "token-throttle", "token_throttle", "token bucket, reserve and refund", token_throttle, keyed=False
)
INSTALLED = [peer for peer in PEERS if peer.version]
