"""Measuring: loops of one statement, run in short rounds that take turns."""

from __future__ import annotations

import asyncio
import gc
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any

Loop = Callable[[Sequence[Any]], Any]
"""Runs one statement for each of some keys. Returns what it last set `admitted` to, or an awaitable of it."""


def compile_loop(statement: str, names: dict[str, Any]) -> Loop:
    """A loop of its own for a statement about `key`, so that no two cases share the interpreter's inline caches."""
    kind = "async def" if "await " in statement else "def"
    body = textwrap.indent(statement, " " * 8)
    source = f"{kind} loop(keys):\n    admitted = True\n    for key in keys:\n{body}\n    return admitted\n"
    namespace = dict(names)
    exec(source, namespace)
    loop: Loop = namespace["loop"]
    return loop


def finish(result: Any) -> Any:
    """What a loop returns, also if that must be awaited. It may not suspend."""
    if not asyncio.iscoroutine(result):
        return result
    try:
        result.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("a call that is measured waits for something")


@dataclass
class Case:
    """Something to measure: a loop, and what surrounds its rounds."""

    name: str
    loop: Loop
    keys: Iterator[Any] = field(default_factory=lambda: repeat("alice"))
    """The key of each call; what it takes to prepare one is not measured."""
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered around each round."""
    after: Callable[[], object] = lambda: None
    """Called after each round, for what must not run on into somebody else's."""
    added_ns: float = 0.0
    """Nanoseconds a call that the circumstances of measuring have saved, and that count all the same."""


@dataclass(frozen=True)
class Timings:
    """Nanoseconds a call of each case in each round."""

    rounds: dict[str, list[float]]

    def ns(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, *bases: str) -> float:
        """How many times as long as the bases together."""
        totals = (sum(times) for times in zip(*(self.rounds[base] for base in bases), strict=True))
        return float(statistics.median(time / total for time, total in zip(self.rounds[name], totals, strict=True)))


def measure(cases: Iterable[Case], *, rounds: int, calls: int) -> Timings:
    """Run every case once in each round, the first of which is not counted."""
    cases = list(cases)
    timings: dict[str, list[float]] = {case.name: [] for case in cases}
    runner = asyncio.Runner()
    gc.collect()
    gc.freeze()
    try:
        for number in range(rounds + 1):
            for case in cases:
                elapsed = _run(case, calls, runner)
                if number:
                    timings[case.name].append(elapsed / calls + case.added_ns)
    finally:
        gc.unfreeze()
        runner.close()
    return Timings(timings)


def _run(case: Case, calls: int, runner: asyncio.Runner) -> int:
    """Nanoseconds of one round, begun after a few calls that bring the case back into the processor's caches."""
    few, keys = list(islice(case.keys, calls // 5)), list(islice(case.keys, calls))

    async def awaited() -> tuple[Any, int]:
        await case.loop(few)
        start = time.process_time_ns()
        admitted = await case.loop(keys)
        return admitted, time.process_time_ns() - start

    with case.around(), _no_collections():
        if asyncio.iscoroutinefunction(case.loop):
            admitted, elapsed = runner.run(awaited())
        else:
            case.loop(few)
            start = time.process_time_ns()
            admitted = case.loop(keys)
            elapsed = time.process_time_ns() - start
    case.after()
    if not admitted:
        raise RuntimeError(f"{case.name}: refused in a benchmark of what is admitted")
    return elapsed


@contextmanager
def _no_collections() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
