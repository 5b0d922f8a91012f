"""How the cost of a call grows with N, and with the number of keys."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from quotalimit import MemoryStore
from tests.benchmarks.calls import FUNCTION, N, limited
from tests.benchmarks.peers import INSTALLED, Bare
from tests.benchmarks.report import Aim, Table, ns, times
from tests.benchmarks.timing import Case, Timings, measure

AMOUNTS = (10, 100, 1_000, 10_000, 100_000)
KEYS = (1, 1_000, 100_000, 1_000_000)
OURS = "**quotalimit**, decorated"
KEYED = [peer for peer in INSTALLED if peer.keyed and peer.package != "slowapi"]


def package(name: str) -> str:
    return "quotalimit" if name == OURS else name.split(",")[0]


def amounts(rounds: int) -> Table:
    """All N of everybody take turns."""
    cases = []
    for amount in AMOUNTS:
        cases.append(FUNCTION.sliding(partial(limited, amount=amount), amount, f"{OURS} {amount}"))
        cases += [replace(peer.filling(amount), name=f"{peer.name} {amount}") for peer in KEYED]
    timings = measure(cases, rounds=rounds, calls=500)
    table = Table(
        "Cost of a call against N, one key",
        ("", *(f"N = {amount:,}" for amount in AMOUNTS), "slowest, of the quickest"),
        ["Ours is the whole call, in a full, sliding window; peers' are bare hits, in one half full to full."],
    )
    for name in (OURS, *(peer.name for peer in KEYED)):
        figures = [timings.ns(f"{name} {amount}") for amount in AMOUNTS]
        table.series[package(name)] = list(zip(AMOUNTS, figures, strict=True))
        spread = max(figures) / min(figures)
        aim = Aim(1.15) if name == OURS else None
        table.add(name, *map(ns, figures), times(spread), figure=spread, aim=aim)
    return table


def keys(rounds: int) -> Table:
    """One number of keys at a time, for the memory that the largest takes."""
    table = Table(
        "Cost of a call against the number of keys, each with some calls in its window, at random",
        ("", *(f"{number:,} key{'s' * (number > 1)}" for number in KEYS), "slowest, of the quickest"),
        [f"N = {N:,}, by the real clock. What grows is the time to fetch from memory what is not in the caches."],
    )
    measured = {number: _with_keys(number, rounds) for number in KEYS}
    for name in (OURS, *(peer.name for peer in KEYED)):
        figures = [(number, timings.ns(name)) for number, timings in measured.items() if name in timings.rounds]
        table.series[package(name)] = figures
        cells = [ns(figure) for _, figure in figures] + ["–"] * (len(KEYS) - len(figures))
        spread = max(figure for _, figure in figures) / min(figure for _, figure in figures)
        aim = Aim(3) if name == OURS else None
        table.add(name, *cells, times(spread), figure=spread, aim=aim)
    return table


def _with_keys(number: int, rounds: int) -> Timings:
    if number == 1:
        theirs = [peer.filling(N) for peer in KEYED]
        return measure([FUNCTION.filling(limited, OURS), *theirs], rounds=rounds, calls=500)
    users = [f"user {place}" for place in range(number)]
    names = FUNCTION.make(partial(limited, store=MemoryStore()))
    ours = Bare(FUNCTION.statement, names)
    bares = {OURS: ours, **{peer.name: peer.make(N) for peer in KEYED if number <= peer.most_keys}}
    cases = [_at_random(name, bare, users) for name, bare in bares.items()]
    fewer = max(3, rounds // 10) if number > 100_000 else rounds
    return measure(cases, rounds=fewer, calls=500 * rounds // fewer)


def _at_random(name: str, bare: Bare, users: list[str]) -> Case:
    """A case in which every user has called once, and then some do at random."""
    loop = bare.loop()
    gc.disable()
    loop(users)
    gc.enable()
    bare.after()

    def draw() -> Iterator[str]:
        while True:
            yield from random.choices(users, k=1_000)

    return Case(name, loop, draw(), after=bare.after)
