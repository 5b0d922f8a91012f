"""`python -m tests.benchmarks [TABLE ...]`: measure, print, and write down all tables or the ones that are named."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from tests.benchmarks import calls, hits, imports, memory, pauses, scaling, threads
from tests.benchmarks.report import Table

TABLES: dict[str, Callable[[int], Table]] = {
    "functions": calls.functions,
    "kinds": calls.kinds,
    "refused": calls.refused,
    "layers": calls.layers,
    "peers": hits.peers,
    "amounts": scaling.amounts,
    "keys": scaling.keys,
    "memory": memory.memory,
    "pauses": pauses.pauses,
    "threads": threads.threads,
    "imports": imports.imports,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; by default all of them")
    parser.add_argument("--rounds", type=int, default=100, help="rounds of each case (default: %(default)s)")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no such table: {', '.join(sorted(unknown))}")
    started = time.perf_counter()
    missed = []
    for name in options.tables or TABLES:
        table = TABLES[name](options.rounds)
        missed += table.missed
        print(table, flush=True)
    print(f"{time.perf_counter() - started:.0f} s; {len(missed)} aims not met", *missed, sep="\n- ")


if __name__ == "__main__":
    main()
