"""Who writes what nobody waits for: rule 11 for the writer alone."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from quotalimit.stores.writer import Writer


class Written:
    """A store that has nothing to write, and may be told to do what a finalizer does where it is looked at."""

    behind = False
    busy_then: Callable[[], bool] = lambda _: False
    hashed_then: Callable[[], None] = lambda _: None

    @property
    def busy(self) -> bool:
        return self.busy_then()

    def __hash__(self) -> int:
        self.hashed_then()
        return id(self)

    def flush(self) -> None: ...
    def close(self) -> None: ...
    def before_fork(self) -> None: ...
    def after_fork(self, *, in_child: bool) -> None: ...


def in_time(act: Callable[[], object]) -> None:
    """Do something that must not hang."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def writer() -> Writer:
    """Without a thread of its own."""
    writer = Writer()
    writer._thread = threading.current_thread()
    return writer


def test_rule_11_a_store_that_a_finalizer_watches_in_the_middle_of_another_is_watched(writer: Writer) -> None:
    one, other = Written(), Written()
    one.hashed_then = lambda: writer.watch(other)
    in_time(lambda: writer.watch(one))
    assert other in writer._watched


def test_rule_11_a_store_that_a_finalizer_watches_while_the_idle_are_dropped_stays(writer: Writer) -> None:
    """Be it another, or the one that was idle a moment ago."""
    one, other = Written(), Written()

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
