"""What is said of an outage, and who tries again: rule 24 for the circuit breaker alone, in a time that is moved."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest

from quotalimit import Event, StoreUnavailable
from quotalimit.stores.outage import PAUSE, Outage

ERROR = StoreUnavailable("the store is down")


@pytest.fixture(autouse=True)
def time() -> Iterator[SimpleNamespace]:
    time = SimpleNamespace(seconds=1_000.0)
    with patch("quotalimit.clock.monotonic", lambda: time.seconds):
        yield time


def test_a_store_that_never_failed_is_asked() -> None:
    outage = Outage(None)
    outage.check()
    outage.end()
    outage.check()


def test_one_call_tries_again_when_the_pause_is_over_and_the_others_fail_meanwhile(time: SimpleNamespace) -> None:
    outage = Outage(None)
    outage.begin(ERROR)
    for _ in range(2):
        time.seconds += PAUSE
        outage.check()
        with pytest.raises(StoreUnavailable, match="the store is down"):
            outage.check()
        time.seconds += PAUSE / 2
        with pytest.raises(StoreUnavailable):
            outage.check()
        time.seconds -= PAUSE / 2


def test_a_call_that_is_told_to_need_not_wait_for_the_end_of_the_pause() -> None:
    outage = Outage(None)
    outage.begin(ERROR)
    outage.retry_now()
    outage.check()


def test_a_call_that_looks_at_an_outage_just_as_it_ends_goes_ahead() -> None:
    outage = Outage(None)
    outage.begin(ERROR)
    really, outage._lock = outage._lock, MagicMock()

    def end() -> None:
        outage._lock = really
        outage.end()

    outage._lock.__enter__.side_effect = end
    outage.check()


def test_the_end_of_an_outage_is_told_only_if_its_begin_was(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage(None)
    outage.begin(ERROR)
    outage.end()
    assert not caplog.records
    outage = Outage("calls are admitted")
    outage.begin(ERROR)
    outage.end()
    assert [record.message for record in caplog.records] == [
        "the store is down; calls are admitted (said once for each outage)",
        "the store answers again, after: the store is down",
    ]


def test_that_settlements_wait_is_said_once_for_each_outage(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage(None)
    for _ in range(2):
        caplog.clear()
        outage.begin(ERROR)
        outage.say_kept(ERROR)
        assert "kept in memory" in caplog.text
        outage.say_kept(ERROR)
        assert len(caplog.records) == 1
        outage.end()
        assert caplog.messages[1:] == ["the store answers again, after: the store is down"]


def test_listeners_are_told_of_the_first_failure_of_each_outage(heard: list[Event]) -> None:
    outage = Outage(None)
    for outages in (1, 2):
        outage.begin(ERROR)
        outage.begin(ERROR)
        assert [event.kind for event in heard] == ["store_failed"] * outages
        outage.end()


@pytest.mark.parametrize("act", ["check", "begin", "end", "say_kept"])
def test_rule_5_what_fails_in_the_middle_of_a_look_at_the_outage_never_hangs(time: SimpleNamespace, act: str) -> None:
    """As the call of a finalizer, which may come anywhere."""
    outage = Outage(None)
    outage.begin(ERROR)

    def nested() -> None:
        with outage._lock:  # in which a finalizer may strike
            getattr(outage, act)(*([ERROR] if act in ("begin", "say_kept") else []))

    time.seconds += PAUSE
    thread = threading.Thread(target=nested, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
