"""What may befall a process in the middle of a call: afterwards no lock is taken, and counts are right or safe.

Safe is what rule 11 calls it: never less than what was admitted or used, never more than what was asked for.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest

from quotalimit import (
    CalendarWindow,
    MemoryStore,
    RateLimiter,
    Store,
    TokenBucket,
    TokenBudget,
    limiters,
    limiters_of,
    rate_limited,
    token_budget,
)
from quotalimit._waiting import LINES
from quotalimit.algorithms import Algorithm
from quotalimit.recording import running
from quotalimit.stores import default
from quotalimit.stores.default import replace_default
from quotalimit.stores.memory_counts import MemoryCounts
from quotalimit.stores.names import Owner
from quotalimit.stores.sqlite import SQLiteStore
from tests.helpers import no_lock_is_taken, open_holds, used

DAY = "1_000_000_000/day"


class Interrupted(KeyboardInterrupt):
    """What the signals of these tests raise."""


class Storm:
    """Interrupts calls at random moments, as somebody who hammers on Ctrl-C."""

    def __init__(self) -> None:
        self._armed = False
        self._chance = random.Random(7)
        self.hits = 0

    def strike(self, _number: int, _frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise Interrupted

    def call(self, function: Callable[[], object], longest: float) -> None:
        """Call a function, and interrupt it after so many seconds at most."""
        try:
            self._armed = True
            signal.setitimer(signal.ITIMER_REAL, self._chance.uniform(1e-6, longest))
            function()
            self._armed = False
        except Interrupted:
            self.hits += 1
        finally:
            self._armed = False


@pytest.fixture
def storm() -> Iterator[Storm]:
    def note(raised: sys.UnraisableHookArgs) -> None:
        if not isinstance(raised.exc_value, Interrupted):  # which may strike a finalizer, too
            others.append(raised.exc_value)

    others: list[BaseException | None] = []
    storm = Storm()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "unraisablehook", note)
        before = signal.signal(signal.SIGALRM, storm.strike)
        yield storm
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not others


def answering(reserve: int | None) -> tuple[Callable[[str], str], list[str]]:
    """A function with two layers that uses two tokens a call, and whom it has answered."""
    answers: list[str] = []

    @rate_limited(DAY, key="user")
    @token_budget(DAY, key="user", reserve=reserve, usage=lambda answer: 2)
    def ask(user: str) -> str:
        answers.append(user)
        return "an answer"

    return ask, answers


@pytest.mark.parametrize("reserve", [None, 3], ids=["no reserve", "reserve"])
def test_rule_11_interrupts_at_any_moment_lose_no_charge_and_leave_no_lock(
    storm: Storm, default_store: MemoryStore, reserve: int | None
) -> None:
    ask, answers = answering(reserve)
    attempts = 4_000
    for _ in range(attempts):
        storm.call(lambda: ask("alice"), 8e-5)
        assert no_lock_is_taken(default_store)
    assert storm.hits > 100
    rate, budget = limiters_of(ask)
    assert len(answers) <= used(rate) <= attempts
    # An interrupted call is charged its usage, its reserve, or its estimate, which is two tokens as well.
    assert 2 * len(answers) <= used(budget) <= (reserve or 2) * attempts


def test_interrupts_of_the_fast_path_lose_no_charge_and_leave_no_lock(storm: Storm, default_store: MemoryStore) -> None:
    calls = 0

    @rate_limited("500/day", key="user")
    def ask(user: str) -> None:
        nonlocal calls
        calls += 1

    (limiter,) = limiters_of(ask)
    for round_ in range(8):
        key, calls = f"user-{round_}", 0

        def try_once(key: str = key) -> None:
            try:
                ask(key)
            except limiter.exceeded:
                pass

        for _ in range(700):
            storm.call(try_once, 1e-5)
        assert no_lock_is_taken(default_store)
        assert calls <= used(limiter, key) <= 500
    assert storm.hits > 100


def test_an_interrupted_hold_is_settled_at_the_end_of_its_block(storm: Storm, default_store: MemoryStore) -> None:
    budget = TokenBudget(DAY, name="holds")
    blocks = 0

    def hold() -> None:
        nonlocal blocks
        with budget.reserve("alice", 5) as hold:
            blocks += 1
            hold.settle(4)

    attempts = 3_000
    for _ in range(attempts):
        storm.call(hold, 6e-5)
    assert storm.hits > 100
    assert no_lock_is_taken(default_store)
    assert 4 * blocks <= used(budget) <= 5 * attempts


@pytest.mark.parametrize("reserve", [None, 3], ids=["no reserve", "reserve"])
def test_rule_11_calls_at_any_depth_of_the_stack_lose_no_charge(
    default_store: MemoryStore, reserve: int | None
) -> None:
    ask, answers = answering(reserve)

    def descend() -> bool:
        """Call at every depth from the deepest up. True where a call came through."""
        try:
            if descend():
                return True
        except RecursionError:
            pass
        try:
            ask("alice")
        except RecursionError:
            return False
        return True

    assert descend()
    assert no_lock_is_taken(default_store)
    rate, budget = limiters_of(ask)
    assert used(rate) >= len(answers)
    assert used(budget) >= 2 * len(answers)


class Garbage:
    """A cycle that does something when it is collected."""

    def __init__(self, finalize: Callable[[], object]) -> None:
        self._finalize = finalize
        self._self = self

    def __del__(self) -> None:
        self._finalize()


class Collecting(CalendarWindow):
    """A window in the midst of whose work, which is done under the store's lock, the garbage is collected once."""

    collect_in = 0
    """In which piece of work, counted from 1."""

    def _work(self) -> None:
        self.collect_in -= 1
        if self.collect_in == 0:
            gc.collect()

    def fits(self, state: Any, need: int, now: int) -> int:
        self._work()
        return super().fits(state, need, now)

    def take(self, state: Any, cost: int, now: int) -> tuple[Any, int]:
        self._work()
        return super().take(state, cost, now)

    def adjust(self, state: Any, mark: int, delta: int, now: int) -> Any:
        self._work()
        return super().adjust(state, mark, delta, now)


@pytest.fixture
def _no_collections(small_heap: None) -> Iterator[None]:
    """An interrupt that strikes a finalizer, or what a test tool has called by the collector, is told, and lost."""
    gc.disable()
    gc.collect()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collections")
@pytest.mark.parametrize("held", [True, False])
def test_rule_11_streams_that_are_collected_under_the_lock_are_settled(held: bool) -> None:
    """A held stream's finalizer finds its own lock taken; one of another key finds another free."""
    limit = Collecting(DAY)
    budget = TokenBudget(limit, name="streams")

    @token_budget(budget, key="user", reserve=9, usage=lambda item: item)
    def stream(user: str) -> Iterator[int]:
        yield 2
        yield 3

    @token_budget(budget, key="user", reserve=1, usage=lambda answer: 1)
    def ask(user: str) -> str:
        return "an answer"

    user, rounds = "alice" if held else "bob", 12
    for piece in range(rounds):
        items = stream(user)
        assert next(items) == 2
        Garbage(items.close)
        del items
        limit.collect_in = piece // 3 + 1
        ask("alice")
        gc.collect()
    assert used(budget) + (0 if held else used(budget, "bob")) == 3 * rounds
    assert open_holds(budget, "alice", "bob") == 0


def interrupt(moment: int, function: Callable[[], object]) -> bool:
    """Call a function and interrupt it at one moment, counted from 1; False if it ended before.

    Python lets a signal's handler run when a function begins and when one written in C has returned, which are the
    moments at which a profiler is called, too.
    """

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal moment
        if event in ("call", "c_return"):
            moment -= 1
            if moment == 0:
                raise Interrupted

    try:
        sys.setprofile(profile)
        function()
    except Interrupted:
        pass
    finally:
        sys.setprofile(None)
    return moment <= 0


class Interrupter:
    """Functions of all kinds, each of which holds five tokens, or none, and uses two."""

    def __init__(self, stores: tuple[Store, Store], reserve: Any) -> None:
        self.rate = RateLimiter(DAY, name="calls", store=stores[0])
        self.budget = TokenBudget(DAY, name="tokens", store=stores[1])
        self.answered = 0
        self.in_body: Callable[[], None] = lambda: None

        def decorated(function: Any) -> Any:
            spend = token_budget(self.budget, key="user", reserve=reserve, usage=lambda answer: 2)
            return rate_limited(self.rate, key="user", refund_on=ZeroDivisionError)(spend(function))

        @decorated
        def plain(user: str) -> str:
            self.answered += 1
            self.in_body()
            return "an answer"

        @decorated
        async def coroutine(user: str) -> str:
            self.answered += 1
            self.in_body()
            return "an answer"

        @decorated
        def generator(user: str) -> Iterator[str]:
            self.answered += 1
            self.in_body()
            yield "an answer"

        def hold(user: str) -> None:
            with self.budget.reserve(user, 5) as hold:
                self.answered += 1
                self.in_body()
                hold.settle(2)

        def await_it(user: str) -> None:
            with contextlib.suppress(StopIteration):
                coroutine(user).send(None)

        self.kinds: dict[str, Callable[[str], Any]] = {
            "plain": plain,
            "coroutine": await_it,
            "generator": lambda user: list(generator(user)),
            "left generator": lambda user: next(generator(user)),
            "hold": hold,
        }

    def is_whole(self) -> bool:
        """Whether nothing is held, and no call thinks that it runs inside of one that has ended."""
        return running() is None and open_holds(self.budget) == open_holds(self.rate) == 0


@pytest.fixture
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    if request.param == "a file":
        store = SQLiteStore(tmp_path / "counts.db", timeout=30)
        yield store, store
        store.close()
    else:
        first = MemoryStore()
        yield first, MemoryStore() if request.param == "two stores" else first


KINDS = ("plain", "coroutine", "generator", "hold")
CASES = [
    (place, kind)
    for place in ("one store", "two stores", "a file")
    for kind in KINDS
    if (place, kind) != ("a file", "coroutine")  # which another thread asks, that no signal reaches
]
RESERVES = {"no reserve": None, "reserve": 5, "asked reserve": lambda: 5}


@pytest.mark.usefixtures("_no_collections", "storm")
@pytest.mark.parametrize("reserve", RESERVES.values(), ids=RESERVES)
@pytest.mark.parametrize(("stores", "kind"), CASES, indirect=["stores"])
def test_rule_11_an_interrupt_at_every_moment_leaves_nothing_held(
    stores: tuple[Store, Store], kind: str, reserve: Any
) -> None:
    calls = Interrupter(stores, reserve)
    call = calls.kinds[kind]
    call("alice")
    moment = 1
    while True:
        before, calls.answered = used(calls.budget), 0
        if not interrupt(moment, lambda: call("alice")):
            break
        gc.collect()
        assert calls.is_whole(), moment
        assert 2 * calls.answered <= used(calls.budget) - before <= 5, moment
        moment += 1
    assert moment > 20


@pytest.mark.usefixtures("_no_collections", "storm")
@pytest.mark.parametrize("reserve", RESERVES.values(), ids=RESERVES)
@pytest.mark.parametrize(("stores", "kind"), CASES, indirect=["stores"])
def test_rule_11_a_second_interrupt_at_every_moment_loses_no_charge(
    stores: tuple[Store, Store], kind: str, reserve: Any
) -> None:
    """The first comes in the middle of the call, which is then charged what it held, or an estimate."""
    calls = Interrupter(stores, reserve)
    moment = 1

    def be_interrupted() -> None:
        raise Interrupted

    calls.in_body = be_interrupted
    while True:
        before, calls.answered = used(calls.budget), 0
        struck = interrupt(moment, lambda: calls.kinds[kind]("alice"))
        gc.collect()
        assert calls.is_whole(), moment
        assert 2 * calls.answered <= used(calls.budget) - before <= 5, moment
        if not struck:
            break
        moment += 1
    assert moment > 20


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(tmp_path / "counts.db", timeout=30)
    yield store
    store.close()


@pytest.mark.usefixtures("_no_collections")
@pytest.mark.parametrize("used_up", [15, 2_000], ids=["less than held", "more than held"])
def test_rule_11_an_interrupt_at_every_moment_writes_what_was_settled_once(
    sqlite_store: SQLiteStore, used_up: int
) -> None:
    """And leaves the file to others: before the COMMIT nothing was done, after it all was."""
    rate = RateLimiter(DAY, name="calls", store=sqlite_store)
    budget = TokenBudget(DAY, name="tokens", store=sqlite_store)
    other = sqlite3.connect(sqlite_store._database.path, timeout=30, isolation_level=None)
    moment, calls, settled = 1, [used(rate)], 0
    struck = True
    while struck:
        with mock.patch.object(sqlite_store, "flush"):  # by which the writer is first now and then
            budget.reserve("alice", 1_500).settle(used_up)
            settled += used_up
            struck = interrupt(moment, lambda: rate.acquire("alice"))
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
        calls.append(used(rate))
        assert calls[-1] - calls[-2] in (0, 1), moment
        assert used(budget) == settled, moment
        assert open_holds(budget) == 0, moment
        assert not sqlite_store.behind, moment
        moment += 1
    other.close()
    assert moment > 150
    assert calls[-1] > calls[0] + 1  # some were interrupted after the COMMIT


@pytest.mark.usefixtures("_no_collections")
def test_rule_11_a_reset_that_is_interrupted_closes_what_it_forgot(sqlite_store: SQLiteStore) -> None:
    budget = TokenBudget(DAY, name="tokens", store=sqlite_store)
    moment, struck = 1, True
    while struck:
        budget.charge("alice", 20 - used(budget))
        hold = budget.reserve("alice", 10)
        struck = interrupt(moment, lambda: budget.reset("alice"))
        kept = used(budget)
        assert kept in (0, 30), moment
        hold.settle(4)
        assert used(budget) == (24 if kept else 0), moment
        budget.reset("alice")
        moment += 1
    assert moment > 100


class Interrupting(MemoryStore):
    """A store in the midst of whose binding somebody makes limited calls, as a finalizer or a signal's handler may."""

    meanwhile: Callable[[], object] | None = None

    def counts(self, owner: Owner, position: int, limit: Algorithm) -> MemoryCounts:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super().counts(owner, position, limit)


@pytest.mark.parametrize("same", [True, False], ids=["the same limiter", "another limiter"])
def test_a_limiter_may_be_bound_while_its_thread_binds_one(same: bool) -> None:
    before = replace_default(store := Interrupting())
    try:
        limiter = RateLimiter("5/day", name="outer")
        inner = limiter if same else RateLimiter("5/day", name="inner")
        store.meanwhile = lambda: inner.acquire("alice")
        thread = threading.Thread(target=limiter.acquire, args=("alice",), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "it hangs"
        assert used(limiter) == (2 if same else 1)
        assert used(inner) == (2 if same else 1)
    finally:
        replace_default(before)


@pytest.mark.usefixtures("default_store")
def test_the_default_store_may_be_asked_for_while_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_default(None)
    limiters = [RateLimiter("5/day", name="outer"), RateLimiter("5/day", name="inner")]

    class Meanwhile(MemoryStore):
        def __init__(self) -> None:
            super().__init__()
            monkeypatch.setattr("quotalimit.stores.default.MemoryStore", MemoryStore)
            limiters[1].acquire("alice")

    monkeypatch.setattr("quotalimit.stores.default.MemoryStore", Meanwhile)
    thread = threading.Thread(target=limiters[0].acquire, args=("alice",), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    assert limiters[0].bound().store is limiters[1].bound().store
    assert [used(limiter) for limiter in limiters] == [1, 1]


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


STORES = ["memory://", "sqlite:///{}/counts.db"]


@pytest.mark.parametrize("url", STORES)
def test_the_interpreter_shuts_down_in_silence_with_streams_and_holds_open(url: str, tmp_path: Path) -> None:
    program = """
        import asyncio, sys, threading
        from quotalimit import TokenBudget, configure, store_from_url, token_budget

        configure(store=store_from_url(sys.argv[1]))

        @token_budget("1000/day", key="user", reserve=5, usage=lambda item: item, name="streams")
        def stream(user):
            yield 1
            yield 2

        @token_budget("1000/day", key="user", reserve=5, usage=lambda item: item, name="async")
        async def stream_async(user):
            yield 1
            yield 2

        kept = stream("alice")
        next(kept)
        cycle = [stream("alice")]
        cycle.append(cycle)
        next(cycle[0])
        never = stream("bob")
        async def leave():
            global items
            items = stream_async("alice")
            await items.__anext__()
        asyncio.run(leave())
        hold = TokenBudget("100/day", name="holds").reserve("alice", 5)
        hold.__enter__()
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        print("done")
    """
    ended = run_python(program, url.format(tmp_path))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


@pytest.fixture(params=["memory", "sqlite"])
def forking_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
    else:
        store = SQLiteStore(tmp_path / "counts.db", timeout=30)
        yield store
        store.close()


def test_a_fork_amid_calls_of_threads_leaves_counts_right(forking_store: Store) -> None:
    """Rule 11: what is held at a fork is the parent's to settle; the child's calls neither hang nor settle it."""
    program = """
        import os, sys, threading
        from quotalimit import configure, limiters_of, store_from_url, token_budget, rate_limited

        configure(store=store_from_url(sys.argv[1]))

        @rate_limited("1000000/day", key="user", name="calls")
        @token_budget("1000000/day", key="user", reserve=5, usage=lambda answer: 3, name="tokens")
        def ask(user):
            return "an answer"

        @token_budget(limiters_of(ask)[1], key="user", reserve=7, usage=lambda item: item)
        def stream(user):
            yield 1
            yield 1

        done = [0] * 3
        stop = threading.Event()
        def work(number):
            while not stop.is_set():
                ask("alice")
                done[number] += 1
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        held = stream("alice")
        next(held)
        shared = not sys.argv[1].startswith("memory")
        children = 0
        for _ in range(10):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    ask("alice")
                    held.close()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            children += 1
        stop.set()
        for thread in threads:
            thread.join()
        list(held)
        calls = sum(done) + (children if shared else 0)
        rate, budget = limiters_of(ask)
        used = rate.peek("alice").used, budget.peek("alice").used
        assert used == (calls, 3 * calls + 2), (used, calls)
    """
    path = forking_store._database.path if isinstance(forking_store, SQLiteStore) else None
    forking_store.flush()
    ended = run_python(program, "memory://" if path is None else f"sqlite:///{path}")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_rule_6_the_child_of_a_fork_does_not_stand_in_line_behind_threads_of_its_parent() -> None:
    program = """
        import os, threading, time
        from quotalimit import RateLimiter
        from quotalimit._waiting import LINES

        limiter = RateLimiter("1/minute", name="calls")
        limiter.acquire("alice")
        waiting = threading.Thread(target=limiter.acquire, args=("alice",), kwargs={"wait": 100}, daemon=True)
        waiting.start()
        while not LINES:
            time.sleep(0.001)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                limiter.reset("alice")
                status = 0 if limiter.allow("alice") and not limiter.allow("alice") else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    """
    ended = run_python(program)
    assert (ended.returncode, ended.stderr) == (0, "")


_store: Store = MemoryStore()


def begin_worker(path: str | None) -> None:
    """Set up a worker of a pool: its own memory, or the file that all share."""
    global _store
    _store = MemoryStore() if path is None else SQLiteStore(path, timeout=30)


def charge_some(calls: int) -> int:
    """Charge a budget from within a worker, holding it meanwhile."""
    budget = TokenBudget("1000000/day", name="pool", store=_store)
    for _ in range(calls):
        with budget.reserve("alice", 5) as hold:
            hold.settle(2)
    return os.getpid()


def test_a_pool_of_processes_started_amid_calls_counts_in_one_file(tmp_path: Path) -> None:
    path = str(tmp_path / "counts.db")
    store = SQLiteStore(path, timeout=30)
    budget = TokenBudget("1000000/day", name="pool", store=store)
    own = threading.Thread(target=lambda: [budget.charge("alice", 1) for _ in range(100)])
    with budget.reserve("alice", 11) as hold:
        own.start()
        with ProcessPoolExecutor(2, get_context("fork"), begin_worker, (path,)) as pool:
            processes = set(pool.map(charge_some, [20] * 4))
        own.join()
        hold.settle(10)
    assert os.getpid() not in processes
    assert used(budget) == 4 * 20 * 2 + 100 + 10
    store.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # threads and forks: what this is about
def test_rule_5_a_fork_while_another_thread_makes_limiters_leaves_the_child_no_lock_taken(
    sqlite_store: SQLiteStore,
) -> None:
    """Nor does the child lose a state that a sweep of the other thread was about to look at."""
    limiter = RateLimiter("3/day", name="before")
    for _ in range(3):
        limiter.acquire("alice")
    store = limiter.bound().store
    (counts, _), *_ = limiter.bound().places
    counts._looked_at.append(("alice", counts.young.pop("alice")))  # as a sweep has it between two steps
    counts._sweeping = True
    taken, done = threading.Event(), threading.Event()

    def take() -> None:
        with limiters._binding, default._lock, store.names._lock, counts._moving, sqlite_store.names._lock, LINES._lock:
            taken.set()
            done.wait(30)

    thread = threading.Thread(target=take)
    thread.start()
    taken.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        works = RateLimiter("5/day", name="after").allow("alice")
        works &= RateLimiter("5/day", name="shared", store=sqlite_store).allow("alice")
        waits = RateLimiter(TokenBucket("100/second", burst=1), name="waits")
        works &= all(waits.acquire("alice", wait=5) for _ in range(2))
        works &= limiter.allow("bob")
        os._exit(0 if works and not limiter.allow("alice") and not counts._sweeping else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    done.set()
    thread.join()
