"""`python -m tests.benchmarks [TABLE ...]`: measure, and print the tables that are named.

Without names, all of them; these are written down too, with a picture, for the README.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from tests.benchmarks import calls, hits, imports, memory, pauses, picture, profile, scaling, threads
from tests.benchmarks.peers import PEERS, TOKEN_THROTTLE
from tests.benchmarks.report import Table

TABLES: dict[str, Callable[[int], Table]] = {
    "functions": calls.functions,
    "kinds": calls.kinds,
    "refused": calls.refused,
    "layers": calls.layers,
    "profile": profile.profile,
    "peers": hits.peers,
    "amounts": scaling.amounts,
    "keys": scaling.keys,
    "memory": memory.memory,
    "pauses": pauses.pauses,
    "threads": threads.threads,
    "imports": imports.imports,
}
FOLDER = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; by default all of them")
    parser.add_argument("--rounds", type=int, default=80, help="rounds of each case (default: %(default)s)")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no such table: {', '.join(sorted(unknown))}")
    started = time.perf_counter()
    found = {}
    for name in options.tables or TABLES:
        found[name] = TABLES[name](options.rounds)
        print(found[name], flush=True)
    summary = summarize(found, time.perf_counter() - started)
    print(summary)
    if not options.tables:
        (FOLDER / "results.md").write_text("\n".join(["# Benchmarks", "", summary, *map(str, found.values())]))
        picture.draw({"N": found["amounts"], "keys": found["keys"]}, FOLDER / "cost.svg")


def summarize(found: dict[str, Table], seconds: float) -> str:
    """Where this was measured, and which aims were not met."""
    versions = {"wrapt": metadata.version("wrapt"), **{peer.package: peer.version for peer in (*PEERS, TOKEN_THROTTLE)}}
    missed = [f"- {miss}" for table in found.values() for miss in table.missed]
    return "\n".join(
        [
            f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} "
            f"{platform.machine()}, in {seconds:.0f} s, by `python -m tests.benchmarks`. "
            f"With {', '.join(f'{package} {version}' for package, version in versions.items() if version)}.",
            "",
            "Every aim is met." if not missed else f"{len(missed)} aims are not met:",
            "",
            *missed,
            "",
        ]
    )


if __name__ == "__main__":
    main()
