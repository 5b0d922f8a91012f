"""What a key and an entry of a window take in memory: resident memory, in a process of its own for each figure."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quotalimit import MemoryStore, rate_limited
from tests.benchmarks.peers import PEERS, Bare
from tests.benchmarks.report import Aim, Table
from tests.benchmarks.states import PERIOD, HandClock

STATM = Path("/proc/self/statm")
N = 1_000
COST = 10
KEYS = 250_000
"""Keys with one hit: dicts of so many are as full as dicts of a million."""
OURS = "quotalimit"
LOGS = ("limits", "pyrate-limiter")
"""The peers that keep an entry for each call."""


def memory(_rounds: int) -> Table:
    table = Table(
        "Memory",
        ("", "a key with one hit", f"an entry of a full window, N = {N:,}", f"an entry of cost {COST}"),
        [
            "Growth of resident memory in a process of its own, without the keys, which are the caller's. Windows of "
            "ours have slid for a while, and are at all stages between two trimmings."
        ],
    )
    if not STATM.exists():
        table.notes = ["Resident memory is read from /proc, which this system does not have."]
        return table
    aims = (Aim(130, " B"), Aim(10, " B"), Aim(20, " B"))
    for what, case, aim in zip(table.columns[1:], CASES, aims, strict=True):
        figure = measured(OURS, case)
        cells = ["", "", ""]
        cells[list(CASES).index(case)] = f"{figure:.1f} B"
        table.add(f"**quotalimit**: {what}", *cells, figure=figure, aim=aim)
    for peer in PEERS:
        if peer.keyed and peer.version and peer.package != "slowapi":
            cases = list(CASES) if peer.package in LOGS else ["keys"]
            cells = [f"{measured(peer.package, case):.1f} B" if case in cases else "none" for case in CASES]
            table.add(peer.name, *cells)
    return table


def measured(package: str, case: str) -> float:
    """Bytes a key or an entry, by the process that this module is when it runs as a script."""
    command = [sys.executable, "-m", __name__, package, case]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def resident() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def limit_of(package: str, amount: int, cost: int) -> Callable[[list[str]], Any]:
    """Hits the limit of a package once for each of some keys."""
    if package == OURS:
        ask = rate_limited(f"{amount}/hour", key=lambda user: user, cost=cost, store=MemoryStore())(lambda user: user)
        return Bare("ask(key)", {"ask": ask}).loop()
    bare = next(peer for peer in PEERS if peer.package == package).make(amount)
    keyword = {"limits": "cost", "pyrate-limiter": "weight"}.get(package)
    statement = bare.statement if cost == 1 else bare.statement.replace(")", f", {keyword}={cost})")
    return Bare(statement, bare.names).loop()


def keys(package: str) -> float:
    """Many keys with one hit each."""
    users = [f"user {number}" for number in range(KEYS)]
    hit = limit_of(package, N, 1)
    hit(["warm"])
    before = resident()
    hit(users)
    return (resident() - before) / len(users)


def entries(package: str, cost: int = 1) -> float:
    """Some keys with a full window each."""
    users = [f"user {number}" for number in range(1_000 if package == OURS else 100)]
    hit = limit_of(package, N * cost, cost)
    hit(["warm"])
    before = resident()
    if package != OURS:
        for _ in range(N):
            hit(users)
        return (resident() - before) / len(users) / N
    clock = HandClock()
    with clock.running():
        for turn in range(N + N // 4):
            joined = len(users) * 8 * turn // N  # not all at once, so that they are trimmed at different times
            for user in users[:joined]:
                clock.now += 1.003 * PERIOD / N / len(users[:joined])
                hit([user])
    return (resident() - before) / len(users) / N


CASES: dict[str, Callable[[str], float]] = {
    "keys": keys,
    "entries": entries,
    "weighted": lambda package: entries(package, COST),
}

if __name__ == "__main__":
    print(CASES[sys.argv[2]](sys.argv[1]), flush=True)
    os._exit(0)  # whatever threads a peer has started
