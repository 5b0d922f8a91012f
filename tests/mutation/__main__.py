"""The command: see `python -m tests.mutation --help`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from . import __doc__ as summary
from .bench import Bench
from .choice import Choice, record
from .explained import is_explained, read_explained, stale
from .mutants import Mutant, mutants_of

SLACK = 5
"""How many times as long as they usually do tests may take, and seconds for their start."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=(summary or "").partition("\n")[0])
    parser.add_argument("modules", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=30, help="how long tests may take for a mutant (default: 30)")
    parser.add_argument("--record", action="store_true", help="note anew which tests run what: after each change")
    parser.add_argument("--tests", nargs="+", default=[], help="try these files too, however long they take")
    parser.add_argument("--all", action="store_true", help="try those too that explained.toml explains")
    parser.add_argument("--again", type=Path, help="what an earlier run printed: only its survivors are tried")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    arguments = parser.parse_args()
    mutants = [mutant for path in arguments.modules for mutant in mutants_of(path.resolve())]
    explained = read_explained()
    for line in stale(mutants, explained):
        print(f"explains no mutant: {line}", file=sys.stderr)
    if not arguments.all:
        every = len(mutants)
        mutants = [mutant for mutant in mutants if not is_explained(mutant, explained)]
        print(f"{every - len(mutants)} of {every} mutants are explained", file=sys.stderr)
    if arguments.again:
        survivors = set(arguments.again.read_text().splitlines())
        mutants = [mutant for mutant in mutants if str(mutant) in survivors]
    if arguments.record:
        record()
    started = time.monotonic()
    choice = Choice()
    unknown = choice.unknown(arguments.tests)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(arguments.jobs) as threads:
        benches: SimpleQueue[Bench] = SimpleQueue()
        for number in range(arguments.jobs):
            benches.put(Bench(Path(directory) / str(number)))

        def tried(mutant: Mutant) -> bool | None:
            """Whether it survives; None if there was no time to tell."""
            if time.monotonic() - started > 60 * arguments.minutes:
                return None
            tests, seconds = choice.tests_for(mutant, arguments.seconds, arguments.tests)
            bench = benches.get()
            try:
                outcome = bench.survives(mutant, tests, SLACK * (1 + seconds), unknown)
                if outcome == "":
                    print(f"takes too long: {mutant}", file=sys.stderr, flush=True)
                elif isinstance(outcome, str):
                    choice.note_killer(outcome)
                return outcome is True
            finally:
                benches.put(bench)

        results = []
        for mutant, survives in zip(mutants, threads.map(tried, mutants), strict=True):
            results.append(survives)
            if survives:
                print(mutant, flush=True)
        while not benches.empty():
            benches.get().close()
    survived, untried = results.count(True), results.count(None)
    minutes = (time.monotonic() - started) / 60
    print(
        f"{len(results) - untried} mutants in {minutes:.1f} minutes: {survived} survived, {untried} not tried in time"
    )
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
