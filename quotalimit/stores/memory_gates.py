"""The fast ways into a memory store: what admits the common calls of one limit, or of several.

They decide only what is plain. Whatever is special is left, with nothing done, to `MemoryStore.acquire`, which decides
alike.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Sequence
from typing import Any, Final, TypeAlias

from quotalimit import clock
from quotalimit.algorithms.base import Algorithm
from quotalimit.decision import Decision, collectors
from quotalimit.keys import PLAIN, Key
from quotalimit.stores.base import Charge, CommonClaim, Gate, Gates, decision
from quotalimit.stores.memory_counts import MemoryCounts
from quotalimit.stores.stripes import STRIPES, Stripe, locked, stripes_of

Standing: TypeAlias = Container[Hashable]
"""Where calls stand in line; false while none does."""

_Take: TypeAlias = Callable[[Sequence[Key], int, list[Charge]], bool]


def gate_of_one(stripes: Sequence[Stripe], standing: Standing, counts: MemoryCounts, limit: Algorithm) -> Gate:
    """What `Store.gate` returns."""
    admit = limit.admit

    def admits(key: Key) -> Decision | bool:
        if type(key) not in PLAIN or collectors() or (standing and (counts, key) in standing):
            return False
        stripe = stripes[hash(key) % STRIPES]
        if stripe.is_mine():
            return False
        with stripe.lock:
            now = clock.now()
            if stripe.late or now < stripe.latest:
                return False
            stripe.latest = now
            before = counts.young.get(key)
            if before is None or not counts.swept_at <= now < counts.sweep_at:
                before = counts.load(key, now)
                if before is None:
                    counts.make_room(1)
            after = admit(before, now)
            if after is None:
                if key in counts.open:
                    return False
                return decision(counts.name, limit, 1, before, now, limit.fits(before, 1, now), "exhausted")
            counts.young[key] = after
            return True

    return admits


def gate_of_several(stripes: Sequence[Stripe], standing: Standing, asks: Sequence[CommonClaim]) -> Gates:
    """What `Store.gates` returns."""
    take_all = _write_take_all(asks)

    def somebody_waits(keys: Sequence[Key]) -> bool:
        return any((ask.counts, key) in standing for ask, key in zip(asks, keys, strict=True))

    def admits(keys: Sequence[Key], charges: list[Charge]) -> bool:
        first = keys[0]
        if type(first) not in PLAIN or collectors():
            return False
        for key in keys:
            if key is not first:
                return admits_apart(keys, charges)
        if standing and somebody_waits(keys):
            return False
        stripe = stripes[hash(first) % STRIPES]
        if stripe.is_mine():
            return False
        with stripe.lock:
            now = clock.now()
            if stripe.late or now < stripe.latest:
                return False
            stripe.latest = now
            return take_all(keys, now, charges)

    def admits_apart(keys: Sequence[Key], charges: list[Charge]) -> bool:
        for key in keys:
            if type(key) not in PLAIN:
                return False
        if standing and somebody_waits(keys):
            return False
        its = stripes_of(stripes, keys)
        return locked(its, lambda: take_apart(keys, its, charges))

    def take_apart(keys: Sequence[Key], its: Sequence[Stripe], charges: list[Charge]) -> bool:
        now = clock.now()
        for stripe in its:
            if stripe.late or now < stripe.latest:
                return False
            stripe.latest = now
        return take_all(keys, now, charges)

    return admits


_LOOK: Final = """\
    state_{n} = counts_{n}.young.get(key_{n})
    if state_{n} is None or not counts_{n}.swept_at <= now < counts_{n}.sweep_at:
        state_{n} = counts_{n}.load(key_{n}, now)
        if state_{n} is None:
            return False
    if fits_{n}(state_{n}, {need}, now):
        return False
"""
_TAKE: Final = """\
    counts_{n}.young[key_{n}], mark = take_{n}(state_{n}, {cost}, now)
"""
_HOLD: Final = """\
    charge = Charge(counts_{n}, key_{n}, limit_{n}, mark, {cost})
    charges.append(charge)
    counts_{n}.open.hold(key_{n}, charge)
"""


def _write_take_all(asks: Sequence[CommonClaim]) -> _Take:
    """A function of keys, a time and a list, that takes all that is asked if it all fits; the locks must be held.

    What is held of it is added to the list. Written out for each limit in turn, for loops over limits and states
    would take as long as the limits do.
    """
    namespace: dict[str, Any] = {"Charge": Charge}
    looks, takes = "", ""
    for n, ask in enumerate(asks):
        namespace |= {f"counts_{n}": ask.counts, f"limit_{n}": ask.limit}
        namespace |= {f"fits_{n}": ask.limit.fits, f"take_{n}": ask.limit.take}
        looks += _LOOK.format(n=n, need=ask.need)
        takes += (_TAKE + _HOLD if ask.holds else _TAKE).format(n=n, cost=ask.cost)
    keys = "".join(f"key_{n}, " for n in range(len(asks)))
    code = f"def take_all(keys, now, charges):\n    {keys}= keys\n{looks}{takes}    return True\n"
    exec(compile(code, "<quotalimit: the gate of several limits>", "exec"), namespace)
    return namespace["take_all"]  # type: ignore[no-any-return]
