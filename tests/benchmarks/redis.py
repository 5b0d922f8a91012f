"""`python -m tests.benchmarks.redis`: calls on one Valkey server, beside other limiters in the same run.

Needs `limits`, `pyrate-limiter` and `throttled-py`. Rounds of all cases take turns, so that the ratios hold on a
machine that others use too.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import limits
import limits.aio
import pyrate_limiter
import redis
import throttled
import throttled.asyncio

from quotalimit import rate_limited, token_budget
from quotalimit.stores.redis import RedisStore
from tests.stores.servers import Server

N = 1_000_000
"""Calls an hour: none is refused."""
TASKS = 50

EMPTY = "empty EVALSHA"


def blocking_cases(url: str, n: int = N) -> dict[str, Callable[[], Any]]:
    """One admitted call each, in a thread that waits for it."""
    client = redis.Redis.from_url(url)
    digest = client.script_load("return 1")
    store = RedisStore(url, prefix=f"q{uuid4()}")

    @rate_limited(f"{n}/hour", key="user", store=store, name="one")
    def one(user: str) -> None: ...

    @rate_limited(f"{n}/hour", key="user", store=store, name="first")
    @rate_limited(f"{n}/minute", key="user", store=store, name="second")
    @rate_limited(f"{n}/day", key="user", store=store, name="third")
    def three(user: str) -> None: ...

    @token_budget(f"{n}_000/day", key="user", reserve=10, usage=lambda _: 7, store=store, name="tokens")
    def budget(user: str) -> None: ...

    moving = limits.strategies.MovingWindowRateLimiter(limits.storage.RedisStorage(url))
    item = limits.parse(f"{n}/hour")
    rates = [pyrate_limiter.Rate(n, pyrate_limiter.Duration.HOUR)]
    pyrate = pyrate_limiter.Limiter(pyrate_limiter.RedisBucket.init(rates, client, f"pyrate{uuid4()}"))
    quota = throttled.rate_limiter.per_hour(n)
    gcra = throttled.Throttled(using="gcra", quota=quota, store=throttled.RedisStore(server=url))
    return {
        EMPTY: lambda: client.evalsha(digest, 0),
        "quotalimit, one limit": lambda: one("alice"),
        "quotalimit, three layers": lambda: three("alice"),
        "quotalimit, budget: hold and settle": lambda: budget("alice"),
        "limits, moving window": lambda: moving.hit(item, "alice"),
        "pyrate-limiter": lambda: pyrate.try_acquire("alice", blocking=False),
        "throttled-py, GCRA (not exact)": lambda: gcra.limit("alice"),
    }


async def waiting_cases(url: str) -> dict[str, Callable[[int], Awaitable[Any]]]:
    """One admitted call each, in one of many tasks."""
    client = redis.asyncio.Redis.from_url(url)
    digest = await client.script_load("return 1")
    store = RedisStore(url, prefix=f"q{uuid4()}")

    @rate_limited(f"{N}/hour", key="user", store=store, name="one")
    async def one(user: int) -> None: ...

    moving = limits.aio.strategies.MovingWindowRateLimiter(
        limits.aio.storage.RedisStorage(f"async+{url}", implementation="redispy")
    )
    item = limits.parse(f"{N}/hour")
    rates = [pyrate_limiter.Rate(N, pyrate_limiter.Duration.HOUR)]
    made = pyrate_limiter.RedisBucket.init(rates, client, f"pyrate{uuid4()}")
    pyrate = pyrate_limiter.Limiter(await made)  # type: ignore[misc]
    quota = throttled.asyncio.rate_limiter.per_hour(N)
    gcra = throttled.asyncio.Throttled(using="gcra", quota=quota, store=throttled.asyncio.RedisStore(server=url))
    return {
        EMPTY: lambda _: client.evalsha(digest, 0),
        "quotalimit, one limit": lambda task: one(task),
        "limits, moving window": lambda task: moving.hit(item, str(task)),
        "pyrate-limiter": lambda task: pyrate.try_acquire_async(str(task), blocking=False),
        "throttled-py, GCRA (not exact)": lambda task: gcra.limit(str(task)),
    }


def time_calls(url: str, rounds: int) -> dict[str, float]:
    """Microseconds a call, the median of all rounds."""
    cases = blocking_cases(url)
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, call in cases.items():
            began = time.perf_counter()
            for _ in range(100):
                call()
            taken[name].append((time.perf_counter() - began) * 1e4)
    return {name: statistics.median(times) for name, times in taken.items()}


async def count_calls(url: str, rounds: int) -> dict[str, float]:
    """Calls a second of all tasks together, the median of all rounds."""
    cases = await waiting_cases(url)
    rates: dict[str, list[float]] = {name: [] for name in cases}

    async def work(call: Callable[[int], Awaitable[Any]], task: int) -> None:
        for _ in range(20):
            await call(task)

    for _ in range(rounds):
        for name, call in cases.items():
            began = time.perf_counter()
            await asyncio.gather(*(work(call, task) for task in range(TASKS)))
            rates[name].append(20 * TASKS / (time.perf_counter() - began))
    return {name: statistics.median(rate) for name, rate in rates.items()}


def weigh(server: Server) -> dict[str, tuple[float, float]]:
    """Bytes of the server's memory for the first call of a key, and for each call of a thousand."""
    weights: dict[str, tuple[float, float]] = {}
    with server.client() as client:
        for name in blocking_cases(server.url):
            if name == EMPTY or "three" in name:
                continue
            client.flushall()
            call = blocking_cases(server.url, 1_000)[name]

            def used() -> int:
                keys = [key for key in client.scan_iter() if b"journal" not in key]
                return sum(client.memory_usage(key, samples=0) for key in keys)

            call()
            first = used()
            for _ in range(999):
                call()
            weights[name] = (first, used() / 1_000)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    folder = Path(tempfile.mkdtemp())
    server = Server(folder)
    try:
        timed = time_calls(server.url, rounds)
        counted = asyncio.run(count_calls(server.url, rounds))
        weighed = weigh(server)
    finally:
        server.kill()
        shutil.rmtree(folder)
    print("| one thread | µs a call | of an empty EVALSHA |\n|---|---|---|")
    for name, taken in timed.items():
        print(f"| {name} | {taken:.1f} | {taken / timed[EMPTY]:.2f} |")
    print(f"\n| {TASKS} tasks | calls a second | of an empty EVALSHA |\n|---|---|---|")
    for name, rate in counted.items():
        print(f"| {name} | {rate:,.0f} | {rate / counted[EMPTY]:.2f} |")
    print("\n| server memory | bytes, first call | bytes a call at 1,000 |\n|---|---|---|")
    for name, (first, each) in weighed.items():
        print(f"| {name} | {first:,.0f} | {each:,.1f} |")


if __name__ == "__main__":
    main()
