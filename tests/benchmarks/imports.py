"""What `import quotalimit` takes, beyond what `import wrapt` does."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from tempfile import TemporaryDirectory

from tests.benchmarks.peers import INSTALLED
from tests.benchmarks.report import Aim, Table

CODE = "import sys, time; start = time.process_time(); import {}; print(time.process_time() - start, *sys.modules)"
UNWANTED = {"sqlite3", "redis", "valkey"}


def imports(rounds: int) -> Table:
    names = ["wrapt", "quotalimit", *(peer.module for peer in INSTALLED)]
    spent: dict[str, list[float]] = {name: [] for name in names}
    loaded: dict[str, set[str]] = {}
    with TemporaryDirectory() as compiled:  # as installing leaves it, whatever the environment says of bytecode
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
        for number in range(max(3, rounds // 8) + 1):
            for name in names:
                command = [sys.executable, "-c", CODE.format(name)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                seconds, *modules = done.stdout.split()
                if number:  # the first compiles
                    spent[name].append(float(seconds) * 1_000)
                loaded[name] = set(modules)
    more = statistics.median(ours - wrapts for ours, wrapts in zip(spent["quotalimit"], spent["wrapt"], strict=True))
    new = {module.split(".")[0] for module in loaded["quotalimit"] - loaded["wrapt"]}
    foreign = sorted(module for module in new - sys.stdlib_module_names - {"quotalimit"})
    unwanted = [*foreign, *sorted(UNWANTED & new)]
    table = Table(
        "Import",
        ("", "processor time", "modules loaded"),
        [f"Beyond wrapt's, `import quotalimit` loads: {', '.join(f'`{module}`' for module in sorted(new))}."],
    )
    for name in names:
        if name != "quotalimit":
            table.add(f"`import {name}`", f"{statistics.median(spent[name]):.1f} ms", f"{len(loaded[name])}")
    cells = (f"{statistics.median(spent['quotalimit']):.1f} ms", f"{len(loaded['quotalimit'])}")
    table.add("**`import quotalimit`**", *cells)
    table.add("**more than `import wrapt`**", f"{more:.1f} ms", "", figure=more, aim=Aim(25, " ms"))
    table.add(
        "**SDKs, frameworks, sqlite3 or redis among it**",
        "",
        ", ".join(unwanted) or "none",
        figure=len(unwanted),
        aim=Aim(0, ""),
    )
    return table
