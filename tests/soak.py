"""A soak: mixed load at full speed for a long time, and whether the counts are exact and memory flat at its end.

    python -m tests.soak --minutes 30 --store memory://
    python -m tests.soak --minutes 30 --store sqlite:////tmp/soak.db

Threads and tasks call functions with several layers for a hundred thousand keys that come and go; calls fail, streams
are read, left and dropped, tasks are cancelled, holds nest. Every caller keeps a ledger of its own. In the end the
budgets must be what the ledgers say, every contested key must have been admitted exactly as often as its limit says,
no hold may be open and nothing logged.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from statistics import median

from quotalimit import (
    LimitExceeded,
    RateLimiter,
    SlidingWindow,
    Store,
    TokenBudget,
    everyone,
    limiters_of,
    rate_limited,
    store_from_url,
    token_budget,
)

KEYS = 100_000
TEAMS = [f"team-{number}" for number in range(8)]
CONTESTED = 50
"""How often each contested key is admitted."""
ATTEMPTS = 80
"""How often it is tried."""


class Ledger(Counter[str]):
    """What one caller did: units by team, and how many calls of each kind."""


def units(answer: object) -> int | None:
    """What a result or an item of a stream says was used."""
    return answer if isinstance(answer, int) else None


class Load:
    """The functions that are called, on one store."""

    def __init__(self, store: Store) -> None:
        run = f"soak-{time.time_ns()}"
        self.budget = TokenBudget(SlidingWindow(f"{10**12}/day"), name=f"{run}-teams", store=store)
        self.contest = RateLimiter(f"{CONTESTED}/day", name=f"{run}-contest", store=store)
        self.wrong: list[str] = []
        self._turn = count()
        self._attempts: Counter[str] = Counter()
        self._admitted: Counter[str] = Counter()
        self._lock = threading.Lock()

        @rate_limited("5/second", key="user", name=f"{run}-visits", store=store)
        @token_budget(
            SlidingWindow("1000/second"), key="user", reserve=20, usage=units, name=f"{run}-tokens", store=store
        )
        def visit(user: str, tokens: int) -> int:
            return tokens

        @token_budget(self.budget, key="team", reserve=10, usage=units)
        def ask(team: str, tokens: int) -> int:
            if tokens < 0:
                raise ValueError
            return tokens

        @token_budget(self.budget, key="team", reserve=30, usage=units)
        def agent(team: str, tokens: int) -> list[int]:
            return [ask(team, tokens), ask(team, 5)]  # which says nothing: what was used inside is known

        @token_budget(self.budget, key="team", usage=units)
        def stream(team: str, items: int) -> Iterator[int]:
            yield from range(items)

        @token_budget(self.budget, key="team", usage=units)
        async def stream_async(team: str, items: int) -> AsyncIterator[int]:
            for item in range(items):
                await asyncio.sleep(0)
                yield item

        @rate_limited("200/second", key=everyone, wait=0.2, name=f"{run}-line", store=store)
        @token_budget(self.budget, key="team", reserve=7, usage=units)
        async def ask_async(team: str, tokens: int) -> int:
            await asyncio.sleep(tokens / 10_000)
            return tokens

        @rate_limited("200/second", key=everyone, wait=0.2, name=f"{run}-line-of-threads", store=store)
        def queue() -> None: ...

        self.visit, self.ask, self.agent, self.queue = visit, ask, agent, queue
        self.stream, self.stream_async, self.ask_async = stream, stream_async, ask_async
        decorated = (visit, ask, agent, stream, stream_async, ask_async, queue)
        self.limiters = {self.contest, *(limiter for function in decorated for limiter in limiters_of(function))}

    def compete(self) -> None:
        """Try a contested key; whoever tries it last checks how often it was admitted, and forgets it."""
        turn = next(self._turn)
        key = f"contested-{turn // ATTEMPTS}"
        admitted = self.contest.allow(key)
        with self._lock:
            self._attempts[key] += 1
            self._admitted[key] += admitted
            if self._attempts[key] < ATTEMPTS:
                return
            if self._admitted[key] != CONTESTED:
                self.wrong.append(f"{key} was admitted {self._admitted[key]} times and not {CONTESTED}")
            del self._attempts[key], self._admitted[key]
        self.contest.reset(key)

    def act(self, random: random.Random, ledger: Ledger) -> None:
        """One random call of a thread."""
        team, tokens = random.choice(TEAMS), random.randrange(100)
        kind = random.choices(("visit", "ask", "agent", "stream", "hold", "fail", "compete"), (8, 2, 1, 1, 1, 1, 6))[0]
        if random.random() < 0.0005:
            kind = "queue"
        ledger[kind] += 1
        if kind == "visit":
            self.visit(f"user-{random.randrange(KEYS)}", tokens)
        elif kind == "ask":
            ledger[team] += self.ask(team, tokens)
        elif kind == "agent":
            ledger[team] += sum(self.agent(team, tokens))
        elif kind == "stream":
            items, read = random.randrange(1, 6), random.randrange(6)
            stream = self.stream(team, items)
            for _ in range(read):
                item = next(stream, None)
                ledger[team] += item or 0
            # What is not read is not charged: the stream is dropped here, and finalized.
        elif kind == "hold":
            with self.budget.reserve(team, 15) as hold:
                hold.settle(tokens)
            ledger[team] += tokens
        elif kind == "fail":
            try:
                self.ask(team, -1)
            except ValueError:
                pass
        elif kind == "queue":
            self.queue()
        else:
            self.compete()

    def run_thread(self, seed: int, until: float, ledger: Ledger) -> None:
        chance = random.Random(seed)
        while time.monotonic() < until:
            for _ in range(100):
                try:
                    self.act(chance, ledger)
                except LimitExceeded:
                    ledger["refused"] += 1

    def run_tasks(self, seed: int, until: float, ledger: Ledger) -> None:
        asyncio.run(self._tasks(random.Random(seed), until, ledger))

    async def _tasks(self, random: random.Random, until: float, ledger: Ledger) -> None:
        async def worker() -> None:
            while time.monotonic() < until:
                team, tokens = random.choice(TEAMS), random.randrange(100)
                try:
                    if random.random() < 0.5:
                        ledger["async"] += 1
                        used = await self.ask_async(team, tokens)
                        ledger[team] += used
                    else:
                        ledger["async stream"] += 1
                        stream = self.stream_async(team, 1 + tokens % 7)
                        async for item in stream:
                            ledger[team] += item
                            if random.random() < 0.1:
                                break
                        await stream.aclose()
                except LimitExceeded:
                    ledger["refused"] += 1
                await asyncio.sleep(0.001)

        async def cancelled() -> None:
            while time.monotonic() < until:
                team = random.choice(TEAMS)
                entered = asyncio.Event()

                @token_budget(self.budget, key="team", reserve=9, usage=units)
                async def hang(team: str, entered: asyncio.Event = entered) -> int:
                    entered.set()
                    await asyncio.Event().wait()
                    return 0

                task = asyncio.create_task(hang(team))
                await entered.wait()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                ledger["cancelled"] += 1
                ledger[team] += 9  # the provider may have billed: the hold is kept
                await asyncio.sleep(0.01)

        await asyncio.gather(*(worker() for _ in range(20)), *(cancelled() for _ in range(2)))


class Warnings(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def resident() -> float:
    """The megabytes of memory that the process has in use."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1_024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_024


def soak(store: Store, minutes: float, threads: int) -> list[str]:
    """Put load on a store, and tell all that was wrong at the end."""
    warnings = Warnings()
    logging.getLogger("quotalimit").addHandler(warnings)
    load = Load(store)
    started = time.monotonic()
    until = started + 60 * minutes
    ledgers = [Ledger() for _ in range(threads + 1)]
    crowd = [
        threading.Thread(target=load.run_thread if seed else load.run_tasks, args=(seed, until, ledger))
        for seed, ledger in enumerate(ledgers)
    ]
    memory: list[float] = []
    for thread in crowd:
        thread.start()
    while any(thread.is_alive() for thread in crowd):
        time.sleep(min(2, minutes))
        memory.append(resident())
    for thread in crowd:
        thread.join()
    gc.collect()
    took = time.monotonic() - started

    wrong = list(load.wrong)
    done: Counter[str] = Counter()
    for ledger in ledgers:
        done.update(ledger)
    for team in TEAMS:
        used = load.budget.peek(team).used
        if used != done[team]:
            wrong.append(f"{team} used {done[team]} and is charged {used}")
    kinds = {kind: number for kind, number in done.items() if kind not in TEAMS}
    held = sum(len(counts.open) for limiter in load.limiters for counts, _ in limiter.bound().places)
    if held:
        wrong.append(f"{held} holds are open")
    wrong += [f"logged: {message}" for message in warnings.messages]
    quarter = max(1, len(memory) // 4)
    before, after = median(memory[quarter : 2 * quarter] or memory), median(memory[-quarter:])
    if minutes >= 2 and after > 1.1 * before + 5:
        wrong.append(f"memory grew from {before:.0f} to {after:.0f} MB")
    calls = sum(kinds.values())
    print(f"{calls:,} calls in {took:.0f} s, {calls / took:,.0f} a second, by {threads} threads and 22 tasks")
    print(", ".join(f"{kind} {number:,}" for kind, number in sorted(kinds.items())))
    print(f"{sum(done[team] for team in TEAMS):,} units charged; {held} holds open; {len(warnings.messages)} warnings")
    print(f"memory in the second quarter {before:.0f} MB, in the last {after:.0f} MB")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--store", default="memory://", help="the URL of a store")
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    wrong = soak(store_from_url(arguments.store), arguments.minutes, arguments.threads)
    for line in wrong:
        print("WRONG:", line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
