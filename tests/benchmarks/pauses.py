"""The longest pause of a call while a million keys come and go, and whether they are gone at last."""

from __future__ import annotations

import gc
import itertools
import sys
import time
import tracemalloc
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from quotalimit import MemoryStore, rate_limited
from tests.benchmarks.report import Aim, Table
from tests.benchmarks.states import PERIOD, HandClock

KEYS = 1_000_000
"""Keys that come in one window, and calls in each window."""
PHASES = {
    "coming": "they come, in the first window",
    "changing": "others come as these go, in the second",
    "gone": "a thousand busy keys only, in the third and fourth",
}
GROWTH = 1 << 20
"""Bytes that a call must take for it to be one in which a dict grows."""

SUSPICIOUS = 300_000
"""Nanoseconds of a call that is looked at more closely the second time."""


@dataclass
class Run:
    """The nanoseconds of each call, by phase, and what was found in between."""

    spent: dict[str, array[int]] = field(default_factory=dict)
    grown: dict[str, set[int]] = field(default_factory=dict)
    """The calls in which a dict grew, of those that were suspicious."""
    collection: float = 0.0
    """Seconds that a full garbage collection took with all keys there."""
    left: float = 0.0
    """How much of the memory of a million keys was still in use at the end."""


def pauses(_rounds: int) -> Table:
    users = [f"user {number}" for number in range(2 * KEYS)]
    busy = list(itertools.islice(itertools.cycle([f"busy {number}" for number in range(1_000)]), 2 * KEYS))
    first = run(users, busy)
    suspects = {
        phase: {call for call, ns in enumerate(spent) if ns > SUSPICIOUS} for phase, spent in first.spent.items()
    }
    second = run(users, busy, suspects)
    table = Table(
        f"Pauses, {KEYS:,} keys coming and going",
        ("", "longest call", "in which no dict grows"),
        [
            "By a clock that is moved, in processor time, with the garbage collector off. All is done twice, and the "
            "quicker of a call's two times counts, so that interrupts do not. The second time, the memory that a slow "
            "call takes tells whether a dict grew in it: Python's work rather than ours.",
        ],
    )
    growth = max(map(min, *(timed(dict[str, str]().setdefault, users) for _ in range(2)))) / 1e6
    table.add(f"a bare dict, growing to {len(users):,} keys", f"{growth:.2f} ms", "")
    for phase, what in PHASES.items():
        spent = [min(times) / 1e6 for times in zip(first.spent[phase], second.spent[phase], strict=True)]
        own = max(pause for call, pause in enumerate(spent) if call not in second.grown[phase])
        table.add(f"**quotalimit**, {what}", f"{max(spent):.2f} ms", f"{own:.2f} ms", figure=own, aim=Aim(2, " ms"))
    collection = min(first.collection, second.collection) * 1e3
    table.add("a full garbage collection, with all these keys there", f"{collection:.2f} ms", "")
    left = max(first.left, second.left) * 100
    table.add("**still there after two windows of traffic**", f"{left:.2f} %", "", figure=left, aim=Aim(1, " %"))
    return table


def run(users: Sequence[str], busy: Sequence[str], suspects: dict[str, set[int]] | None = None) -> Run:
    found = Run()
    store = MemoryStore(max_keys=10 * KEYS)
    ask: Callable[[str], str] = rate_limited(f"{KEYS}/hour", key="user", store=store)(lambda user: user)
    clock = HandClock()

    def phase(name: str, callers: Sequence[str]) -> None:
        grown: set[int] = set()
        found.grown[name] = grown
        found.spent[name] = timed(ask, callers, clock, suspects[name] if suspects else (), grown)

    ask("warm")
    gc.collect()
    gc.freeze()
    with clock.running():
        empty = sys.getallocatedblocks()
        phase("coming", users[:KEYS])
        full = sys.getallocatedblocks()
        start = time.perf_counter()
        gc.collect()
        found.collection = time.perf_counter() - start
        phase("changing", users[KEYS:])
        phase("gone", busy)
        found.left = (sys.getallocatedblocks() - empty) / (full - empty)
    gc.unfreeze()
    return found


def timed(
    call: Callable[..., Any],
    users: Sequence[str],
    clock: HandClock | None = None,
    suspects: Collection[int] = (),
    grown: set[int] | None = None,
) -> array[int]:
    """The nanoseconds on the processor of a call for each user, at the pace of a window for a million of them."""
    spent = array("q", bytes(8 * len(users)))
    now, step = time.thread_time_ns, PERIOD / KEYS
    gc.disable()
    for number, user in enumerate(users):
        if clock is not None:
            clock.now += step
        if number in suspects:
            tracemalloc.start()
        start = now()
        call(user)
        spent[number] = now() - start
        if number in suspects:
            if grown is not None and tracemalloc.get_traced_memory()[1] > GROWTH:
                grown.add(number)
            tracemalloc.stop()
    gc.enable()
    return spent
