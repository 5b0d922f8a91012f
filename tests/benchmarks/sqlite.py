"""SQLite operations a second in 1 and 4 processes: `python tests/benchmarks/sqlite.py [SECONDS]`.

All processes use one file. pyrate-limiter, the only peer that counts in SQLite, is measured beside if it is installed;
`limits`, `throttled-py` and the others have no such store.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from multiprocessing.synchronize import Barrier
from pathlib import Path
from time import perf_counter
from typing import Any

from quotalimit import RateLimiter, TokenBucket, TokenBudget, rate_limited
from quotalimit.stores.sqlite import SQLiteStore


def small(path: str) -> Callable[[], object]:
    """Admitted calls of one key, whose state is a few numbers."""
    limiter = RateLimiter(TokenBucket("1_000_000/second"), name="small", store=SQLiteStore(path, timeout=10))
    return lambda: limiter.acquire("alice")


def large(path: str) -> Callable[[], object]:
    """Admitted calls of one key, in an exact sliding window of up to 10 million."""
    limiter = RateLimiter("10_000_000/day", name="large", store=SQLiteStore(path, timeout=10))
    return lambda: limiter.acquire("alice")


def many(path: str) -> Callable[[], object]:
    """Admitted calls, each of a new key."""
    limiter = RateLimiter("5/minute", name="many", store=SQLiteStore(path, timeout=10))
    numbers = count()
    return lambda: limiter.acquire((multiprocessing.current_process().pid or 0, next(numbers)))


def refused(path: str) -> Callable[[], object]:
    """Refused calls of one key."""
    limiter = RateLimiter("20/day", name="refused", store=SQLiteStore(path, timeout=10))
    return lambda: limiter.allow("alice")


def layers(path: str) -> Callable[[], object]:
    """Admitted calls of a function with three layers."""
    store = SQLiteStore(path, timeout=10)

    @rate_limited(TokenBucket("1_000_000/second"), key="address", name="address", store=store)
    @rate_limited(TokenBucket("1_000_000/second"), key="user", name="user", store=store)
    @rate_limited(TokenBucket("1_000_000/second"), key="org", name="org", store=store)
    def call(address: str, user: str, org: str) -> None: ...

    return lambda: call("192.0.2.1", "alice", "acme")


def hold(path: str) -> Callable[[], object]:
    """Calls that hold tokens and settle them: two transactions each."""
    budget = TokenBudget("1_000_000_000/day", name="hold", store=SQLiteStore(path, timeout=10))

    def call() -> None:
        with budget.reserve("alice", 50) as held:
            held.settle(20)

    return call


def pyrate(path: str) -> Callable[[], object]:
    """pyrate-limiter's SQLiteBucket: admitted calls of one key, in a sliding window of up to 10 million."""
    from pyrate_limiter import Limiter, SQLiteBucket
    from pyrate_limiter import Rate as PyrateRate

    bucket: Any = SQLiteBucket.init_from_file(
        [PyrateRate(10_000_000, 86_400_000)], db_path=path, use_file_lock=bool(find_spec("filelock"))
    )
    limiter = Limiter(bucket)
    return lambda: limiter.try_acquire("alice", blocking=False)


CASES: list[Callable[[str], Callable[[], object]]] = [small, large, many, refused, layers, hold, pyrate]


def run(case: Callable[[str], Callable[[], object]], path: str, seconds: float, start: Barrier, results: Any) -> None:
    call = case(path)
    call()
    start.wait()
    begun = perf_counter()
    done = 0
    while (passed := perf_counter() - begun) < seconds:
        for _ in range(20):
            call()
        done += 20
    results.put(done / passed)


def measure(case: Callable[[str], Callable[[], object]], processes: int, seconds: float) -> float:
    """Calls a second of all processes together."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes), context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "counts.db")
        workers = [context.Process(target=run, args=(case, path, seconds, start, results)) for _ in range(processes)]
        for worker in workers:
            worker.start()
        rates = [results.get() for _ in workers]
        for worker in workers:
            worker.join()
    return sum(rates)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    print(f"{'calls a second':<16}{'1 process':>12}{'4 processes':>14}")
    for case in CASES:
        if case is pyrate and not find_spec("pyrate_limiter"):
            continue
        one, four = (measure(case, processes, seconds) for processes in (1, 4))
        print(f"{case.__name__:<16}{one:>12,.0f}{four:>14,.0f}   {(case.__doc__ or '').splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
