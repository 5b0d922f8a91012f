"""Where the time of a decorated call goes: each row does what the one before it does, and something more."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from quotalimit import clock, limiters_of
from quotalimit._wrapping import guards_of
from quotalimit.stores.base import CommonClaim
from quotalimit.stores.stripes import Stripe
from tests.benchmarks.calls import FUNCTION, LAYERED, layered, limited
from tests.benchmarks.report import Table, ns
from tests.benchmarks.timing import Case, compile_loop, measure

LOCKED = "with stripe.lock:\n    clock.now()"
HELD = "held = []\ngates((key, key, key), held)\nstore.settle(((held[0], 15),))"
ADMITTED = "call = admit((key, key, key), (key, 'hello'))\nstore.settle(((call._charges[0], 15),))"
FINISHED = "call = admit((key, key, key), (key, 'hello'))\ncall.finish(response)"

ONE_LIMIT = (
    ("its lock and its clock", LOCKED),
    ("the gate: the log, and what is looked at first", "gate(key)"),
    ("the whole call: key function, wrapper, function", FUNCTION.statement),
)
THREE_LAYERS = (
    ("locks and clocks, of the check and of the settlement", f"{LOCKED}\n{LOCKED}"),
    ("the gates of three limits, a charge, its settlement", HELD),
    ("the object that is the call", ADMITTED),
    ("reading the usage, weighing it, the rest of the settlement", FINISHED),
    ("the whole call: keys, context, wrapper, function", LAYERED.statement),
)


def profile(rounds: int) -> Table:
    table = Table(
        "Where the time of a call goes, filling",
        ("", "a call", "more than the row before"),
        ["Calls of one key by the real clock, in limits that are never full: the cheapest case of all."],
    )
    for title, steps, names in (("one limit", ONE_LIMIT, _one_limit()), ("three layers", THREE_LAYERS, _layers())):
        timings = measure(
            [Case(what, compile_loop(statement, names)) for what, statement in steps], rounds=rounds, calls=1_000
        )
        costs = [0.0, *(timings.ns(what) for what, _ in steps)]
        for (what, _), (before, cost) in zip(steps, pairwise(costs), strict=True):
            table.add(f"{title}: {what}", ns(cost), ns(cost - before))
    return table


def _one_limit() -> dict[str, Any]:
    ask = FUNCTION.make(lambda function: limited(function, 100_000_000))["ask"]
    ask("alice", "hello")
    (limiter,) = limiters_of(ask)
    return {"stripe": Stripe(), "clock": clock, "gate": limiter.gate, "ask": ask}


def _layers() -> dict[str, Any]:
    ask = LAYERED.make(lambda function: layered(function, 100_000_000))["ask"]
    for _ in range(2):  # the first call finds the stores
        response = ask("alice", "hello")
    (guard,) = guards_of(ask)
    bindings = [layer.limiter.bound() for layer in guard.layers]
    asks = [
        CommonClaim(*binding.places[0], *layer.amounts, layer.holds)
        for layer, binding in zip(guard.layers, bindings, strict=True)
    ]
    store = bindings[0].store
    return {
        "stripe": Stripe(),
        "clock": clock,
        "gates": store.gates(asks),
        "store": store,
        "admit": guard.admit_at_once,
        "response": response,
        "ask": ask,
    }
