"""The benchmarks run, with few rounds and on our own cases: what they find is not looked at, only that they find it."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from quotalimit import RateLimitExceeded, limiters_of, rate_limited
from tests.benchmarks import calls, peers, profile, scaling
from tests.benchmarks.report import Aim, Table
from tests.benchmarks.states import Pace, half_full
from tests.benchmarks.timing import Case, Timings, compile_loop, measure


@pytest.fixture(autouse=True)
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the `bench` extra is not installed."""
    monkeypatch.setattr(calls, "LIMITS", SimpleNamespace(version=None))
    monkeypatch.setattr(scaling, "KEYED", [])
    monkeypatch.setattr(scaling, "AMOUNTS", (10, 20))
    monkeypatch.setattr(scaling, "KEYS", (1, 50))


@pytest.mark.parametrize(
    ("table", "ours"),
    [
        (calls.functions, 2),
        (calls.kinds, 4),
        (calls.refused, 1),
        (calls.layers, 2),
        (scaling.amounts, 1),
        (scaling.keys, 1),
    ],
)
def test_a_table_says_of_each_figure_of_ours_whether_the_aim_is_met(table: Callable[[int], Table], ours: int) -> None:
    rows = [row for row in table(1).rows if "quotalimit" in row[0]]
    assert len(rows) == ours
    assert all(row[-2].startswith("≤") and row[-1] in ("met", "**not met**") for row in rows)


def test_the_profile_of_a_call_ends_with_the_whole_of_it() -> None:
    rows = profile.profile(1).rows
    assert [row[0].partition(":")[0] for row in rows] == ["one limit"] * 3 + ["three layers"] * 5
    assert "the whole call" in rows[2][0]
    assert "the whole call" in rows[-1][0]


def limited(amount: int) -> Callable[[str], str]:
    """A limited function that returns its user."""
    return rate_limited(f"{amount}/hour", key="user")(returns_user)


def returns_user(user: str) -> str:
    return user


def test_a_paced_window_is_full_and_admits() -> None:
    ask = limited(50)
    pace = Pace(lambda: ask("alice"), 50)
    real = time.time
    with pace.running():
        for _ in range(200):
            ask("alice")
        assert 46 <= limiters_of(ask)[0].peek("alice").used <= 50
    pace.check_full(ask, 50)
    assert time.time is real


def test_a_window_that_is_not_full_is_noticed() -> None:
    ask = limited(50)
    pace = Pace(lambda: ask("alice"), 50)
    limiters_of(ask)[0].reset("alice")
    with pytest.raises(RuntimeError, match="only 0 of 50"):
        pace.check_full(ask, 50)


def test_keys_are_handed_out_while_their_windows_have_room() -> None:
    ask = limited(6)
    keys = half_full(ask, 6)
    assert [ask(next(keys)) for _ in range(7)] == ["user 0"] * 3 + ["user 1"] * 3 + ["user 2"]
    with pytest.raises(RateLimitExceeded):
        ask("user 0")


def test_a_refusal_among_what_is_to_be_admitted_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="refused"):
        measure([Case("never", compile_loop("admitted = False", {}))], rounds=1, calls=10)


def test_a_ratio_is_the_median_of_each_rounds_own() -> None:
    timings = Timings({"ours": [10.0, 40.0, 30.0], "one": [5.0, 10.0, 10.0], "other": [5.0, 10.0, 20.0]})
    assert timings.ns("ours") == 30
    assert timings.ratio("ours", "one") == 3
    assert timings.ratio("ours", "one", "other") == 1


def test_an_aim_is_met_or_missed_and_missed_ones_are_listed() -> None:
    table = Table("Speed", ("", "figure"))
    table.add("quick", "1×", figure=1, aim=Aim(1.5))
    table.add("slow", "2×", figure=2, aim=Aim(1.5))
    table.add("busy", "0.6×", figure=0.6, aim=Aim(0.7, at_least=True))
    table.add("a peer", "9×")
    assert table.missed == ["Speed: slow", "Speed: busy"]
    assert "| slow | 2× | ≤ 1.5× | **not met** |" in str(table)
    assert "| a peer | 9× |  |  |" in str(table)


def test_each_peer_says_what_of_it_is_measured() -> None:
    names = [peer.name for peer in (*peers.PEERS, peers.TOKEN_THROTTLE)]
    assert len(set(names)) == len(names) == 8
