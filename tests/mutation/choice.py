"""Which tests are run against a mutant: those that run what it changes, by a recording of all tests.

This is also the pytest plugin that notes during the recording how long each test takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from coverage import CoverageData

from .mutants import ROOT, Mutant

RECORDING = ROOT / ".mutation"
LINES, TIMES = RECORDING / "lines.coverage", RECORDING / "times.json"
LEFT_OUT = ("tests/test_architecture.py",)
"""Tests that read the package instead of running it: the copies have lost its comments."""

_BESIDES = 0.003
"""Seconds that any test takes besides what it says."""
_MOST_KILLERS = 30

_times: defaultdict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: Any) -> None:
    """Note how long a test took, with all that was made for it; for ever, if it fails on the code as it is."""
    _times[report.nodeid] += float("inf") if report.failed else report.duration


def pytest_sessionfinish(session: Any) -> None:
    """Write what was noted; once, where several processes ran the tests."""
    if not hasattr(session.config, "workerinput"):
        TIMES.write_text(json.dumps(_times))


def record() -> None:
    """Run all tests, noting which lines of the package each of them runs."""
    RECORDING.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-p", __name__]
    command += ["--cov=quotalimit", "--cov-context=test", "--cov-report="]
    subprocess.run(command, cwd=ROOT, check=False)  # what fails is left out
    (ROOT / ".coverage").rename(LINES)


class Choice:
    """The recording, and what it says about a mutant."""

    def __init__(self) -> None:
        if not LINES.exists():
            record()
        self._data = CoverageData(str(LINES))
        self._data.read()
        self._times: dict[str, float] = json.loads(TIMES.read_text())
        self._killers: list[str] = []

    def tests_for(self, mutant: Mutant, seconds: float, files: Sequence[str] = ()) -> tuple[list[str], float]:
        """The tests that run what is changed, as many as take the seconds; and how long they take.

        First come those that killed mutants of late, then one of each function, the fastest first: what many sets of
        parameters of one function say is much the same.

        Those of the files come besides, however long they take. Of what no test was seen to run, as it is run when
        the module is imported or in another process, those that run anything of the module.
        """
        contexts = self._data.contexts_by_lineno(str(mutant.path.relative_to(ROOT)))
        tests = _named(name for line in mutant.lines for name in contexts.get(line, ()))
        tests = tests or _named(name for names in contexts.values() for name in names)
        chosen: list[str] = []
        taken = 0.0
        for test in dict.fromkeys([*(test for test in self._killers if test in tests), *self._in_turn(tests)]):
            time = self._times[test] + _BESIDES
            if taken + time <= seconds:
                chosen.append(test)
                taken += time
        besides = [test for test in tests.difference(chosen) if test.startswith(tuple(files))] if files else []
        return [*chosen, *besides], taken + sum(self._times[test] for test in besides)

    def note_killer(self, test: str) -> None:
        """Know which test noticed a mutant."""
        if test in self._times:
            self._killers = [test, *(other for other in self._killers if other != test)][:_MOST_KILLERS]

    def _in_turn(self, tests: Iterable[str]) -> list[str]:
        """Tests in turns, in each of which every function is tried once."""
        turns: Counter[str] = Counter()
        placed: list[tuple[int, float, str]] = []
        for test in sorted(tests, key=lambda test: (self._times[test], test)):
            function = test.partition("[")[0]
            placed.append((turns[function], self._times[test], test))
            turns[function] += 1
        return [test for _, _, test in sorted(placed)]

    def unknown(self, files: Sequence[str]) -> list[str]:
        """The files of whose tests there is no recording."""
        return [file for file in files if not any(test.startswith(file) for test in self._times)]


def _named(contexts: Iterable[str]) -> set[str]:
    """The tests of some contexts, each of which is a test and its part that ran."""
    tests = {context.rpartition("|")[0] for context in contexts}
    return {test for test in tests if test and not test.startswith(LEFT_OUT)}
