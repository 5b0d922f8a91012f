"""Mutation testing: changes the code in small ways, one at a time, and tells which changes no test notices.

    python -m tests.mutation quotalimit/stores/charges.py --tests tests/test_holds.py tests/test_nesting.py

Each mutant is tried in a copy of the package, so that the working tree is never touched. A mutant is killed by a test
that fails, or that takes five times as long as all do on the code as it is.
"""

from __future__ import annotations

import argparse
import ast
import copy
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import cache_from_source
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import pytest
import redis
import redis.asyncio  # noqa: F401
from hypothesis import Phase, settings

ROOT = Path(__file__).parent.parent
PLUGINS = ("pytest_asyncio.plugin", "_hypothesis_pytestplugin")
FORK = multiprocessing.get_context("fork")

SWAPPED: dict[type[ast.AST], tuple[type[Any], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.RShift: (ast.LShift,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
"""What each operator is changed to."""


class Mutant(NamedTuple):
    """One small change: where it is, what it is, and the module with it."""

    path: Path
    line: int
    change: str
    source: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.change}"


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All mutants of a module. Text, annotations and what only type checkers see are left alone."""
    tree = ast.parse(path.read_text())
    for number, node in enumerate(ast.walk(tree)):
        for change in range(len(_changes(node))):
            mutated = copy.deepcopy(tree)
            twin = next(each for place, each in enumerate(ast.walk(mutated)) if place == number)
            before = _shown(twin)
            parent, field, index = _place(mutated, twin)
            changed = _changes(twin)[change]
            if index is None:
                setattr(parent, field, changed)
            else:
                getattr(parent, field)[index] = changed
            source = ast.unparse(ast.fix_missing_locations(mutated))
            yield Mutant(path, getattr(node, "lineno", 0), f"{before} -> {_shown(changed)}", source)


def _shown(node: ast.AST) -> str:
    """A node on one line: of a block, its head."""
    return ast.unparse(node).partition("\n")[0]


def _place(tree: ast.AST, node: ast.AST) -> tuple[ast.AST, str, int | None]:
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is node:
                return parent, field, None
            if isinstance(value, list) and any(each is node for each in value):
                return parent, field, next(index for index, each in enumerate(value) if each is node)
    raise AssertionError("a node is in its tree")


def _changes(node: ast.AST) -> list[ast.AST]:
    """What a node may be changed to."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return [_with(node, ops=[swapped()]) for swapped in SWAPPED.get(type(node.ops[0]), ())]
    if isinstance(node, (ast.BinOp, ast.BoolOp)):
        return [_with(node, op=swapped()) for swapped in SWAPPED.get(type(node.op), ())]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        return [node.operand]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [ast.Constant(node.value + 1)]
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        return [ast.Constant(not node.value)]
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
        return [_with(node, test=ast.Constant(True)), _with(node, test=ast.Constant(False))]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("max", "min") and len(node.args) == 2:
        return list(node.args)
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__slots__", "__all__"):
        return []
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        return [ast.Pass()]
    return []


def _with(node: ast.AST, **changes: object) -> ast.AST:
    changed = copy.copy(node)
    for field, value in changes.items():
        setattr(changed, field, value)
    return changed


class Bench:
    """A copy of the repository in which one mutant at a time is tried."""

    def __init__(self, directory: Path, options: Sequence[str]) -> None:
        self._root = directory
        for name in ("quotalimit", "tests", "pyproject.toml", "setup.cfg", "README.md"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, directory / name)
        self._options = options

    def passes(self, timeout: float | None = None) -> bool:
        """Whether all tests pass, in time."""
        running = FORK.Process(target=run_tests, args=(self._root, self._options))
        running.start()
        running.join(timeout)
        with suppress(ProcessLookupError):
            os.killpg(running.pid or 0, signal.SIGKILL)
        running.join()
        return running.exitcode == 0

    def survives(self, mutant: Mutant, timeout: float) -> bool:
        """Whether no test notices a mutant."""
        place = self._root / mutant.path.relative_to(ROOT)
        kept = place.read_text()
        compiled = Path(cache_from_source(place))  # two mutants of one size may be written in one second
        compiled.unlink(missing_ok=True)
        place.write_text(mutant.source)
        try:
            return self.passes(timeout)
        finally:
            place.write_text(kept)
            compiled.unlink(missing_ok=True)


def run_tests(root: Path, options: Sequence[str]) -> None:
    """Run the tests of a copy, in a process of its own that has nothing but their tools imported."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where a shell runs this behind
    os.chdir(root)
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silent, stream)
    os.environ |= {"PYTHONPATH": str(root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.path.insert(0, str(root))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    quickly = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
    settings.register_profile("mutation", phases=quickly, database=None, derandomize=True)
    settings.load_profile("mutation")
    command = ["-x", "-q", "--failed-first", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    for plugin in PLUGINS:
        command += ["-p", plugin]
    os._exit(pytest.main([*command, *options]))  # at once: the threads that would be waited for are the parent's


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="+", type=Path)
    parser.add_argument("--tests", nargs="+", required=True, help="what is run against each mutant")
    parser.add_argument("--only", help="which of them, as pytest's -k")
    parser.add_argument("--again", type=Path, help="what an earlier run printed: only its survivors are tried")
    parser.add_argument("--skip", type=int, default=0, help="how many mutants to leave out, tried by earlier runs")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    arguments = parser.parse_args()
    options = [*arguments.tests, *(["-k", arguments.only] if arguments.only else [])]
    mutants = [mutant for path in arguments.modules for mutant in mutants_of(path.resolve())]
    if arguments.again:
        survivors = set(arguments.again.read_text().splitlines())
        mutants = [mutant for mutant in mutants if str(mutant) in survivors]
    del mutants[: arguments.skip]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(arguments.jobs) as threads:
        benches: SimpleQueue[Bench] = SimpleQueue()
        for number in range(arguments.jobs):
            benches.put(Bench(Path(directory) / str(number), options))
        bench = benches.get()
        started = time.monotonic()
        if not bench.passes():
            print("the tests fail on the code as it is")
            return 2
        timeout = 5 * (time.monotonic() - started)
        benches.put(bench)

        def tried(mutant: Mutant) -> bool | None:
            if time.monotonic() - started > 60 * arguments.minutes:
                return None
            bench = benches.get()
            try:
                return bench.survives(mutant, timeout)
            finally:
                benches.put(bench)

        results = []
        for mutant, survives in zip(mutants, threads.map(tried, mutants), strict=True):
            results.append(survives)
            if survives:
                print(mutant, flush=True)
    survived, untried = results.count(True), results.count(None)
    minutes = (time.monotonic() - started) / 60
    print(
        f"{len(results) - untried} mutants in {minutes:.1f} minutes: {survived} survived, {untried} not tried in time"
    )
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
