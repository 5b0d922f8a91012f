"""Tokens held by hand, for a call that no decorator wraps: `with budget.reserve("alice", 1500) as hold: ...`."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

from quotalimit._calls import Call
from quotalimit._guard import Asked, admit, admit_async
from quotalimit._layers import TokenLayer
from quotalimit.decision import Decision, slowest
from quotalimit.failures import read_error
from quotalimit.keys import Key
from quotalimit.providers import read_usage
from quotalimit.recording import Recorder, begin, end, readings_of
from quotalimit.settlement import Settlement

if TYPE_CHECKING:
    from quotalimit.limiters import TokenBudget


class Hold:
    """Tokens taken for a running call, settled once to what the call used.

    `decision` is how it was admitted, `settlement` what was charged in the end, None until then.
    """

    def __init__(self, call: Call, decision: Decision) -> None:
        self.decision = decision
        self.settlement: Settlement | None = None
        self._call = call
        self._settling = threading.Lock()
        self._tokens: list[Token[Recorder | None]] = []

    def settle(self, used: object) -> Settlement:
        """Charge what the call used instead of what is held: a model's response, a `Usage` or a number of units.

        What reports no usage is charged what was recorded inside the block, else all that is held. A second
        settlement does nothing.
        """
        with self._settling:
            if self.settlement is None:
                self._call.finish_as(readings_of(used))
                (self.settlement,) = self._call.settled
            return self.settlement

    def __enter__(self) -> Hold:
        try:
            self._tokens.append(begin(self._call))
        except BaseException:  # an interrupt: no block begins
            self._call.cut()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.leave(error)
        self._call.flush()

    def leave(self, error: BaseException | None) -> Call:
        """End the block: settle by what is known, if nobody has."""
        try:
            with self._settling:
                if self.settlement is None:
                    self._call.finish() if error is None else self._call.fail(error)
                    (self.settlement,) = self._call.settled
        finally:
            end(self._tokens.pop() if self._tokens else None)
        return self._call

    def __del__(self) -> None:
        if "_call" in self.__dict__:  # an interrupt may have come before
            self._call.cut()


class HoldLater:
    """A hold that is taken when it is awaited, or entered with `async with`."""

    def __init__(self, budget: TokenBudget, key: Key, tokens: int, patience: int) -> None:
        self._ask = budget, key, tokens, patience
        self._hold: Hold | None = None

    def __await__(self) -> Generator[Any, None, Hold]:
        return self._take().__await__()

    async def __aenter__(self) -> Hold:
        self._hold = await self._take()
        return self._hold.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hold is not None
        await self._hold.leave(error).flush_async()

    async def _take(self) -> Hold:
        call = await admit_async(_asked(*self._ask), report=True)
        assert call is not None
        try:
            return Hold(call, slowest(call.decisions))
        except BaseException:  # an interrupt
            call.release()
            raise


def take(budget: TokenBudget, key: Key, tokens: int, patience: int) -> Hold:
    """Hold tokens at once. Raises `TokenBudgetExceeded`."""
    call = admit(_asked(budget, key, tokens, patience), report=True)
    assert call is not None
    try:  # here as in the twin: an interrupt may come as any function begins that would share this
        return Hold(call, slowest(call.decisions))
    except BaseException:  # an interrupt
        call.release()
        raise


def _asked(budget: TokenBudget, key: Key, tokens: int, patience: int) -> Asked:
    layer = TokenLayer(budget, "key", patience, tokens, read_usage, None, read_error)
    return Asked((layer,), (key,), ())
