"""Our whole decorated call against the bare hit of every peer."""

from __future__ import annotations

from typing import Any

from quotalimit import token_budget
from tests.benchmarks.calls import COROUTINE, FUNCTION, LAYERED, N, limited
from tests.benchmarks.peers import INSTALLED, PEERS, TOKEN_THROTTLE
from tests.benchmarks.report import Aim, Table, ns, times
from tests.benchmarks.timing import measure

EXACT = Aim(0.25)


def peers(rounds: int) -> Table:
    """The aim is for peers with exact windows, one for each key; of the others the nearest is shown."""
    table = Table(
        f"Our whole decorated call against every peer's bare hit, N = {N:,}, admitted",
        ("", "a hit", "a call of ours", "ours, of theirs"),
        [
            "Ours is the slower of a full, sliding window and one that fills, function and all; theirs fill, from half "
            "full to full. The aim is for exact windows, one for each key: those without are shown all the same.",
        ],
    )
    ours = [FUNCTION.sliding(limited), FUNCTION.filling(limited), COROUTINE.sliding(limited, name="awaited")]
    theirs = [peer.filling(N) for peer in INSTALLED]
    timings = measure([*ours, *theirs], rounds=rounds, calls=500)
    for peer in PEERS:
        if not peer.version:
            table.add(peer.name, "not installed", "", "")
            continue
        names = ["awaited"] if peer.awaited else [case.name for case in ours[:2]]
        slower = max(names, key=timings.ns)
        ratio = timings.ratio(slower, peer.name)
        what = f"{peer.package} {peer.version}: {peer.algorithm}"
        cells = (ns(timings.ns(peer.name)), ns(timings.ns(slower)), times(ratio))
        table.add(what, *cells, figure=ratio, aim=EXACT if peer.exact else None)
    _add_budgets(table, max(5, rounds // 4))
    return table


def _add_budgets(table: Table, rounds: int) -> None:
    """A token budget alone, held and settled, against the peer that does the same."""

    def budgeted(function: Any) -> Any:
        return token_budget("1_000_000_000/day", key="user", reserve=20)(function)

    ours = LAYERED.case("ours", budgeted)
    if not TOKEN_THROTTLE.version:
        table.add(TOKEN_THROTTLE.name, "not installed", "", "")
        return
    timings = measure([ours, TOKEN_THROTTLE.filling(N)], rounds=rounds, calls=50)
    what = f"token-throttle {TOKEN_THROTTLE.version}: {TOKEN_THROTTLE.algorithm}; ours a token budget"
    table.add(
        what,
        ns(timings.ns(TOKEN_THROTTLE.name)),
        ns(timings.ns("ours")),
        times(timings.ratio("ours", TOKEN_THROTTLE.name)),
    )
