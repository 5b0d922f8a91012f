"""Eight threads that work and call in turns."""

from __future__ import annotations

import random
import statistics
import time
import timeit
from collections.abc import Callable
from functools import partial
from threading import Barrier, Thread
from typing import Any

from quotalimit import MemoryStore
from tests.benchmarks.calls import FUNCTION, limited
from tests.benchmarks.peers import INSTALLED, Bare
from tests.benchmarks.report import Aim, Table
from tests.benchmarks.timing import Loop, compile_loop

THREADS = 8
KEYS = 1_000
CALLS = 2_500
"""Calls of a thread in a round."""
AMOUNT = 1_000_000
WORK = "for _ in turns:\n    pass"
NONE = "no limiter, the bare function"
OURS = "**quotalimit**, decorated"


def threads(rounds: int) -> Table:
    cases = {
        NONE: Bare(FUNCTION.statement, FUNCTION.make(lambda ask: ask)),
        OURS: Bare(FUNCTION.statement, FUNCTION.make(partial(limited, amount=AMOUNT, store=MemoryStore()))),
        **{peer.name: peer.make(AMOUNT) for peer in INSTALLED if not peer.awaited and peer.package != "slowapi"},
    }
    turns = ten_microseconds()
    spent: dict[str, list[int]] = {name: [] for name in cases}
    loops = {name: timed(bare, spent[name], turns) for name, bare in cases.items()}
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(max(3, rounds // 10) + 1):
        for name, loop in loops.items():
            rate = calls_a_second(loop)
            cases[name].after()
            if number:
                rates[name].append(rate)
            else:
                spent[name].clear()
    table = Table(
        f"{THREADS} threads, {KEYS:,} keys, about 10 µs of work between calls",
        ("", "calls a second", "of no limiter", "median call", "p99.9 of calls"),
        ["With the interpreter's lock, a call that loses its turn waits for up to seven others' turns of 5 ms."],
    )
    for name in cases:
        share = statistics.median(rate / free for rate, free in zip(rates[name], rates[NONE], strict=True))
        calls = sorted(spent[name])
        late = f"{calls[len(calls) * 999 // 1_000] / 1e3:,.1f} µs"
        cells = (
            f"{statistics.median(rates[name]):,.0f}",
            f"{share:.2f}×",
            f"{statistics.median(calls) / 1e3:,.1f} µs",
            late,
        )
        table.add(name, *cells, figure=share, aim=Aim(0.7, at_least=True) if name == OURS else None)
    return table


def ten_microseconds() -> range:
    """A range that takes about this long to go through."""
    names = {"turns": range(100_000)}
    seconds = min(timeit.repeat(WORK, timer=time.process_time, globals=names, number=1, repeat=20))
    return range(round(1e-5 / seconds * 100_000))


def timed(bare: Bare, spent: list[int], turns: range) -> Loop:
    """A loop that measures each of its calls, and works in between."""
    statement = f"start = clock()\n{bare.statement}\nspent.append(clock() - start)\n{WORK}"
    return compile_loop(statement, {**bare.names, "clock": time.perf_counter_ns, "spent": spent, "turns": turns})


def calls_a_second(loop: Callable[[list[str]], Any]) -> float:
    start = Barrier(THREADS + 1)
    users = [f"user {number}" for number in range(KEYS)]

    def work(keys: list[str]) -> None:
        start.wait()
        loop(keys)

    workers = [Thread(target=work, args=(random.choices(users, k=CALLS),)) for _ in range(THREADS)]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    return THREADS * CALLS / (time.perf_counter() - began)
