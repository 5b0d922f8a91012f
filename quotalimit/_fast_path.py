"""Common calls: the fast way of a call through several layers, from its keys to its settlement.

A call is common if nothing is special about it: every layer asks for its key alone, all count on one store, everything
fits, nobody waits, listens or collects decisions, and no other call runs around it. Whatever is special, a refusal
first of all, goes the way of all others, which decides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from quotalimit._calls import Call
from quotalimit._layers import Layer, TokenLayer
from quotalimit.events import listeners
from quotalimit.keys import Key
from quotalimit.limiters import Limiter
from quotalimit.recording import BLANK, running
from quotalimit.stores.base import Charge, CommonClaim, Gates, Store

AdmitAtOnce: TypeAlias = Callable[[Sequence[Key], Sequence[object]], Call | None]
"""What admits common calls, given the keys and the arguments."""


def never(_keys: Sequence[Key], _arguments: Sequence[object]) -> None:
    """Admits no call: none of the function's is common."""


class Gatekeeper:
    """Admits the common calls of one guard. It only ever admits."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._holding = [layer for layer in layers if layer.holds]
        self._records = any(layer.borrows for layer in layers)
        self._bound: tuple[int, Store | None, Gates | None] = (-1, None, None)
        """When the limiters were found, in unbindings; their store if it is one, and its gates. One value, for threads
        replace it."""

    @staticmethod
    def serves(layers: Sequence[Layer]) -> bool:
        """Whether the calls of a function are of this kind, and are settled."""
        if len({layer.limiter.name for layer in layers}) < len(layers):
            return False
        simple = all(len(layer.limiter.limits) == 1 and not (layer.asks or layer.patience) for layer in layers)
        return simple and any(layer.holds for layer in layers)

    def admit(self, keys: Sequence[Key], arguments: Sequence[object]) -> Call | None:
        """Admit a call at once; None, with nothing charged, if it is to be asked in the way of all others."""
        unbindings, store, gates = self._bound
        if unbindings != Limiter.unbindings:
            self._bind()
            return None
        if store is None or gates is None or listeners or running() is not None:
            return None
        charges: list[Charge] = []
        try:
            if not gates(keys, charges):
                return None
            return FastCall(self._records, self._holding, store, charges, arguments)
        except BaseException:  # an interrupt
            store.settle([(charge, 0) for charge in charges])
            raise

    def _bind(self) -> None:
        """Look for the store of the limiters, which changes with the default."""
        unbindings = Limiter.unbindings
        bindings = [layer.limiter.bound() for layer in self._layers]
        store = bindings[0].store
        asks = [
            CommonClaim(*binding.places[0], *layer.amounts, layer.holds)
            for layer, binding in zip(self._layers, bindings, strict=True)
        ]
        one = all(binding.store is store for binding in bindings)
        self._bound = (unbindings, store, store.gates(asks)) if one else (unbindings, None, None)


class FastCall(Call):
    """A common call, which is settled by its result if one budget is all that it holds and nothing was recorded."""

    def __init__(
        self,
        records: bool,
        layers: Sequence[Layer],
        store: Store,
        charges: Sequence[Charge],
        arguments: Sequence[object],
    ) -> None:
        self.records = records
        self._layers = layers
        self._store = store
        self._charges = charges
        self._arguments = arguments
        self._ends = [None]

    def _conclude(self, result: object) -> None:
        layer = self._layers[0]
        if listeners or len(self._layers) > 1 or not (isinstance(layer, TokenLayer) and self._is_blank()):
            super()._conclude(result)
            return
        self._reading = reading = layer.read(result)
        used = None if reading is None else layer.weigh(reading)
        if not self._is_blank():
            super()._conclude(result)
        elif used is None:
            self._result = result
            self._settle(None)
        else:
            self._store.settle(((self._charges[0], used),))
            self._arguments = ()
            self._is_settled = True

    def _is_blank(self) -> bool:
        """Whether nothing but the result matters. Threads that the call began may record until it is settled."""
        return self._parts is None and self.notes is BLANK
