"""What the processes of `test_processes.py` run: `python -m tests.stores.worker ACT URL`. A line says it is ready."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from quotalimit import LimitExceeded, RateLimiter, RedisStore, SQLiteStore, Store, TokenBudget


def limiters(store: Store) -> tuple[RateLimiter, TokenBudget]:
    """The limiters that all processes share."""
    return RateLimiter("100/day", name="calls", store=store), TokenBudget("10_000/day", name="tokens", store=store)


def say(*words: object) -> None:
    print(*words, flush=True)


def hammer(store: Store) -> None:
    """Four threads call as fast as they can; says how many calls were admitted and how many tokens were used."""
    calls, tokens = limiters(store)
    admitted: list[int] = []
    used: list[int] = []

    def run(number: int) -> None:
        for turn in range(40):
            if calls.allow("alice"):
                admitted.append(1)
            try:
                with tokens.reserve("alice", 30) as hold:
                    hold.settle(number + turn)
                used.append(number + turn)
            except LimitExceeded:
                pass

    say("ready")
    sys.stdin.readline()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say(len(admitted), sum(used))


def hold(store: Store) -> None:
    """Some calls have ended, some run, when the process is killed."""
    calls, tokens = limiters(store)
    for _ in range(7):
        calls.acquire("alice")
    for used in (11, 13):
        with tokens.reserve("alice", 100) as ended:
            ended.settle(used)
    running = [tokens.reserve("alice", 1_000) for _ in range(3)]
    for one in running:
        one.__enter__()
    say("ready")
    sys.stdin.readline()


def count(store: Store) -> None:
    """Charges one token after the other, and says how many, until it is killed."""
    _, tokens = limiters(store)
    for number in range(1, 10_000):
        tokens.charge("alice", 1)
        say(number)


def settle_at_exit(store: Store) -> None:
    """A call has ended, but nobody waits until that is written: the process ends at once."""
    _, tokens = limiters(store)
    hold = tokens.reserve("alice", 100)
    hold.settle(42)
    say("ready")


ACTS: dict[str, Callable[[Store], None]] = {act.__name__: act for act in (hammer, hold, count, settle_at_exit)}


def patient(url: str) -> Store:
    """A store that outwaits a machine which is busy with other tests."""
    if url.startswith("sqlite:///"):
        return SQLiteStore(url.removeprefix("sqlite:///"), timeout=30)
    return RedisStore(url, timeout=30)


if __name__ == "__main__":
    ACTS[sys.argv[1]](patient(sys.argv[2]))
