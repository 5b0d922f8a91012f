"""Who writes what nobody waits for: rules 11 and 24 for the writer alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from quotalimit.stores.writer import Writer


class Store:
    """A store that says what it was asked, and may be told to do what a finalizer does where it is looked at."""

    behind = False
    busy_then: Callable[[], bool] = lambda _: False
    hashed_then: Callable[[], None] = lambda _: None

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.flushed = threading.Event()

    @property
    def busy(self) -> bool:
        return self.busy_then()

    def __hash__(self) -> int:
        self.hashed_then()
        return id(self)

    def flush(self) -> None:
        self.asked.append("flush")
        self.flushed.set()

    def close(self) -> None:
        self.asked.append("close")
        if self.behind:
            raise OSError("the disk is full")

    def before_fork(self) -> None:
        self.asked.append("before")

    def after_fork(self, *, in_child: bool) -> None:
        self.asked.append(f"after in {'the child' if in_child else 'the parent'}")


@pytest.fixture
def writer() -> Writer:
    """Without a thread of its own."""
    writer = Writer()
    writer._thread = threading.current_thread()
    return writer


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    """With a thread that does not look up by itself."""
    for name, seconds in {"_GRACE": 0.0, "_RETRY": 100.0, "_LINGER": 100.0}.items():
        monkeypatch.setattr(f"quotalimit.stores.writer.{name}", seconds)
    writer = Writer()
    yield writer
    monkeypatch.setattr("quotalimit.stores.writer._LINGER", 0.0)
    monkeypatch.setattr("quotalimit.stores.writer._RETRY", 0.0)
    for store in writer._watched:
        store.behind, store.busy_then = False, lambda: False  # type: ignore[attr-defined, misc]
    writer.ring()


def in_time(act: Callable[[], object]) -> None:
    """Do something that must not hang."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


# Finalizers


def test_rule_11_a_store_that_a_finalizer_watches_in_the_middle_of_another_is_watched(writer: Writer) -> None:
    one, other = Store(), Store()
    one.hashed_then = lambda: writer.watch(other)
    in_time(lambda: writer.watch(one))
    assert other in writer._watched


def test_rule_11_a_store_that_a_finalizer_watches_while_the_idle_are_dropped_stays(writer: Writer) -> None:
    """Be it another, or the one that was idle a moment ago."""
    one, other = Store(), Store()

    def watch() -> bool:
        writer.watch(one)
        writer.watch(other)
        return False

    one.busy_then = watch
    other.busy_then = lambda: True
    writer.watch(one)
    in_time(writer._ends)
    assert writer._watched == {one, other}
    one.busy_then = lambda: False
    assert not writer._ends()
    assert writer._watched == {other}
    other.busy_then = lambda: False
    assert writer._ends()
    assert not writer._watched
    assert writer._thread is None


# The thread


def test_rule_11_what_is_settled_is_written_when_the_bell_rings(running: Writer) -> None:
    store, idle = Store(), Store()
    store.busy_then = idle.busy_then = lambda: True
    running.watch(idle)
    running.watch(store)
    thread = running._thread
    store.behind = True
    running.ring()
    assert store.flushed.wait(20)
    assert "flush" not in idle.asked
    assert running._thread is thread is not None
    assert thread.daemon


def test_what_the_next_call_writes_within_the_grace_is_left_to_it(
    running: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quotalimit.stores.writer._GRACE", 1.0)
    store, other = Store(), Store()
    running.watch(store)
    running.watch(other)
    store.behind = other.behind = True
    running.ring()
    threading.Event().wait(0.1)
    store.behind = False
    assert other.flushed.wait(20)
    assert store.asked == []


def test_rule_24_what_could_not_be_written_is_soon_tried_again(
    running: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quotalimit.stores.writer._RETRY", 0.01)
    store = Store()
    store.behind = True
    running.watch(store)
    running.ring()
    for _ in range(3):
        assert store.flushed.wait(20)
        store.flushed.clear()


def test_the_thread_ends_when_nothing_is_open_and_another_begins_with_the_next_charge(
    running: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quotalimit.stores.writer._LINGER", 0.01)
    for _ in range(2):
        running.watch(Store())
        thread = running._thread
        if thread is not None:
            thread.join(20)
            assert not thread.is_alive()
        assert running._thread is None
        assert not running._watched


def test_one_store_that_raises_stops_no_other(writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    stores = [Store() for _ in range(3)]
    for store in stores:
        writer.known.add(store)
        store.behind = True
    writer.close_all()
    assert [store.asked for store in stores] == [["close"]] * 3
    assert caplog.messages == ["a store could not write what was settled"] * 3
    assert "the disk is full" in caplog.text


# Forks


def test_nothing_is_begun_during_a_fork_and_the_parent_goes_on(running: Writer) -> None:
    store = Store()
    store.busy_then = lambda: True
    running.known.add(store)
    running.watch(store)
    thread = running._thread
    running.before_fork()
    other = threading.Thread(target=running.watch, args=(store,), daemon=True)
    other.start()
    other.join(0.1)
    assert other.is_alive()
    running.after_fork(in_child=False)
    other.join(20)
    assert not other.is_alive()
    assert store.asked == ["before", "after in the parent"]
    assert running._watched == {store}
    assert running._thread is thread


def test_rule_11_the_child_of_a_fork_has_a_writer_of_its_own(running: Writer) -> None:
    """What the parent has open is the parent's to write, and its thread is not there."""
    store = Store()
    store.busy_then = lambda: True
    running.known.add(store)
    running.watch(store)
    parents = running._thread
    rung = running._bell
    running.before_fork()
    running.after_fork(in_child=True)
    assert store.asked == ["before", "after in the child"]
    assert not running._watched
    assert running._bell is not rung
    assert running._thread is None
    running.watch(store)
    store.behind = True
    running.ring()
    assert store.flushed.wait(20)
    assert running._thread is not parents
    rung.ring()
