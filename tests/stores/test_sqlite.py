"""The SQLite store's own: its file, its journals, its thread."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import time_machine

from quotalimit import (
    CalendarWindow,
    InvalidLimit,
    RateLimiter,
    RateLimitExceeded,
    SlidingWindow,
    StoreFull,
    StoreUnavailable,
    TokenBucket,
    TokenBudget,
    TokenBudgetExceeded,
    everyone,
    limiters_of,
    rate_limited,
    store_from_url,
)
from quotalimit.stores.database import Database
from quotalimit.stores.rows import Rows
from quotalimit.stores.sqlite import SQLiteStore
from quotalimit.stores.writer import Writer

from ..helpers import used

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "counts.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(path, timeout=0.2)
    yield store
    store.close()


@pytest.fixture
def other(path: Path, store: SQLiteStore) -> Iterator[sqlite3.Connection]:
    """Somebody else's connection to the file."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    yield connection
    connection.close()


def rows(other: sqlite3.Connection, table: str) -> int:
    (count,) = other.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(count)


# The file


@pytest.mark.parametrize("path", ["", ":memory:", b"counts.db", "a\0b"])
def test_a_path_that_names_no_file_is_refused(path: Any) -> None:
    with pytest.raises(ValueError, match="path must be that of a file"):
        SQLiteStore(path)


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store_from_url("sqlite:///c").close()
    store = store_from_url("sqlite:///counts.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    RateLimiter("5/day", name="calls", store=store).acquire("alice")
    assert isinstance(store, SQLiteStore)
    store.close()
    assert (tmp_path / "counts.db").exists()
    assert os.listdir() == []


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite://host/counts.db", "sqlite:///a.db?mode=ro"])
def test_a_url_that_names_no_file_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"sqlite:///relative.db or sqlite:////absolute.db"):
        store_from_url(url)


def test_a_missing_directory_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"missing/counts.db' cannot be opened: make its directory"):
        SQLiteStore(tmp_path / "missing" / "counts.db")


def test_a_store_that_allows_can_be_made_of_a_missing_directory_and_says_so_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SQLiteStore(tmp_path / "missing" / "counts.db", on_unavailable="allow")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert RateLimiter("1/day", name="calls", store=store).allow("alice")
    assert len(caplog.records) == 1


def test_a_file_that_is_no_database_is_told_at_once(path: Path) -> None:
    path.write_text("This is the diary of somebody else. " * 100)
    with pytest.raises(StoreUnavailable, match=r"counts.db' is not a database: give another path"):
        SQLiteStore(path)
    assert path.read_text().startswith("This is the diary")


def test_a_database_of_something_else_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE customers (name)")
    connection.close()
    with pytest.raises(StoreUnavailable, match="tables of something else: give the store a file of its own"):
        SQLiteStore(path)


def test_a_read_only_file_is_told_at_once(tmp_path: Path) -> None:
    """By a process without the rights of root, who may write anywhere."""
    directory = tmp_path / "shared"
    directory.mkdir()
    SQLiteStore(directory / "counts.db").close()
    (directory / "counts.db").chmod(0o444)
    directory.chmod(0o555)
    for parent in tmp_path.parents:
        if os.access(parent, os.W_OK) and parent != Path("/tmp") and parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o055)
    tmp_path.chmod(0o755)
    code = f"""if True:
        import os
        from quotalimit.stores.sqlite import SQLiteStore
        if os.geteuid() == 0:
            os.setuid(65534)
        SQLiteStore({str(directory / "counts.db")!r})"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "is read-only: let this user write to the file and its directory" in run.stderr


def test_a_damaged_file_is_told_when_it_is_seen(path: Path, store: SQLiteStore) -> None:
    limiter = RateLimiter("5000/day", name="calls", store=store)
    for number in range(200):
        limiter.acquire(number)
    store.close()
    damaged = bytearray(path.read_bytes())
    damaged[8_192:] = os.urandom(len(damaged) - 8_192)
    path.write_bytes(damaged)
    with pytest.raises(StoreUnavailable, match=r"counts.db' is damaged: move it away"):
        [limiter.acquire(number) for number in range(200)]


@pytest.mark.parametrize(
    "nonsense",
    [
        "states SET state = CAST('nonsense' AS BLOB)",
        "states SET state = 'text'",
        "states SET state = 7",
        "states SET dated = 'text'",
        "states SET idle_at = x'00'",
        "states SET epoch = 'text'",
        "states SET epoch = 9223372036854775807",
        "states SET journal = 77, first = 0",
        "counts SET keys = 'text'",
    ],
)
def test_rule_24_a_row_that_makes_no_sense_is_told(
    store: SQLiteStore, other: sqlite3.Connection, nonsense: str
) -> None:
    limiter = RateLimiter("5/day", name="calls", store=store)
    limiter.acquire("alice")
    other.execute(f"UPDATE {nonsense}")
    act = limiter.reset if "epoch" in nonsense else limiter.acquire
    with pytest.raises(StoreUnavailable, match="is damaged"):
        act("bob" if "keys" in nonsense else "alice")


@pytest.mark.parametrize(
    "nonsense",
    [
        "states SET first = 'text'",
        "snapshots SET state = 'text'",
        "snapshots SET state = 7",
        "snapshots SET journal = 77",
        "chunks SET changes = 'text'",
        "chunks SET changes = 7",
        "chunks SET changes = x'00'",
        "chunks SET number = number + 1",
    ],
)
def test_rule_24_a_journal_that_makes_no_sense_is_told(
    path: Path, store: SQLiteStore, other: sqlite3.Connection, nonsense: str
) -> None:
    entries(RateLimiter("1000/day", name="calls", store=store), 140)
    other.execute(f"UPDATE {nonsense}")
    second = SQLiteStore(path)
    with pytest.raises(StoreUnavailable, match="is damaged"):
        RateLimiter("1000/day", name="calls", store=second).acquire("alice")
    second.close()


def test_a_file_that_is_moved_away_and_made_anew_starts_anew(path: Path, store: SQLiteStore) -> None:
    limiter = RateLimiter("1/day", name="calls", store=store)
    assert limiter.allow("alice")
    store.close()
    path.unlink()
    assert limiter.allow("alice")
    assert not limiter.allow("alice")


@pytest.mark.parametrize("remedy", ["moved", "deleted"])
def test_rule_5_all_who_counted_in_a_file_that_is_moved_away_count_in_the_new_one(
    path: Path, store: SQLiteStore, remedy: str
) -> None:
    second = SQLiteStore(path)
    limiters = [RateLimiter("5/day", name="calls", store=made) for made in (store, second)]
    assert [limiter.acquire("alice").used for limiter in limiters] == [1, 2]
    for number, file in enumerate(sorted(path.parent.iterdir())):
        if remedy == "moved":
            file.rename(path.parent / f"old-{number}")
        else:
            file.unlink()
    assert sum(limiter.allow("alice") for limiter in limiters * 5) == 5
    assert [used(limiter) for limiter in limiters] == [5, 5]
    second.close()


@pytest.mark.parametrize("remedy", ["made anew", "another's"])
def test_rule_14_what_was_held_in_a_file_that_was_moved_away_gives_nothing_back_in_the_new_one(
    path: Path, remedy: str
) -> None:
    SQLiteStore(path).close()
    store = SQLiteStore(path, timeout=0.01)
    budget = TokenBudget("1000/day", name="tokens", store=store)
    hold = budget.reserve("alice", 500)
    settled = budget.reserve("alice", 100)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        settled.settle(0)  # which cannot be written
        for file in path.parent.iterdir():
            file.unlink()
    if remedy == "another's":
        another = SQLiteStore(path.with_name("another.db"))
        TokenBudget("1000/day", name="tokens", store=another).charge("alice", 300)
        another.close()
        path.with_name("another.db").rename(path)
    with patch("quotalimit.clock.monotonic", return_value=10.0**9):
        budget.charge("alice", 600)
    hold.settle(10)
    assert used(budget) == (600 if remedy == "made anew" else 900)
    assert not store.busy
    store.close()


def test_rule_11_a_store_that_is_closed_writes_what_was_settled_though_the_last_call_failed(
    path: Path, store: SQLiteStore, other: sqlite3.Connection
) -> None:
    budget = TokenBudget("1000/day", name="tokens", store=store)
    hold = budget.reserve("alice", 500)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable):
        budget.charge("alice", 1)
    other.execute("COMMIT")
    hold.settle(10)
    store.close()
    second = SQLiteStore(path)
    assert used(TokenBudget("1000/day", name="tokens", store=second)) == 10
    second.close()


@pytest.mark.parametrize("limit", ["1000/day", SlidingWindow("1000/day")], ids=["small", "in a journal"])
def test_rule_2_a_call_that_is_interrupted_before_it_is_written_has_changed_nothing(
    store: SQLiteStore, other: sqlite3.Connection, limit: Any
) -> None:
    budget = TokenBudget(limit, name="tokens", store=store)
    for _ in range(130):  # each at a time of its own
        budget.charge("alice", 1)
    assert rows(other, "snapshots") == isinstance(limit, SlidingWindow)
    with budget.reserve("alice", 500):
        with patch.object(Rows, "sweep", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            budget.reserve("alice", 500)
        assert used(budget) == 630
        budget.reserve("alice", 500).settle(0)
        budget.charge("alice", 370)
        with pytest.raises(TokenBudgetExceeded) as refusal:
            budget.charge("alice", 1)
        assert refusal.value.reason == "busy"


class Failing:
    """A connection that fails for good at a statement, and has then rolled back, as SQLite does when a disk is full."""

    def __init__(self, connection: sqlite3.Connection, statement: str) -> None:
        self._connection = connection
        self._statement = statement

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        if statement.startswith(self._statement):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise sqlite3.OperationalError("database or disk is full")
        return self._connection.execute(statement, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.mark.parametrize("statement", ["BEGIN", "UPDATE", "COMMIT"])
def test_rule_2_a_call_whose_transaction_fails_has_changed_nothing(store: SQLiteStore, statement: str) -> None:
    budget = TokenBudget("1000/day", name="tokens", store=store)
    hold = budget.reserve("alice", 500)
    database: Any = store._database
    database._connection = Failing(database._connection, statement)
    with patch.object(store, "flush"), patch.object(Writer, "ring"):
        hold.settle(100)  # which the next call writes
        with pytest.raises(StoreUnavailable, match="disk is full"):
            budget.charge("alice", 300)
    with patch("quotalimit.clock.monotonic", return_value=10.0**9):
        assert used(budget) == 100


def test_what_changes_nothing_is_not_written(store: SQLiteStore, other: sqlite3.Connection) -> None:
    limiter = RateLimiter("1/day", name="calls", store=store)
    budget = TokenBudget(SlidingWindow("100/day"), name="tokens", store=store)
    limiter.acquire("alice")
    budget.charge("alice", 1)
    (before,) = other.execute("PRAGMA data_version").fetchone()
    assert [limiter.peek(user).used for user in ("alice", "bob")] == [1, 0]
    assert not limiter.allow("alice")
    assert limiter.allow("alice", 0)
    assert limiter.allow("bob", 0)
    budget.reserve("bob", 0).settle(0)
    store.flush()
    assert other.execute("PRAGMA data_version").fetchone() == (before,)


def test_rule_11_a_call_that_is_interrupted_after_it_was_written_is_charged_once(store: SQLiteStore) -> None:
    budget = TokenBudget("1000/day", name="tokens", store=store)
    hold = budget.reserve("alice", 500)
    really = Database.__exit__

    def interrupted(self: Database, *arguments: Any) -> None:
        really(self, *arguments)
        raise KeyboardInterrupt

    with patch.object(store, "flush"), patch.object(Writer, "ring"):
        hold.settle(100)  # which the next call writes
        with patch.object(Database, "__exit__", interrupted), pytest.raises(KeyboardInterrupt):
            budget.reserve("alice", 300)
    assert used(budget) == 100
    assert not store.busy


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_no_connection_is_carried_across_a_fork(store: SQLiteStore) -> None:
    """SQLite would take its parent's locks for its own."""
    RateLimiter("5/day", name="calls", store=store).acquire("alice")
    child = os.fork()
    if child == 0:
        os._exit(0 if store._database._connection is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# The lock


def test_a_store_that_must_not_wait_asks_a_file_that_is_free(path: Path) -> None:
    store = SQLiteStore(path, timeout=1e-9)
    assert RateLimiter("5/day", name="calls", store=store).allow("alice")
    store.close()


def test_rule_24_a_thread_waits_for_others_of_its_process_no_longer_than_for_the_file(path: Path) -> None:
    store = SQLiteStore(path, timeout=0.02)
    limiter = RateLimiter("5/day", name="calls", store=store)
    with ThreadPoolExecutor(1) as threads, store._lock:
        asked = threads.submit(limiter.acquire, "alice")
        with pytest.raises(StoreUnavailable, match=r"has been locked for 0\.02 s"):
            asked.result(10)
    store.close()


def test_rule_24_a_locked_file_raises_with_its_path_and_the_remedy(
    store: SQLiteStore, other: sqlite3.Connection
) -> None:
    limiter = RateLimiter("5/day", name="calls", store=store)
    limiter.acquire("alice")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match=r"counts.db' has been locked for 0.2 s: find the process"):
        limiter.acquire("alice")
    other.execute("COMMIT")
    with patch("quotalimit.clock.monotonic", return_value=10.0**9):
        assert limiter.acquire("alice").used == 2


@pytest.mark.parametrize("step", ["begin", "__enter__", "__exit__"])
def test_an_interrupt_around_a_transaction_leaves_the_file_to_others(
    store: SQLiteStore, other: sqlite3.Connection, step: str
) -> None:
    limiter = RateLimiter("5/day", name="calls", store=store)
    limiter.acquire("alice")
    really = getattr(Database, step)

    def interrupted(self: Database, *arguments: Any) -> None:
        if step == "begin":
            really(self, *arguments)
        raise KeyboardInterrupt

    with patch.object(Database, step, interrupted), pytest.raises(KeyboardInterrupt):
        limiter.acquire("alice")
    other.execute("BEGIN IMMEDIATE")
    other.execute("ROLLBACK")
    assert limiter.acquire("alice").used == 2


def test_a_store_can_be_made_while_the_file_is_locked(path: Path, other: sqlite3.Connection) -> None:
    other.execute("BEGIN IMMEDIATE")
    late = SQLiteStore(path)
    other.execute("COMMIT")
    assert RateLimiter("5/day", name="calls", store=late).allow("alice")
    late.close()


async def test_the_event_loop_goes_on_while_the_file_is_locked(store: SQLiteStore, other: sqlite3.Connection) -> None:
    limiter = RateLimiter("5/day", name="calls", store=store)
    other.execute("BEGIN IMMEDIATE")
    call = asyncio.ensure_future(limiter.allow_async("alice"))
    for _ in range(1_000):  # turns of the loop, in which the call is asked and waits for the lock
        await asyncio.sleep(0)
    assert not call.done()
    other.execute("COMMIT")
    assert await call
    assert (await limiter.peek_async("alice")).used == 1


async def test_rule_24_a_task_that_waited_for_others_still_has_its_time_for_the_file(
    store: SQLiteStore, other: sqlite3.Connection
) -> None:
    limiter = RateLimiter("500/day", name="calls", store=store)
    await limiter.acquire_async("alice")
    holder = threading.Timer(0.15, other.execute, ("COMMIT",))
    executing, go_on = threading.Event(), threading.Event()

    def others() -> None:
        executing.set()
        go_on.wait(30)

    assert store._threads is not None
    store._threads.submit(others)
    executing.wait(30)
    call = asyncio.ensure_future(limiter.acquire_async("alice"))
    await asyncio.sleep(0.25)  # longer than the time-out
    other.execute("BEGIN IMMEDIATE")
    holder.start()
    go_on.set()
    assert (await call).used == 2
    holder.join()


async def test_rule_24_tasks_that_wait_for_a_locked_file_fail_together(
    store: SQLiteStore, other: sqlite3.Connection
) -> None:
    limiter = RateLimiter("500/day", name="calls", store=store)
    other.execute("BEGIN IMMEDIATE")
    with patch.object(store._database, "begin", wraps=store._database.begin) as begin:
        calls = [limiter.acquire_async("alice") for _ in range(50)]
        failed = await asyncio.gather(*calls, return_exceptions=True)
    assert {str(error) for error in failed} == {str(store._database.busy())}
    assert {type(error) for error in failed} == {StoreUnavailable}
    assert begin.call_count == 1
    other.execute("COMMIT")
    with patch("quotalimit.clock.monotonic", return_value=10.0**9):
        assert (await limiter.acquire_async("alice")).used == 1


@pytest.mark.parametrize("cost", [1, 3])
async def test_rule_2_a_call_that_is_cancelled_while_the_file_is_locked_charges_nothing(
    store: SQLiteStore, other: sqlite3.Connection, cost: int
) -> None:
    limiter = RateLimiter("5/day", name="calls", store=store)
    budget = TokenBudget("50/day", name="tokens", store=store)

    async def call() -> None:
        await limiter.acquire_async("alice", cost)
        await budget.reserve_async("alice", 20)

    async def hold() -> None:
        await budget.reserve_async("alice", 20)

    other.execute("BEGIN IMMEDIATE")
    calls = [asyncio.ensure_future(call()), asyncio.ensure_future(hold())]
    for _ in range(100):
        await asyncio.sleep(0)
    for one in calls:
        one.cancel()
    assert [type(result) for result in await asyncio.gather(*calls, return_exceptions=True)] == [
        asyncio.CancelledError
    ] * 2
    other.execute("COMMIT")
    assert (await limiter.peek_async("alice")).used == 0
    assert (await budget.peek_async("alice")).used == 0


async def test_a_call_that_is_cancelled_and_then_fails_says_nothing(
    store: SQLiteStore, other: sqlite3.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = RateLimiter("5/day", name="calls", store=store)
    other.execute("BEGIN IMMEDIATE")
    calls = [asyncio.ensure_future(limiter.acquire_async("alice")) for _ in range(2)]  # the second in its turn
    await asyncio.sleep(0.05)
    for call in calls:
        call.cancel()
    cancelled = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in cancelled] == [asyncio.CancelledError] * 2
    assert store._threads is not None
    store._threads.shutdown()
    assert not caplog.records
    other.execute("COMMIT")


def test_one_store_serves_event_loops_one_after_another(store: SQLiteStore) -> None:
    limiter = RateLimiter("10/day", name="calls", store=store)

    async def several() -> list[bool]:
        return await asyncio.gather(*(limiter.allow_async("alice") for _ in range(3)))

    assert asyncio.run(several()) + asyncio.run(several()) + [limiter.allow("alice")] == [True] * 7
    assert used(limiter) == 7


async def test_all_tasks_ask_in_one_thread(store: SQLiteStore) -> None:
    limiter = RateLimiter("10/day", name="calls", store=store)
    threads: set[threading.Thread] = set()
    really = store._database.begin

    def begin(deadline: float) -> None:
        threads.add(threading.current_thread())
        really(deadline)

    with patch.object(store._database, "begin", begin):
        for _ in range(2):
            await asyncio.gather(*(limiter.acquire_async("alice") for _ in range(3)))
    assert len(threads) == 1
    assert threads.isdisjoint({threading.current_thread()})


async def test_a_store_that_is_closed_just_as_a_task_asks_answers_it(store: SQLiteStore) -> None:
    limiter = RateLimiter("5/day", name="calls", store=store)
    await limiter.acquire_async("alice")
    really = ThreadPoolExecutor.submit

    def submit(self: ThreadPoolExecutor, *work: Any) -> Any:
        patched.stop()
        store.close()
        return really(self, *work)

    patched = patch.object(ThreadPoolExecutor, "submit", submit)
    patched.start()
    assert (await limiter.acquire_async("alice")).used == 2


def test_tasks_may_call_as_the_interpreter_ends(tmp_path: Path) -> None:
    program = """if True:
        import asyncio, atexit, sys
        from quotalimit import RateLimiter, store_from_url

        limiter = RateLimiter("5/day", name="calls", store=store_from_url(sys.argv[1]))
        atexit.register(lambda: print(asyncio.run(limiter.acquire_async("alice")).used))
        asyncio.run(limiter.acquire_async("alice"))
    """
    command = [sys.executable, "-W", "error", "-c", program, f"sqlite:///{tmp_path}/counts.db"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("2\n", "")


def test_a_call_that_used_just_what_it_held_asks_the_file_once(store: SQLiteStore, other: sqlite3.Connection) -> None:
    @rate_limited("5/day", key="user", refund_on=ConnectionError, name="calls", store=store)
    def call(user: str) -> None: ...

    with patch.object(store._database, "begin", wraps=store._database.begin) as begin:
        call("alice")
        assert begin.call_count == 1
    assert not store.busy


# Large windows


def entries(limiter: RateLimiter, count: int) -> None:
    for _ in range(count):
        limiter.acquire("alice")


@pytest.mark.parametrize("weighted", [False, True], ids=["units", "weighted"])
def test_a_call_on_a_large_window_writes_its_own_change_alone(
    store: SQLiteStore, path: Path, other: sqlite3.Connection, weighted: bool
) -> None:
    limit = SlidingWindow("1M/day")
    limiter = RateLimiter(limit, name="calls", store=store)
    with time_machine.travel(1_800_000_000, tick=False) as clock:
        state: Any = None
        for number in range(100_000):
            state, _ = limit.take(state, 1 + weighted, round((1_800_000_000 - 50_000 + number / 2) * 1e6))
        limiter.acquire("alice")
        written = limit.dump(state)
        journal = other.execute("INSERT INTO snapshots (state) VALUES (?)", (written,)).lastrowid
        other.execute("UPDATE states SET journal = ?, first = 0, state = NULL", (journal,))
        limiter.acquire("alice", 0)
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for _ in range(200):
            clock.shift(0.5)
            limiter.acquire("alice")
        assert limiter.peek("alice").used == 100_000 * (1 + weighted) + 200
        wal = path.with_name("counts.db-wal").stat().st_size
        (longest,) = other.execute("SELECT max(length(changes)) FROM chunks").fetchone()
    assert len(written) > 800_000
    assert longest < 4_096  # so many calls are as cheap as these 200
    assert wal < 200 * 5 * 4_120  # pages of 4,096 bytes with headers of 24


def test_a_large_window_is_written_whole_seldom_enough(store: SQLiteStore, other: sqlite3.Connection) -> None:
    limiter = RateLimiter("1M/day", name="calls", store=store)
    with patch.object(SlidingWindow, "dump", autospec=True, side_effect=SlidingWindow.dump) as dump:
        entries(limiter, 129)
        dump.reset_mock()
        entries(limiter, 2_000)
    assert 1 < dump.call_count <= 26  # each after an eighth more than at the last
    assert used(limiter) == 2_129
    assert rows(other, "snapshots") == 1
    assert rows(other, "chunks") <= 2 * 5  # those of the last two snapshots: a 64th of 17 kB in changes, by the 64


def test_processes_that_take_turns_on_a_large_window_read_what_others_wrote(path: Path, store: SQLiteStore) -> None:
    second = SQLiteStore(path)
    one, two = (RateLimiter("1_000/day", name="calls", store=made) for made in (store, second))
    entries(one, 128)
    with (
        patch.object(SlidingWindow, "dump", autospec=True, side_effect=SlidingWindow.dump) as dump,
        patch.object(SlidingWindow, "load", autospec=True, side_effect=SlidingWindow.load) as load,
    ):
        for number in range(436):
            entries(two if number % 7 < 3 else one, 2)
    assert dump.call_count <= 20  # no more than if one process called
    assert load.call_count == 1  # by the second, at first
    assert (used(one), used(two)) == (1_000, 1_000)
    with pytest.raises(RateLimitExceeded):
        one.acquire("alice")
    third = SQLiteStore(path)
    assert used(RateLimiter("1_000/day", name="calls", store=third)) == 1_000
    second.close()
    third.close()


def test_rule_5_processes_agree_on_a_large_window_whatever_was_done_to_it(path: Path, store: SQLiteStore) -> None:
    """Charges, settlements and a clock that steps back are made again where others read them."""
    second = SQLiteStore(path)
    budgets = [TokenBudget(SlidingWindow("1M/day"), name="tokens", store=made) for made in (store, second)]
    with time_machine.travel(1_800_000_000, tick=False) as clock:
        for _ in range(120):
            clock.shift(0.5)
            budgets[0].charge("alice", 7)
        expected = 120 * 7
        for step in range(40):
            acting, looking = budgets[step % 2], budgets[1 - step % 2]
            with acting.reserve("alice", 25) as hold:
                clock.shift(-3_600 if step % 7 == 5 else 1)
                hold.settle(step)
            expected += step
            late = SQLiteStore(path)
            decisions = [looking.peek("alice"), acting.peek("alice")]
            decisions.append(TokenBudget(SlidingWindow("1M/day"), name="tokens", store=late).peek("alice"))
            late.close()
            assert {(seen.used, seen.reset_at) for seen in decisions} == {(expected, decisions[0].reset_at)}
        clock.shift(86_400)
        assert [used(budget) for budget in budgets] == [0, 0]
    second.close()


def test_a_file_has_the_changes_of_a_large_window_as_its_version_says(
    store: SQLiteStore, other: sqlite3.Connection
) -> None:
    """Processes of other releases read them."""
    budget = TokenBudget(SlidingWindow("1M/day"), name="tokens", store=store)
    with time_machine.travel(1_800_000_000, tick=False) as clock:
        for _ in range(90):
            clock.shift(1)
            budget.charge("alice", 7)
        with budget.reserve("alice", 25) as hold:
            hold.settle(4)
        clock.shift(-5)
        budget.peek("alice")
    (changes,) = other.execute("SELECT changes FROM chunks ORDER BY number DESC LIMIT 1").fetchone()
    *_, taken, settled, redated = struct.iter_unpack("<Bqqq", changes)
    at = 1_800_000_090_000_000
    assert (taken[0], taken[1], taken[3]) == (1, at, 25)
    assert (settled[0], settled[1], settled[3]) == (2, at, -21)
    assert redated == (0, at - 5_000_000, 0, 0)


def test_rule_5_a_large_window_of_a_file_that_was_moved_away_is_none_of_the_new_one(
    path: Path, store: SQLiteStore
) -> None:
    another = SQLiteStore(path.with_name("another.db"))
    limiters = [RateLimiter("1M/day", name="calls", store=made) for made in (store, another)]
    with time_machine.travel(1_800_000_000, tick=False) as clock:
        for limiter in limiters:
            for _ in range(140):
                clock.shift(1)
                limiter.acquire("alice")
            clock.shift(18 * 3600)
        another.close()
        for file in path.parent.glob("counts.db-*"):
            file.unlink()
        path.with_name("another.db").rename(path)
        assert used(limiters[0]) == 140  # those of before are more than a day old


def test_a_window_that_is_small_again_leaves_its_journal(store: SQLiteStore, other: sqlite3.Connection) -> None:
    limiter = RateLimiter("1_000/minute", name="calls", store=store)
    with time_machine.travel(1_800_000_000, tick=False) as clock:
        for _ in range(200):
            clock.shift(0.01)
            limiter.acquire("alice", 2)
        assert (rows(other, "snapshots"), rows(other, "states")) == (1, 1)
        clock.shift(60)
        for _ in range(200):
            limiter.acquire("alice", 2)
        assert (rows(other, "chunks"), rows(other, "snapshots"), rows(other, "states")) == (0, 0, 1)
        assert limiter.peek("alice").used == 400


@pytest.mark.parametrize(
    ("kept", "users", "expected"),
    [
        (3_000, "bccbaabc", [0, 0, 0, 0, 1, 0, 0, 1]),  # two of about 1,200 bytes
        (100, "ccbbc", [0, 0, 1, 0, 1]),  # one at least
    ],
)
def test_a_process_keeps_the_large_windows_that_it_used_last(
    store: SQLiteStore, kept: int, users: str, expected: list[int]
) -> None:
    limiter = RateLimiter("1_000/day", name="calls", store=store)
    with (
        patch("quotalimit.stores.journal._KEPT", kept),
        patch.object(SlidingWindow, "load", autospec=True, side_effect=SlidingWindow.load) as load,
    ):
        for user in "abc":
            for _ in range(150):
                limiter.acquire(user)
        loads = []
        for user in users:
            load.reset_mock()
            limiter.acquire(user)
            loads.append(load.call_count)
    assert loads == expected


@pytest.mark.parametrize(
    ("event", "users", "expected"),
    [
        ("grown", "ab", [1, 1]),  # too large for two
        ("grown by others", "ab", [1, 1]),
        ("reset", "ac", [1, 0]),
        ("written by others", "bc", [1, 0]),
        ("interrupted", "bcbc", [1, 1, 0, 0]),
    ],
)
def test_a_process_keeps_two_large_windows_whatever_became_of_others(
    path: Path, store: SQLiteStore, event: str, users: str, expected: list[int]
) -> None:
    """Of those of a, b and c, which were used in turn."""
    limiter = RateLimiter("1_000/day", name="calls", store=store)
    with (
        patch("quotalimit.stores.journal._KEPT", 3_000),
        patch.object(SlidingWindow, "load", autospec=True, side_effect=SlidingWindow.load) as load,
    ):
        for user in "acb":
            for _ in range(150):
                limiter.acquire(user)
        if event == "grown":
            for _ in range(150):
                limiter.acquire("b")
        elif event == "reset":
            limiter.reset("b")
        elif event.endswith("by others"):
            second = SQLiteStore(path)
            for _ in range(50 if event == "written by others" else 150):
                RateLimiter("1_000/day", name="calls", store=second).acquire("b")
                if event == "grown by others":
                    limiter.peek("b")
            second.close()
        else:
            with patch.object(Rows, "sweep", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
                limiter.acquire("b")
        loads = []
        for user in users:
            load.reset_mock()
            limiter.peek(user)
            loads.append(load.call_count)
    assert loads == expected


def test_a_large_window_that_is_given_back_leaves_its_journal(store: SQLiteStore, other: sqlite3.Connection) -> None:
    budget = TokenBudget(SlidingWindow("1M/day"), name="tokens", store=store)
    for hold in [budget.reserve("alice", 2) for _ in range(130)]:
        hold.settle(0)
    store.flush()
    assert (rows(other, "chunks"), rows(other, "snapshots")) == (0, 0)
    budget.charge("alice", 1)
    assert used(budget) == 1


def test_a_large_window_that_is_reset_leaves_its_journal(store: SQLiteStore, other: sqlite3.Connection) -> None:
    limiter = RateLimiter("1_000/day", name="calls", store=store)
    entries(limiter, 140)
    limiter.reset("alice")
    assert (rows(other, "chunks"), rows(other, "snapshots")) == (0, 0)
    assert limiter.acquire("alice").used == 1


def test_a_large_window_that_has_passed_leaves_nothing(store: SQLiteStore, other: sqlite3.Connection) -> None:
    limiter = RateLimiter("1_000/minute", name="calls", store=store)
    with time_machine.travel(1_800_000_000, tick=False) as clock:
        entries(limiter, 500)
        assert rows(other, "chunks") > 0
        clock.shift(200)
        for number in range(3):
            limiter.acquire(number)
        assert (rows(other, "chunks"), rows(other, "snapshots"), rows(other, "states")) == (0, 0, 3)


# Idle rows and bounds


@pytest.mark.parametrize(
    "limit", [SlidingWindow("10/minute"), CalendarWindow("10/minute"), TokenBucket("10/minute")], ids=str
)
@pytest.mark.parametrize("back", [0, 86_400])
def test_rule_22_idle_rows_go_as_calls_come(
    store: SQLiteStore, other: sqlite3.Connection, limit: Any, back: int
) -> None:
    limiter = RateLimiter(limit, name="calls", store=store)
    with time_machine.travel(1_800_000_000, tick=False) as clock:
        for number in range(200):
            limiter.acquire(number, 2)
        clock.shift(-back)
        for _ in range(160):
            clock.shift(1)
            limiter.allow("busy", 1)
        assert rows(other, "states") == 1
        assert other.execute("SELECT keys FROM counts").fetchone() == (1,)


def test_rule_22_a_full_limiter_refuses_new_keys_and_keeps_the_old(path: Path, other: sqlite3.Connection) -> None:
    store = SQLiteStore(path, max_keys=3)
    limiter = RateLimiter("2/minute", "2/second", name="calls", store=store)
    budget = TokenBudget("10/minute", name="tokens", store=store)
    with time_machine.travel(1_800_000_000, tick=False) as clock:
        for number in range(3):
            limiter.acquire(number)
        hold = budget.reserve("alice", 10)
        hold.settle(4)
        with pytest.raises(StoreFull, match="calls: already counting for 3 identities"):
            limiter.acquire("new")
        assert used(budget) == 4  # what was settled is written all the same
        assert used(limiter, 0) == 1
        limiter.acquire(0)
        clock.shift(61)
        assert limiter.acquire("new").used == 1
    store.close()


def test_rule_9_a_debt_that_ends_after_all_times_is_kept(store: SQLiteStore) -> None:
    budget = TokenBudget(TokenBucket("1/day"), name="tokens", store=store)
    budget.reserve("alice", 1).settle(10**12)
    store.flush()
    assert used(budget) == 10**12


# Names


def test_rule_21_what_has_no_name_that_all_processes_know_is_refused(store: SQLiteStore) -> None:
    def local(user: str) -> None: ...

    for function in (local, lambda user: user):
        with pytest.raises(InvalidLimit, match="needs a name= of its own"):
            rate_limited("5/day", key="user", store=store)(function)
    with pytest.raises(InvalidLimit, match="needs a name= of its own"):
        RateLimiter("5/day", store=store)
    named = rate_limited("5/day", key="user", name="local", store=store)(local)
    named("alice")


def chat() -> None:
    """What every process that imports this module knows."""


def test_rule_21_a_function_of_a_module_has_a_name_that_all_processes_know(tmp_path: Path) -> None:
    stores = [SQLiteStore(tmp_path / "counts.db") for _ in range(2)]
    functions = [rate_limited("5/day", key=everyone, store=store)(chat) for store in stores]
    for function in functions:
        function()
    for function in functions:
        assert limiters_of(function)[0].peek("everyone").used == 2
    for store in stores:
        store.close()


def test_rule_21_keys_of_different_types_and_names_with_odd_signs_are_apart(store: SQLiteStore) -> None:
    one = RateLimiter("5/day", name="a:b\udcff", store=store)
    other = RateLimiter("5/day", name="a", store=store)
    for number, key in enumerate([1, "1", b"1", ("1",), ("a/b", "c"), ("a", "b/c"), "x" * 10_000, "\ud800"]):
        for limiter in (one, other):
            for _ in range(1 + number % 5):
                limiter.acquire(key)
            assert used(limiter, key) == 1 + number % 5


def test_stores_that_make_one_file_at_the_same_moment_do_not_disturb_each_other(tmp_path: Path) -> None:
    for turn in range(10):
        start, stores = threading.Barrier(6), []

        def make(path: Path = tmp_path / f"{turn}.db", start: Any = start, stores: list[Any] = stores) -> bool:
            start.wait()
            stores.append(SQLiteStore(path, timeout=5))
            return RateLimiter("9/day", name="calls", store=stores[-1]).allow("alice")

        with ThreadPoolExecutor(6) as threads:
            assert all(future.result() for future in [threads.submit(make) for _ in range(6)])
        assert used(RateLimiter("9/day", name="calls", store=stores[0])) == 6
        for store in stores:
            store.close()


def test_rule_5_a_store_is_not_closed_in_the_middle_of_a_transaction_of_its_own_thread(tmp_path: Path) -> None:
    """As a finalizer may want to."""
    store = SQLiteStore(tmp_path / "counts.db")
    limiter = RateLimiter("2/day", name="calls", store=store)
    with store._lock, pytest.raises(StoreUnavailable, match="call later"):
        store.close()
    assert limiter.allow("alice")
    store.close()
