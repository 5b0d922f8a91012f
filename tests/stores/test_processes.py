"""Rules 5 and 11: several processes on one store, some of which are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..conftest import STORES, Place
from ..helpers import used
from .worker import limiters

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[name for name in STORES if name != "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A place that processes can share."""
    with STORES[request.param](tmp_path) as place:
        yield place


@contextmanager
def worker(act: str, place: Place) -> Iterator[subprocess.Popen[str]]:
    """A process that is ready to act."""
    command = [sys.executable, "-m", "tests.stores.worker", act, str(place.url)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        command, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = process.stdout.readline().strip()
    assert said, f"the process has ended: {process.poll()}"
    return said


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_rule_5_four_processes_of_four_threads_are_admitted_exactly_n_times(place: Place) -> None:
    with (
        worker("hammer", place) as one,
        worker("hammer", place) as two,
        worker("hammer", place) as three,
        worker("hammer", place) as four,
    ):
        processes = [one, two, three, four]
        assert [line(process) for process in processes] == ["ready"] * 4
        for process in processes:
            go_on(process)
        results = [tuple(map(int, line(process).split())) for process in processes]
    calls, tokens = limiters(place.make())
    assert sum(admitted for admitted, _ in results) == used(calls) == 100
    assert sum(charged for _, charged in results) == used(tokens) <= 10_000 + 16 * 30
    assert used(tokens) > 9_000


def test_rule_11_a_process_that_is_killed_leaves_its_holds_charged_and_loses_nothing(place: Place) -> None:
    with worker("hold", place) as process:
        assert line(process) == "ready"
        process.kill()
        process.wait()
    calls, tokens = limiters(place.make())
    assert used(calls) == 7
    assert used(tokens) == 11 + 13 + 3 * 1_000


def test_a_process_that_is_killed_in_the_middle_of_a_call_has_made_it_or_not(place: Place) -> None:
    with worker("count", place) as process:
        while int(line(process)) < 50:
            pass
        process.kill()
        assert process.stdout is not None
        said = [50, *map(int, process.stdout.read().split("\n")[:-1])]
    assert used(limiters(place.make())[1]) in (said[-1], said[-1] + 1)


def test_what_is_settled_is_written_when_the_interpreter_ends(place: Place) -> None:
    with worker("settle_at_exit", place) as process:
        assert line(process) == "ready"
        assert process.wait() == 0
    assert used(limiters(place.make())[1]) == 42


def test_counts_outlive_a_restart(place: Place) -> None:
    for expected in (1, 2, 3):
        store = place.make()
        calls, _ = limiters(store)
        assert calls.acquire("alice").used == expected
        store.flush()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_shares_no_connection_and_settles_nothing_twice(place: Place) -> None:
    """What is held, or settled but not written, at the time of a fork is the parent's."""
    store = place.make()
    calls, tokens = limiters(store)
    held, settled = tokens.reserve("alice", 100), tokens.reserve("alice", 200)
    settled.settle(150)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            held.settle(0)
            store.flush()
            status = 0 if calls.allow("alice") and used(tokens) in (250, 300) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert used(calls) == 1
    assert used(tokens) == 250
    held.settle(60)
    assert used(tokens) == 210
    assert calls.acquire("alice").used == 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_tasks_go_on_on_both_sides_of_a_fork(place: Place) -> None:
    calls, _ = limiters(place.make())
    assert asyncio.run(calls.acquire_async("alice")).used == 1
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(10)
            status = 0 if asyncio.run(calls.acquire_async("alice")).used == 2 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert asyncio.run(calls.acquire_async("alice")).used == 3
