"""Where mutants are tried: in copies of the repository, and in forks of processes that have collected its tests."""

from __future__ import annotations

import ast
import gc
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.util import cache_from_source
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest
import redis
import redis.asyncio  # noqa: F401
from _pytest.main import pytest_runtestloop
from hypothesis import Phase, settings

from .mutants import ROOT, Mutant

LONGEST = 300.0
"""Seconds that files of tests may take."""
COLD = 20.0
"""Seconds that a process may take to import tests anew."""

FORK = multiprocessing.get_context("fork")


class Trial(NamedTuple):
    """What a nursery is asked: whether tests pass, in time, with the functions of a module as they are in a tree."""

    tests: Sequence[str]
    seconds: float
    path: Path
    tree: ast.Module


class Bench:
    """A copy of the repository in which one mutant at a time is tried."""

    def __init__(self, directory: Path) -> None:
        self._root = directory
        self._unfit: set[str] = set()
        """Tests that fail here also without a mutant."""
        for name in ("quotalimit", "tests", "pyproject.toml", "setup.cfg", "README.md"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, directory / name)

        self._nursery, theirs = FORK.Pipe()
        FORK.Process(target=_run, args=(self._root, ["tests"], [Nursery(self._root, theirs)])).start()
        assert self._nursery.recv(), "the tests can be collected"

    def survives(self, mutant: Mutant, tests: Sequence[str], seconds: float, files: Sequence[str] = ()) -> bool | str:
        """Whether no test notices a mutant, or which does: "" if they take too long.

        `files` are tests that are imported anew, and tried last.
        """
        place = self._root / mutant.path.relative_to(ROOT)
        kept = place.read_text()
        original = ast.parse(kept)
        tests = [test for test in tests if test not in self._unfit]
        compiled = Path(cache_from_source(place))  # two mutants of one size may be written in one second
        compiled.unlink(missing_ok=True)
        place.write_text(ast.unparse(mutant.tree))  # also where forks need not read it: tests start processes
        survives: bool | str
        try:
            if mutant.inside and _cells(original) == _cells(mutant.tree):
                survives = self._ask(Trial(tests, seconds, place, mutant.tree))
            else:
                survives = not tests or self.passes(tests, COLD + seconds)
            if survives is True and files:
                survives = self.passes(files, LONGEST)
        finally:
            place.write_text(kept)
            compiled.unlink(missing_ok=True)
        killer = survives if isinstance(survives, str) else ""
        if killer and self._ask(Trial([killer], seconds, place, original)) is not True:
            self._unfit.add(killer)
            return self.survives(mutant, tests, seconds, files)
        return survives

    def _ask(self, trial: Trial) -> bool | str:
        """Whether tests pass in a fork, or which of them is the first that does not."""
        self._nursery.send(trial)
        answer: bool | str = self._nursery.recv()
        return answer

    def passes(self, options: Sequence[str], seconds: float) -> bool:
        """Whether tests pass, in time, in a process that imports them anew."""
        return _succeeds(_run, self._root, options, seconds=seconds)

    def close(self) -> None:
        """End the process that has collected the tests."""
        self._nursery.send(None)


class Nursery:
    """A pytest plugin that runs some of the tests, in a fork, each time that it is asked to."""

    def __init__(self, root: Path, asked: Connection) -> None:
        self._root = root
        self._asked = asked
        self._failed: Connection | None = None
        """Where a fork tells which test failed."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self._failed is not None:
            self._failed.send(report.nodeid)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        from tests.stores import servers  # the copy's

        items = {item.nodeid: item for item in session.items}
        servers.server()
        servers.cluster()
        shared = servers._running.copy()
        servers._running.clear()  # which the forks would stop
        gc.unfreeze()  # what the tests' own hook froze, where nobody finds it
        functions = _functions_in(self._root / "quotalimit")
        assert functions, "the functions that mutants change are found"
        gc.freeze()
        self._asked.send(True)
        while (trial := self._asked.recv()) is not None:
            session.items = [items[test] for test in trial.tests if test in items]
            told, self._failed = FORK.Pipe(duplex=False)
            survives = _succeeds(_run_items, session, trial, functions[str(trial.path)], seconds=trial.seconds)
            self._failed.close()
            killer = ""
            with told, suppress(EOFError):  # none was told
                killer = told.recv()
            self._asked.send(survives or killer)
        servers._running += shared
        servers.stop()  # the fixture that does it was set up in forks alone
        return True


def _succeeds(target: Any, *arguments: object, seconds: float) -> bool:
    """Whether a process ends in time, and well. It and all that it started are killed."""
    running = FORK.Process(target=target, args=arguments)
    running.start()
    running.join(seconds)
    with suppress(ProcessLookupError):
        os.killpg(running.pid or 0, signal.SIGKILL)
    running.join()
    return running.exitcode == 0


def _run(root: Path, options: Sequence[str], plugins: Sequence[object] = ()) -> None:
    """Run the tests of a copy, in a process of its own that has nothing but their tools imported."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where a shell runs this behind
    os.chdir(root)
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silent, stream)
    os.environ["PYTHONPATH"] = str(root)
    sys.path.insert(0, str(root))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    quickly = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
    settings.register_profile("mutation", phases=quickly, database=None, derandomize=True)
    settings.load_profile("mutation")
    command = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(root / "tmp")]
    command += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    os._exit(
        pytest.main([*command, *options], plugins)
    )  # at once: the threads that would be waited for are the parent's


def _run_items(session: pytest.Session, trial: Trial, functions: Sequence[FunctionType]) -> None:
    os.setsid()
    change_functions(functions, trial.path, trial.tree)
    try:
        pytest_runtestloop(session)
    except BaseException:  # the first failure ends the loop by an exception
        os._exit(1)
    os._exit(1 if session.testsfailed else 0)


def _functions_in(package: Path) -> defaultdict[str, list[FunctionType]]:
    """The functions of the modules of a package, wherever they are."""
    found: defaultdict[str, list[FunctionType]] = defaultdict(list)
    for each in gc.get_objects():
        if type(each) is FunctionType and each.__code__.co_filename.startswith(str(package)):
            found[each.__code__.co_filename].append(each)
    return found


def change_functions(functions: Iterable[FunctionType], path: Path, tree: ast.Module) -> None:
    """Give the functions of a module the code that they have in another tree."""
    codes = [(_place(code), code) for code in _codes(compile(tree, str(path), "exec"))]
    often = Counter(place for place, _ in codes)
    changed = {place: code for place, code in codes if often[place] == 1}
    for each in functions:
        code = changed.get(_place(each.__code__))
        if code is not None:
            each.__code__ = code


def _cells(tree: ast.Module) -> list[tuple[object, ...]]:
    """What each function closes over, which stays with it when its code is changed."""
    return [(*_place(code), *code.co_freevars) for code in _codes(compile(tree, "", "exec"))]


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
